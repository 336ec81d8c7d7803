"""The workers that may take one relayed call, and what becomes of an attempt at one of them."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

from fastchat_grpc.controller.dispatch import Dispatcher, PickRequest
from fastchat_grpc.controller.evidence import Evidence, evidence
from fastchat_grpc.controller.fleet import Change, ChangeKind, Reservation, Worker
from fastchat_grpc.controller.search import Search
from fastchat_grpc.core import ModelInfo, WorkerState
from fastchat_grpc.errors import FastChatError, ModelNotFound, NoLiveWorker, WorkerUnavailable
from fastchat_grpc.rpc.failover import Attempt, Call
from fastchat_grpc.rpc.metering import MethodMeter
from fastchat_grpc.rpc.pool import ChannelPool, PooledChannel
from fastchat_grpc.rpc.retry import Verdict

Open = Callable[[PooledChannel, ModelInfo, Call[bytes]], Any]
"""Starts the call on a channel, to a worker that serves the model like this."""


class Meters(Protocol):
    """Counts attempts by their methods."""

    def of(self, method: str) -> MethodMeter: ...


class Candidates:
    """The workers of one relayed call: the `Servers` of its failover.

    Args:
        attempts: where its attempts are kept, and what makes them.
        model: as the caller named it; empty for the only one.
        key: what prefix_affinity groups by.
        wants: what a worker must have now to take the call; asked at each pick.
        open: starts the call.
        method: that it is of.
    """

    def __init__(
        self,
        attempts: Attempts,
        model: str,
        key: str,
        wants: Callable[[Call[bytes]], PickRequest],
        open: Open,
        method: str,
    ) -> None:
        self.method = method
        self._attempts = attempts
        self._search = Search(attempts.dispatcher, model, key)
        self._wants = wants
        self._open = open

    def pick(self, call: Call[bytes]) -> Attempt[bytes]:
        """See Servers. Raises as `Search.reserve`."""
        reservation = self._search.reserve(self._wants(call), lambda: attempt.move())
        channel = self._attempts.pool.get(reservation.address)
        try:
            info = reservation.worker.model(self._search.model)
            assert info is not None, "it was found by this name"
            if not call.started:
                self._search.origin = info
            attempt = WorkerAttempt(self._attempts, self, call, reservation, channel, self._open(channel, info, call))
        except BaseException:
            reservation.release()
            raise
        return attempt

    async def wait(self, call: Call[bytes], timeout_s: float) -> None:
        """See Servers."""
        await self._search.wait(self._wants(call), timeout_s)

    def others(self, call: Call[bytes]) -> bool:
        """Whether a worker in good order could go on with the call now."""
        return self._search.others(self._wants(call))

    def failed(self, instance_id: str, verdict: Verdict) -> None:
        """An attempt has ended with an error."""
        self._search.failed(instance_id, verdict)


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
        self._status = "CANCELLED"
        self._meter = attempts.meters.of(candidates.method) if attempts.meters is not None else None
        if self._meter is not None:
            self._began = monotonic()
            self._meter.started()
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
        self._status = error.code.name
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
        self._status = "OK"
        self._reservation.succeeded()

    def close(self) -> None:
        """See Attempt."""
        if self._closed:
            return
        self._closed = True
        super().close()
        if self._meter is not None:
            self._meter.ended(self._status, monotonic() - self._began, 0)
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
        found = evidence(error, verdict)
        self._attempts.dispatcher.registry.counts.attempts[found.value] += 1
        match found:
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
        self.meters: Meters | None = None
        """Counts the attempts; None: nobody does."""
        self.running: set[WorkerAttempt] = set()
        self.stranded = Stranded()
        dispatcher.registry.subscribe(self.stranded.on_change)
