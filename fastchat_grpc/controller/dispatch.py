"""Dispatch: which worker gets the next request. Policies are pure functions over candidates."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

from fastchat_grpc.config import DispatchMethod
from fastchat_grpc.controller.fleet import Replicas, Reservation, Worker
from fastchat_grpc.controller.health import Tier
from fastchat_grpc.controller.index import Candidates
from fastchat_grpc.controller.pools import Pool
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.core import Capability
from fastchat_grpc.errors import AdapterNotFound, ModelNotFound, NoLiveWorker
from fastchat_grpc.rpc.resume import ResumeNeeds

AFFINITY_SLACK = 1.25
"""prefix_affinity passes a worker over that is this much above the mean load (bounded-load hashing)."""

AFFINITY_LOOKS = 64
"""Workers that prefix_affinity looks at, in the order of the key. All of them are above the bound once in a million."""

_NONE: Mapping[str, float] = MappingProxyType({})

Fits = Callable[[Worker], bool]
Policy = Callable[[Candidates[Worker], str, random.Random], Worker | None]


class PickRequest(NamedTuple):
    """What a request asks of the worker that gets it.

    Attributes:
        model: name of the model; empty for the only one.
        key: what prefix_affinity groups by.
        adapter: name of a LoRA adapter of that model, where the request names one apart from the model.
        needs: what the worker's model must be able to do.
        prefers: what it must be able to do, too, where any worker of the model can (`among`). Where nobody can,
            whoever gets the request says so.
        fingerprint: identity of weights and tokenizer; a worker that does not know its own is taken by the name.
        backend: name of the backend, where only the same one draws the same random numbers; empty: any.
        excluded: worker ids or instance ids not to pick.
        tried: instance ids at which this request has failed, and when, by the registry's clock. One of them
            is picked only where nobody else is left, and if it has shown a sign of life since.
        reaches: whether whoever connects to the worker can; None: it is not asked.
    """

    model: str = ""
    key: str = ""
    adapter: str = ""
    needs: frozenset[Capability] = frozenset()
    prefers: frozenset[Capability] = frozenset()
    fingerprint: str = ""
    backend: str = ""
    excluded: Collection[str] = frozenset()
    tried: Mapping[str, float] = _NONE
    reaches: Fits | None = None

    @property
    def pool(self) -> str:
        """Name of the pool whose workers can take it: adapters have pools of their own."""
        return self.adapter or self.model

    def going_on(self, needs: ResumeNeeds) -> PickRequest:
        """The same for whoever can go on with what another worker began: it has been found able once."""
        return self._replace(
            needs=needs.capabilities, prefers=frozenset(), fingerprint=needs.fingerprint, backend=needs.backend
        )

    def among(self, model: str, pool: Pool) -> PickRequest:
        """The same for the workers of a model's pool: what it prefers is needed where one of them can do it.

        That one need not be free or well now: it is waited for, or comes back. Asking another would be in vain.
        """
        needs = self.needs | self.prefers
        some = sum([self._suits(replicas, model, needs) for replicas in pool.replicas])
        # Where all can, as in most fleets, nothing need be looked at when one is picked.
        return self._replace(model=model, needs=needs) if 0 < some < len(pool.replicas) else self

    def suits(self, replicas: Replicas) -> bool:
        """Whether workers with these models can take it, by what they serve."""
        return self._suits(replicas, self.model, self.needs)

    def _suits(self, replicas: Replicas, model: str, needs: frozenset[Capability]) -> bool:
        if self.adapter and self.adapter not in replicas.models:
            return False
        if not replicas.serves(model, needs, self.fingerprint):
            return False
        return not self.backend or replicas.models[model].backend == self.backend

    def accepts(self, worker: Worker) -> bool:
        """Whether it may go to a worker, who may have been tried but has come back since."""
        suits = worker.replicas is not None and self.suits(worker.replicas)
        return suits and self._not_excluded(worker) and self._not_failed_since(worker)

    def filters(self) -> list[Fits | None]:
        """What candidates must meet: at first, and where nobody does, then."""
        if not self.tried:
            return [self._may_go_to if self.excluded or self.reaches else None]
        return [self._untried, lambda worker: self._may_go_to(worker) and self._not_failed_since(worker)]

    def _untried(self, worker: Worker) -> bool:
        return worker.spec.instance_id not in self.tried and self._may_go_to(worker)

    def _may_go_to(self, worker: Worker) -> bool:
        return self._not_excluded(worker) and (self.reaches is None or self.reaches(worker))

    def _not_excluded(self, worker: Worker) -> bool:
        return worker.spec.instance_id not in self.excluded and worker.spec.worker_id not in self.excluded

    def _not_failed_since(self, worker: Worker) -> bool:
        failed_at = self.tried.get(worker.spec.instance_id)
        return failed_at is None or worker.recovered_at > failed_at


_NOTHING_ELSE = PickRequest()[2:]
"""Of a request that asks for a model, and perhaps has a key: any worker of the model can take it."""


def shortest_queue(candidates: Candidates[Worker], key: str, rng: random.Random) -> Worker | None:
    """The worker with the shortest queue over weight; among equals, any."""
    return candidates.shortest(rng)


def lottery(candidates: Candidates[Worker], key: str, rng: random.Random) -> Worker | None:
    """Any worker, with a chance in proportion to its weight."""
    return candidates.weighed(rng)


def power_of_two(candidates: Candidates[Worker], key: str, rng: random.Random) -> Worker | None:
    """The shorter queue of two workers taken at random: O(1) (Mitzenmacher, 2001)."""
    return candidates.shorter_of_two(rng)


def prefix_affinity(candidates: Candidates[Worker], key: str, rng: random.Random) -> Worker | None:
    """The same worker for the same key, while its load is not far above the mean.

    Consistent hashing, so that controllers agree without talking and a worker that leaves moves only its own
    keys; with bounded loads (Mirrokni et al., 2018), by which at least a fifth of the workers fit. Without a
    key: shortest_queue.
    """
    if not key:
        return candidates.shortest(rng)
    bound = AFFINITY_SLACK * (candidates.mean() + 1)
    first: Worker | None = None
    for worker in candidates.nearest(key, AFFINITY_LOOKS):
        if worker.score <= bound:
            return worker
        first = first or worker
    return first or candidates.shortest(rng)


POLICIES: dict[DispatchMethod, Policy] = {
    DispatchMethod.SHORTEST_QUEUE: shortest_queue,
    DispatchMethod.LOTTERY: lottery,
    DispatchMethod.POWER_OF_TWO: power_of_two,
    DispatchMethod.PREFIX_AFFINITY: prefix_affinity,
}


class Dispatcher:
    """Picks workers by one policy. Used by the relay, by PickWorker and by the gateway's picker."""

    def __init__(
        self,
        registry: Registry,
        method: DispatchMethod = DispatchMethod.SHORTEST_QUEUE,
        rng: random.Random | None = None,
    ) -> None:
        self.registry = registry
        self.method = method
        self._policy = POLICIES[method]
        self._rng = rng or random.Random()

    def choose(self, request: PickRequest) -> tuple[str, Worker]:
        """The name of the model and a worker for one request of it, without a reservation.

        Raises:
            Starting, ModelNotFound, NoLiveWorker, InvalidArgument: as `Registry.pool`; NoLiveWorker also
            where every live worker is excluded, draining, suspect or failing.
            AdapterNotFound: the model is known, but no worker has the adapter.
        """
        name, pool = self._with_adapter(request) if request.adapter else self.registry.pool(request.model)
        sole = pool.sole
        if sole is not None and sole.ready.items and request[2:] == _NOTHING_ELSE:  # the usual
            worker = self._policy(sole.candidates, request.key, self._rng)
            assert worker is not None
            return name, worker
        if request.prefers:
            request = request.among(name, pool)
        suits = None
        if request.needs or request.fingerprint or request.adapter or request.backend:
            suits = (request if request.model else request._replace(model=name)).suits
        for fits in request.filters():
            for tier in (Tier.READY, Tier.DEGRADED):
                indexes = pool.indexes(tier, suits)
                if indexes:
                    worker = self._policy(Candidates(indexes, fits), request.key, self._rng)
                    if worker is not None:
                        return name, worker
        raise NoLiveWorker(
            f"none of the {pool.count} workers of model {name!r} can take a request now", metadata={"model": name}
        )

    def pick(self, request: PickRequest, on_trouble: Callable[[], None] | None = None) -> Reservation:
        """Choose a worker and count the request as its load; errors as `choose`.

        The caller must `release` the reservation on every exit.

        Args:
            on_trouble: as `Registry.reserve`; given by those who carry the request themselves.
        """
        _, worker = self.choose(request)
        return self.registry.reserve(worker, on_trouble)

    def _with_adapter(self, request: PickRequest) -> tuple[str, Pool]:
        """The name of the model, and the workers of the adapter."""
        name, _ = self.registry.pool(request.model)
        try:
            _, pool = self.registry.pool(request.adapter)
        except ModelNotFound:
            raise AdapterNotFound(
                f"no worker of model {name!r} has an adapter {request.adapter[:128]!r}", metadata={"model": name}
            ) from None
        return name, pool
