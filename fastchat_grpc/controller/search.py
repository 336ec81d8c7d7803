"""Which workers may take one call that workers may fail: who fits, who was tried, and whether to wait for one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic

from fastchat_grpc.controller.dispatch import Dispatcher, PickRequest
from fastchat_grpc.controller.fleet import Replicas, Reservation
from fastchat_grpc.controller.health import Tier
from fastchat_grpc.core import ModelInfo
from fastchat_grpc.errors import FastChatError, ModelNotFound, NoLiveWorker, NotResumable, Starting
from fastchat_grpc.rpc.failover import Nobody
from fastchat_grpc.rpc.plan import Outlook
from fastchat_grpc.rpc.retry import Verdict

UNNAMED_LOOK_S = 0.1
_IN_USE = math.inf
"""When an attempt failed that still runs, or at a worker that cannot do it at all."""


class Search:
    """The workers of one call, whoever carries it to them.

    A worker is picked once. When nobody untried is left, one that failed may be asked again if it has given
    a sign of life since: a heartbeat, or a connection that stands again.

    Args:
        model: as the caller named it; empty for the only one.
        key: what prefix_affinity groups by.
    """

    def __init__(self, dispatcher: Dispatcher, model: str, key: str) -> None:
        self._dispatcher = dispatcher
        self._registry = dispatcher.registry
        self._key = key
        self._tried: dict[str, float] = {}  # instance id to the time of the failure
        self._full: set[str] = set()
        self.model = model
        """Its full name, once a worker was found."""
        self.origin: ModelInfo | None = None
        """The model as the worker serves it that began the generation."""

    def reserve(self, wanted: PickRequest, on_trouble: Callable[[], None] | None = None) -> Reservation:
        """The next worker. Raises Nobody, or what `Dispatcher.pick` raises of the request.

        Args:
            wanted: what a worker must have now.
            on_trouble: as `Registry.reserve`.
        """
        try:
            self._resolve(wanted.adapter)
            wanted = self._completed(wanted)
            reservation = self._dispatcher.pick(wanted, on_trouble)
        except (NoLiveWorker, Starting) as error:
            raise self._nobody(wanted, error) from None
        self.tries(reservation.instance_id)
        return reservation

    def tries(self, instance_id: str) -> None:
        """An attempt is made there."""
        self._tried[instance_id] = _IN_USE

    async def wait(self, wanted: PickRequest, timeout_s: float) -> None:
        """Return when it is worth while to look again, or after the timeout."""
        for instance_id in self._full:  # who is woken for one of them finds room there
            self._tried.pop(instance_id, None)
        self._full.clear()
        if not self.model:  # no model is known yet, so that there is no queue to wait in
            await asyncio.sleep(min(timeout_s, UNNAMED_LOOK_S))
            return
        await self._registry.room.wait(self.model, timeout_s, self._completed(wanted).accepts)

    def others(self, wanted: PickRequest) -> bool:
        """Whether a worker in good order could take it now."""
        wanted = self._completed(wanted)
        try:
            _, pool = self._registry.pool(self.model)
        except FastChatError:
            return False
        ready = pool.indexes(Tier.READY, wanted.suits)
        return any(wanted.accepts(worker) for index in ready for worker in index.items)

    def failed(self, instance_id: str, verdict: Verdict) -> None:
        """An attempt has ended with an error."""
        if verdict is not Verdict.UNABLE:
            self._tried[instance_id] = monotonic()
        if verdict is Verdict.FULL:
            self._full.add(instance_id)

    def forgive(self, instance_id: str) -> None:
        """An attempt has ended through no fault of the worker: it may be made there again."""
        self._tried.pop(instance_id, None)

    def _completed(self, wanted: PickRequest) -> PickRequest:
        wanted = wanted._replace(model=self.model, key=self._key, tried=self._tried)
        if wanted.prefers:
            with suppress(FastChatError):
                return wanted.among(*self._registry.pool(self.model))
        return wanted

    def _resolve(self, adapter: str) -> None:
        """Find the model's full name. Raises as `Registry.pool`."""
        if adapter and not self.model:
            with suppress(ModelNotFound):
                infos = (worker.model(adapter) for worker in self._registry.pool(adapter)[1].members)
                self.model = next((info.base_model for info in infos if info is not None), "")
        self.model, _ = self._registry.pool(self.model)

    def _nobody(self, wanted: PickRequest, error: FastChatError) -> Nobody:
        if isinstance(error, Starting):
            return Nobody(Outlook.COMING, error)
        if wanted.needs and not self._capable(wanted):
            lacking = ", ".join(sorted(capability.value for capability in wanted.needs))
            why = f"no worker of model {self.model!r} can: such a request needs a backend that is capable of {lacking}"
            return Nobody(Outlook.CLOSED, NotResumable(why, metadata={"model": self.model[:128]}))
        if self._registry.recovering(self.model):
            return Nobody(Outlook.COMING, error)
        if wanted.fingerprint and self._members() and not any(map(wanted.suits, self._members())):
            why = f"the workers of model {self.model!r} that are left serve another revision than the one that began"
            error = NoLiveWorker(why, metadata={"model": self.model[:128]})
        return Nobody(Outlook.OPEN, error)

    def _capable(self, wanted: PickRequest) -> bool:
        """Whether a worker that could do it is, or was, there: then one may come."""
        if self.origin is None or wanted.needs <= self.origin.capabilities:
            return True
        return any(map(wanted.suits, self._members()))

    def _members(self) -> Sequence[Replicas]:
        """The workers of the model, replicas together."""
        try:
            return self._registry.pool(self.model)[1].replicas
        except FastChatError:
            return ()
