"""The workers that may take one relayed call: who fits, who was tried, and what becomes of an attempt."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

from fastchat_grpc.controller.dispatch import Dispatcher, PickRequest
from fastchat_grpc.controller.evidence import Evidence, evidence
from fastchat_grpc.controller.fleet import Change, ChangeKind, Replicas, Reservation, Worker
from fastchat_grpc.controller.health import Tier
from fastchat_grpc.core import ModelInfo, WorkerState
from fastchat_grpc.errors import (
    FastChatError,
    ModelNotFound,
    NoLiveWorker,
    NotResumable,
    Starting,
    WorkerUnavailable,
)
from fastchat_grpc.rpc.failover import Attempt, Call, Nobody
from fastchat_grpc.rpc.plan import Outlook
from fastchat_grpc.rpc.pool import ChannelPool, PooledChannel
from fastchat_grpc.rpc.retry import Verdict

UNNAMED_LOOK_S = 0.1
_IN_USE = math.inf
"""When an attempt failed that still runs, or at a worker that cannot do it at all."""


Open = Callable[[PooledChannel, ModelInfo, Call[bytes]], Any]
"""Starts the call on a channel, to a worker that serves the model like this."""


class Candidates:
    """The workers of one relayed call: the `Servers` of its failover.

    A worker is picked once. When nobody untried is left, one that failed may be asked again if it has given
    a sign of life since: a heartbeat, or a connection that stands again.

    Args:
        attempts: where its attempts are kept, and what makes them.
        model: as the caller named it; empty for the only one.
        key: what prefix_affinity groups by.
        wants: what a worker must have now to take the call; asked at each pick.
        open: starts the call.
    """

    def __init__(
        self, attempts: Attempts, model: str, key: str, wants: Callable[[Call[bytes]], PickRequest], open: Open
    ) -> None:
        self._attempts = attempts
        self._registry = attempts.dispatcher.registry
        self._model = model
        self._key = key
        self._wants = wants
        self._open = open
        self._tried: dict[str, float] = {}  # instance id to the time of the failure
        self._full: set[str] = set()
        self.origin: ModelInfo | None = None
        """The model as the worker serves it that began the generation."""

    def pick(self, call: Call[bytes]) -> Attempt[bytes]:
        """See Servers. Raises as `Dispatcher.pick`, too."""
        request = self._wants(call)
        try:
            self._resolve(request.adapter)
            request = self._completed(request)
            reservation = self._attempts.dispatcher.pick(request, lambda: attempt.move())
        except (NoLiveWorker, Starting) as error:
            raise self._nobody(request, error) from None
        self._tried[reservation.instance_id] = _IN_USE
        channel = self._attempts.pool.get(reservation.address)
        try:
            info = reservation.worker.model(self._model)
            assert info is not None, "it was found by this name"
            if not call.started:
                self.origin = info
            attempt = WorkerAttempt(self._attempts, self, call, reservation, channel, self._open(channel, info, call))
        except BaseException:
            reservation.release()
            raise
        return attempt

    async def wait(self, call: Call[bytes], timeout_s: float) -> None:
        """See Servers."""
        for instance_id in self._full:  # who is woken for one of them finds room there
            self._tried.pop(instance_id, None)
        self._full.clear()
        if not self._model:  # no model is known yet, so that there is no queue to wait in
            await asyncio.sleep(min(timeout_s, UNNAMED_LOOK_S))
            return
        request = self._completed(self._wants(call))
        await self._registry.room.wait(self._model, timeout_s, request.accepts)

    def others(self, call: Call[bytes]) -> bool:
        """Whether a worker in good order could go on with the call now."""
        request = self._completed(self._wants(call))
        try:
            _, pool = self._registry.pool(self._model)
        except FastChatError:
            return False
        ready = pool.indexes(Tier.READY, request.suits)
        return any(request.accepts(worker) for index in ready for worker in index.items)

    def failed(self, instance_id: str, verdict: Verdict) -> None:
        """An attempt has ended with an error."""
        if verdict is not Verdict.UNABLE:
            self._tried[instance_id] = monotonic()
        if verdict is Verdict.FULL:
            self._full.add(instance_id)

    def _completed(self, request: PickRequest) -> PickRequest:
        request = request._replace(model=self._model, key=self._key, tried=self._tried)
        if request.prefers:
            with suppress(FastChatError):
                return request.among(*self._registry.pool(self._model))
        return request

    def _resolve(self, adapter: str) -> None:
        """Find the model's full name. Raises as `Registry.pool`."""
        if adapter and not self._model:
            with suppress(ModelNotFound):
                infos = (worker.model(adapter) for worker in self._registry.pool(adapter)[1].members)
                self._model = next((info.base_model for info in infos if info is not None), "")
        self._model, _ = self._registry.pool(self._model)

    def _nobody(self, request: PickRequest, error: FastChatError) -> Nobody:
        if isinstance(error, Starting):
            return Nobody(Outlook.COMING, error)
        if request.needs and not self._capable(request):
            lacking = ", ".join(sorted(capability.value for capability in request.needs))
            why = f"no worker of model {self._model!r} can: such a request needs a backend that is capable of {lacking}"
            return Nobody(Outlook.CLOSED, NotResumable(why, metadata={"model": self._model[:128]}))
        if self._registry.recovering(self._model):
            return Nobody(Outlook.COMING, error)
        if request.fingerprint and self._members() and not any(map(request.suits, self._members())):
            why = f"the workers of model {self._model!r} that are left serve another revision than the one that began"
            error = NoLiveWorker(why, metadata={"model": self._model[:128]})
        return Nobody(Outlook.OPEN, error)

    def _capable(self, request: PickRequest) -> bool:
        """Whether a worker that could do it is, or was, there: then one may come."""
        if self.origin is None or request.needs <= self.origin.capabilities:
            return True
        return any(map(request.suits, self._members()))

    def _members(self) -> Sequence[Replicas]:
        """The workers of the model, replicas together."""
        try:
            return self._registry.pool(self._model)[1].replicas
        except FastChatError:
            return ()


class WorkerAttempt(Attempt[bytes]):
    """One call to one worker, and the reservation that goes with it."""

    def __init__(
        self,
        attempts: Attempts,
        candidates: Candidates,
        call: Call[bytes],
        reservation: Reservation,
        channel: PooledChannel,
        running: Any,
    ) -> None:
        super().__init__(running, None if call.started else call.state)
        self._attempts = attempts
        self._candidates = candidates
        self._owner = call
        self._reservation = reservation
        self._channel = channel
        self._moved = False
        self._closed = False
        channel.calls += 1
        attempts.running.add(self)

    @property
    def worker(self) -> Worker:
        """Who was asked."""
        return self._reservation.worker

    @property
    def in_trouble(self) -> bool:
        """Whether the worker is gone, or makes no progress."""
        return self.worker.removed is not None or self.worker.load.state is WorkerState.DEGRADED

    def cancelled(self) -> FastChatError:
        """See Attempt."""
        return WorkerUnavailable("it gave no sign of life" if self._moved else "its channel was closed")

    def failed(self, error: FastChatError, verdict: Verdict) -> FastChatError:
        """See Attempt."""
        self._account(error, verdict)
        self._candidates.failed(self._reservation.instance_id, verdict)
        spec = self.worker.spec
        if isinstance(error, ModelNotFound):
            # Another server has taken its address, or it has other models now. That is no news of the model.
            why = f"worker {spec.worker_id} at {spec.address} does not serve the model that it is registered with"
            return NoLiveWorker(why, metadata=error.metadata)
        if type(error) is not WorkerUnavailable:
            return error
        # An error of the transport does not say whose it is.
        return WorkerUnavailable(f"worker {spec.worker_id} at {spec.address}: {error.message}")

    def answered(self) -> None:
        """See Attempt."""
        self._reservation.answered()

    def succeeded(self) -> None:
        """See Attempt."""
        self._reservation.succeeded()

    def close(self) -> None:
        """See Attempt."""
        if self._closed:
            return
        self._closed = True
        super().close()
        self._attempts.running.discard(self)
        self._attempts.stranded.discard(self)
        self._channel.calls -= 1
        self._channel.used_at = monotonic()
        self._reservation.release()

    def move(self) -> None:
        """The worker has expired, was replaced, or makes no progress: end the call if it can go on elsewhere.

        Where nobody could take it, it stays: its worker may recover. It is moved when somebody comes.
        """
        state = self._owner.state
        if self._moved or self._reservation.released or (state is not None and state.started and state.obstacle):
            return
        if self._candidates.others(self._owner):
            self._moved = True
            self._call.cancel()
        else:
            self._attempts.stranded.add(self)

    def _account(self, error: FastChatError, verdict: Verdict) -> None:
        """What the error says of the worker."""
        if self._moved:
            return
        match evidence(error, verdict):
            case Evidence.LOST:
                self._reservation.lost()
            case Evidence.FULL:
                self._attempts.dispatcher.registry.full(self.worker)
            case Evidence.AWAY:
                self._reservation.suspect()
            case Evidence.FAULT:
                self._reservation.failed()


class Stranded:
    """Attempts at workers in trouble that nobody else could take so far, by model. Moved when somebody comes."""

    def __init__(self) -> None:
        self._attempts: dict[WorkerAttempt, None] = {}

    def __len__(self) -> int:
        return len(self._attempts)

    def add(self, attempt: WorkerAttempt) -> None:
        """Move it later."""
        self._attempts[attempt] = None

    def discard(self, attempt: WorkerAttempt) -> None:
        """It has ended."""
        self._attempts.pop(attempt, None)

    def on_change(self, change: Change) -> None:
        """A change of the registry."""
        if not self._attempts or change.kind not in (ChangeKind.ADDED, ChangeKind.STATE):
            return
        for attempt in list(self._attempts):
            if attempt.in_trouble:
                attempt.move()


class Attempts:
    """The attempts of all relayed calls that are under way, with what makes them: a dispatcher and channels."""

    def __init__(self, dispatcher: Dispatcher, pool: ChannelPool) -> None:
        self.dispatcher = dispatcher
        self.pool = pool
        self.running: set[WorkerAttempt] = set()
        self.stranded = Stranded()
        dispatcher.registry.subscribe(self.stranded.on_change)
