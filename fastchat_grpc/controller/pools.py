"""Workers by model, in the tiers that dispatch picks from."""

from __future__ import annotations

from collections import OrderedDict

from fastchat_grpc.controller.fleet import Tier, Worker
from fastchat_grpc.errors import InvalidArgument, ModelNotFound, NoLiveWorker

REMEMBERED = 10_000
"""Names that are remembered of what has gone; the oldest are forgotten first."""


class IndexedSet:
    """Workers in a list, for random access, with removal in constant time."""

    __slots__ = ("_index", "items")

    def __init__(self) -> None:
        self.items: list[Worker] = []
        self._index: dict[Worker, int] = {}

    def __len__(self) -> int:
        return len(self.items)

    def add(self, worker: Worker) -> None:
        if worker not in self._index:
            self._index[worker] = len(self.items)
            self.items.append(worker)

    def discard(self, worker: Worker) -> None:
        place = self._index.pop(worker, None)
        if place is None:
            return
        last = self.items.pop()
        if last is not worker:
            self.items[place] = last
            self._index[last] = place


class Pool:
    """The workers of one model."""

    __slots__ = ("degraded", "members", "ready")

    def __init__(self) -> None:
        self.members: dict[Worker, None] = {}
        self.ready = IndexedSet()
        self.degraded = IndexedSet()

    def place(self, worker: Worker, tier: Tier) -> None:
        """Move a member to where its tier puts it."""
        self.members[worker] = None
        (self.ready.add if tier is Tier.READY else self.ready.discard)(worker)
        (self.degraded.add if tier is Tier.DEGRADED else self.degraded.discard)(worker)

    def remove(self, worker: Worker) -> None:
        self.members.pop(worker, None)
        self.ready.discard(worker)
        self.degraded.discard(worker)


class Recent:
    """The last REMEMBERED names that were added."""

    __slots__ = ("_names",)

    def __init__(self) -> None:
        self._names: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        self._names[name] = None
        self._names.move_to_end(name)
        if len(self._names) > REMEMBERED:
            self._names.popitem(last=False)


class Pools:
    """A pool for each model that a live worker serves, and the names of models of before."""

    def __init__(self) -> None:
        self._pools: dict[str, Pool] = {}
        self._known = Recent()

    def join(self, worker: Worker) -> None:
        """Put a worker into the pools of its models, by its tier."""
        for model in worker.spec.models:
            self._pools.setdefault(model.name, Pool()).place(worker, worker.tier)
            self._known.add(model.name)

    def place(self, worker: Worker) -> None:
        """Move a member to where its tier now puts it."""
        for model in worker.spec.models:
            self._pools[model.name].place(worker, worker.tier)

    def leave(self, worker: Worker) -> None:
        """Take a worker out of all of its pools."""
        for model in worker.spec.models:
            pool = self._pools[model.name]
            pool.remove(worker)
            if not pool.members:
                del self._pools[model.name]

    def get(self, model: str) -> Pool | None:
        """The pool of a model; None where no live worker serves it."""
        return self._pools.get(model)

    def names(self) -> list[str]:
        """The models of live workers, in order."""
        return sorted(self._pools)

    def find(self, model: str) -> tuple[str, Pool]:
        """Name and pool of a model; an empty name means the only model of the fleet.

        Raises:
            ModelNotFound: no worker has served it.
            NoLiveWorker: it is known, but no worker is registered for it.
            InvalidArgument: the name is empty and the fleet has several models.
        """
        if not model:
            model = self._only()
        pool = self._pools.get(model)
        if pool is not None:
            return model, pool
        if model in self._known:
            raise NoLiveWorker(f"model {model!r} has no live worker now", metadata={"model": model})
        raise ModelNotFound(f"no worker has served a model {model[:128]!r}", metadata={"model": model[:128]})

    def _only(self) -> str:
        if len(self._pools) == 1:
            return next(iter(self._pools))
        if self._pools:
            raise InvalidArgument("model", f"the fleet serves {len(self._pools)} models; name one (see ListModels)")
        raise NoLiveWorker("no worker is registered")
