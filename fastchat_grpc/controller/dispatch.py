"""Dispatch: which worker gets the next request. Policies are pure functions over candidates."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from operator import attrgetter
from typing import TypeVar

from fastchat_grpc.config import DispatchMethod
from fastchat_grpc.controller.fleet import Reservation, Worker
from fastchat_grpc.controller.pools import Pool
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.core import Capability
from fastchat_grpc.errors import NoLiveWorker

AFFINITY_SLACK = 1.25
"""prefix_affinity passes a worker over that is this much above the mean load (bounded-load hashing)."""

TRIES = 3
"""shortest_queue looks so often for one of several equals by chance, before it lists them all."""

PRIME = 2**31 - 1
"""Multiplying by a key's hash modulo a prime ranks the workers anew for each key. Small numbers are quick."""

_score = attrgetter("score")
_weight = attrgetter("weight")

Policy = Callable[[Sequence[Worker], str, random.Random], Worker]


def shortest_queue(candidates: Sequence[Worker], key: str, rng: random.Random) -> Worker:
    """The worker with the shortest queue over weight; among equals, any."""
    scores = list(map(_score, candidates))
    lowest = min(scores)
    count = len(scores)
    # Where many are equal, as in a fleet that is idle, one of them is found at once by trying; and trying
    # favours none of them.
    for _ in range(TRIES):
        place = int(rng.random() * count)
        if scores[place] == lowest:
            return candidates[place]
    return candidates[rng.choice([place for place, score in enumerate(scores) if score == lowest])]


def lottery(candidates: Sequence[Worker], key: str, rng: random.Random) -> Worker:
    """Any worker, with a chance in proportion to its weight."""
    return rng.choices(candidates, weights=list(map(_weight, candidates)))[0]


def power_of_two(candidates: Sequence[Worker], key: str, rng: random.Random) -> Worker:
    """The shorter queue of two workers taken at random: O(1) (Mitzenmacher, 2001)."""
    count = len(candidates)
    if count == 1:
        return candidates[0]
    first = int(rng.random() * count)
    second = int(rng.random() * (count - 1))
    second += second >= first
    a, b = candidates[first], candidates[second]
    return a if a.score < b.score or (a.score == b.score and rng.random() < 0.5) else b


def prefix_affinity(candidates: Sequence[Worker], key: str, rng: random.Random) -> Worker:
    """The same worker for the same key, while its load is not far above the mean.

    Rendezvous hashing, so that controllers agree without talking and a worker that leaves moves only
    its own keys; with bounded loads (Mirrokni et al., 2018). Without a key: shortest_queue.
    """
    if not key:
        return shortest_queue(candidates, key, rng)
    mean = sum(map(_score, candidates)) / len(candidates)
    bound = AFFINITY_SLACK * (mean + 1)
    fitting = [worker for worker in candidates if worker.score <= bound] or candidates
    salt = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") % PRIME or 1
    ranks = [worker.affinity * salt % PRIME for worker in fitting]
    return fitting[ranks.index(max(ranks))]


POLICIES: dict[DispatchMethod, Policy] = {
    DispatchMethod.SHORTEST_QUEUE: shortest_queue,
    DispatchMethod.LOTTERY: lottery,
    DispatchMethod.POWER_OF_TWO: power_of_two,
    DispatchMethod.PREFIX_AFFINITY: prefix_affinity,
}

T = TypeVar("T")


class Dispatcher:
    """Picks workers by one policy. Used by the relay, by GetWorkerAddress and by the gateway's picker."""

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

    def choose(
        self, model: str, key: str = "", excluded: Collection[str] = (), needs: Capability | None = None
    ) -> tuple[str, Worker]:
        """The model's name and a worker for one request of it, without a reservation.

        Args:
            model: name of the model; empty for the only one.
            key: what prefix_affinity groups by.
            excluded: worker ids or instance ids not to pick.
            needs: what the worker must be able to do.

        Raises:
            ModelNotFound, NoLiveWorker, InvalidArgument: as `Registry.pool`; NoLiveWorker also where
            every live worker is excluded, draining, suspect or failing.
        """
        name, pool = self.registry.pool(model)
        candidates = self.candidates(pool, name, excluded, needs)
        if not candidates:
            raise NoLiveWorker(
                f"none of the {len(pool.members)} workers of model {name!r} can take a request now",
                metadata={"model": name},
            )
        return name, self._policy(candidates, key, self._rng)

    def pick(
        self,
        model: str,
        key: str = "",
        excluded: Collection[str] = (),
        needs: Capability | None = None,
        on_trouble: Callable[[], None] | None = None,
    ) -> Reservation:
        """Choose a worker and count the request as its load; arguments and errors as `choose`.

        The caller must `release` the reservation on every exit.
        """
        _, worker = self.choose(model, key, excluded, needs)
        return self.registry.reserve(worker, on_trouble)

    def candidates(
        self, pool: Pool, model: str, excluded: Collection[str] = (), needs: Capability | None = None
    ) -> Sequence[Worker]:
        """The workers of a pool that may be picked: the READY ones or, where there is none, the DEGRADED."""
        for tier in (pool.ready.items, pool.degraded.items):
            found: Sequence[Worker] = tier
            if excluded or needs is not None:
                found = [
                    worker
                    for worker in tier
                    if worker.spec.instance_id not in excluded
                    and worker.spec.worker_id not in excluded
                    and (needs is None or worker.can(model, needs))
                ]
            if found:
                return found
        return ()
