"""Workers by model: replicas of the same models together, in the tiers that dispatch picks from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastchat_grpc.controller.fleet import Replicas, Served, Worker, served
from fastchat_grpc.controller.health import Tier
from fastchat_grpc.controller.index import ScoreIndex
from fastchat_grpc.core import ModelInfo
from fastchat_grpc.errors import InvalidArgument, ModelNotFound, NoLiveWorker, Starting

REMEMBERED = 200_000
"""Names that are remembered of what has gone; the oldest are forgotten first."""
STARTING_RETRY_S = 1.0
JUST_STARTED = "the controller has just started and does not know its fleet yet"
NOBODY_YET = "no worker is registered; one that has just started loads its model first, which its log tells of"


class FleetModel(NamedTuple):
    """A model as the fleet serves it: what a caller can count on with any worker, and how many there are."""

    info: ModelInfo
    worker_count: int


class Pool:
    """The workers of one model."""

    __slots__ = ("_info", "count", "entry", "name", "replicas", "sole")

    def __init__(self, name: str) -> None:
        self.name = name
        self.replicas: list[Replicas] = []
        self.sole: Replicas | None = None
        """Its replicas, where all workers of the model are of one kind."""
        self.count = 0
        """Live workers."""
        self.entry: FleetModel | None = None
        """Its line of the catalogue; None: to be made anew."""
        self._info: ModelInfo | None = None

    @property
    def members(self) -> list[Worker]:
        """All workers, in no order."""
        return [worker for replicas in self.replicas for worker in replicas.members]

    @property
    def info(self) -> ModelInfo:
        """The model as any of the workers serves it."""
        if self._info is None:
            self._info = merge_models([info for replicas in self.replicas for info in replicas.described(self.name)])
        return self._info

    def describe(self) -> FleetModel:
        """Its line of the catalogue."""
        self.entry = FleetModel(self.info, self.count)
        return self.entry

    def resize(self, by: int, *, anew: bool) -> None:
        """So many workers more, or fewer. `anew`: none served the models just like this, or none does any more."""
        self.count += by
        self.entry = None
        if anew:
            self._info = None

    @property
    def pickable(self) -> bool:
        """Whether there is a worker that can be picked."""
        return any(replicas.ready.items or replicas.degraded.items for replicas in self.replicas)

    @property
    def recovering(self) -> bool:
        """Whether there is a worker whose next sign of life may make it pickable."""
        return any(
            worker.health.recovering
            for replicas in self.replicas
            if len(replicas.members) > len(replicas.ready) + len(replicas.degraded)
            for worker in replicas.members
        )

    def tier(self, tier: Tier) -> list[Worker]:
        """The workers of a tier that can be picked, in no order."""
        return [worker for index in self.indexes(tier) for worker in index.items]

    def indexes(self, tier: Tier, suits: Callable[[Replicas], bool] | None = None) -> list[ScoreIndex[Worker]]:
        """The workers of a tier that can be picked, in their indexes; of those replicas alone that suit."""
        found = []
        for replicas in self.replicas:
            index = replicas.ready if tier is Tier.READY else replicas.degraded
            if index.items and (suits is None or suits(replicas)):
                found.append(index)
        return found

    def add(self, replicas: Replicas) -> None:
        self.replicas.append(replicas)
        self._regroup()

    def remove(self, replicas: Replicas) -> None:
        self.replicas.remove(replicas)
        self._regroup()

    def _regroup(self) -> None:
        self.sole = self.replicas[0] if len(self.replicas) == 1 else None
        self._info = self.entry = None


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
        self.by_name: dict[str, Pool] = {}
        """The models that live workers serve. Not to be changed."""
        self._replicas: dict[frozenset[Served], Replicas] = {}
        self._gone = Recent()
        self._names: list[str] | None = None
        self._catalogue: Sequence[FleetModel] | None = None

    def replicas(self, models: Sequence[ModelInfo]) -> Replicas:
        """Those that serve these models; with no members, if there were none. To be joined at once."""
        key = frozenset(map(served, models))
        replicas = self._replicas.get(key)
        if replicas is None:
            replicas = self._replicas[key] = Replicas(key, models)
            for name in replicas.models:
                self._pool(name).add(replicas)
        return replicas

    def join(self, worker: Worker, replicas: Replicas) -> None:
        """Put a worker beside its replicas, by its tier."""
        anew = replicas.join(worker)
        for name in replicas.models:
            self.by_name[name].resize(1, anew=anew)
        self._catalogue = None
        worker.replicas = replicas
        self.place(worker)

    def place(self, worker: Worker) -> None:
        """Move a member to where its tier now puts it."""
        assert worker.replicas is not None
        index = worker.replicas.index(worker.tier)
        if index is worker.index:
            return
        if worker.index is not None:
            worker.index.discard(worker)
        if index is not None:
            index.add(worker)

    def leave(self, worker: Worker) -> None:
        """Take a worker out of all of its pools."""
        replicas = worker.replicas
        assert replicas is not None
        if worker.index is not None:
            worker.index.discard(worker)
        anew = replicas.leave(worker)
        for name in replicas.models:
            self.by_name[name].resize(-1, anew=anew)
        self._catalogue = None
        if not replicas.members:
            self._end(replicas)

    def names(self) -> Sequence[str]:
        """The models of live workers, in order. Not to be changed."""
        if self._names is None:
            self._names = sorted(self.by_name)
        return self._names

    def catalogue(self) -> Sequence[FleetModel]:
        """The models of live workers, by name. Made anew only when workers have come or gone."""
        if self._catalogue is None:
            listed = map(self.by_name.__getitem__, self.names())
            self._catalogue = tuple([pool.entry or pool.describe() for pool in listed])
        return self._catalogue

    def groups(self) -> Sequence[Replicas]:
        """Replicas of the same models, in no order. May be called in any thread."""
        return list(self._replicas.values())

    def find(self, model: str, *, young: bool = False, sure: bool = True) -> tuple[str, Pool]:
        """Name and pool of a model; an empty name means the only model of the fleet.

        Args:
            young: whether workers of before may not have come back yet, though they are there.
            sure: whether all that were there before have had time to come back.

        Raises:
            Starting: it is not known, which means nothing yet.
            ModelNotFound: no worker has served it.
            NoLiveWorker: no worker is registered for it, and it is known, or it may be: no worker is there at all,
                or the registry is not sure yet.
            InvalidArgument: the name is empty and the fleet has several models.
        """
        if not model and self.by_name:
            model = self._only()
        pool = self.by_name.get(model)
        if pool is not None:
            return model, pool
        metadata = {"model": model[:128]}
        if model in self._gone:
            raise NoLiveWorker(f"model {model[:128]!r} has no live worker now", metadata=metadata)
        if young:
            raise Starting(JUST_STARTED, metadata=metadata, retry_after_s=STARTING_RETRY_S)
        if not self.by_name:
            raise NoLiveWorker(NOBODY_YET, metadata=metadata)
        if not sure:
            raise NoLiveWorker(
                f"no worker has served a model {model[:128]!r} since the controller started, a short while ago",
                metadata=metadata,
            )
        raise ModelNotFound(f"no worker has served a model {model[:128]!r}", metadata=metadata)

    def _only(self) -> str:
        if len(self.by_name) > 1:
            raise InvalidArgument("model", f"the fleet serves {len(self.by_name)} models; name one (see ListModels)")
        return next(iter(self.by_name))

    def _pool(self, name: str) -> Pool:
        pool = self.by_name.get(name)
        if pool is None:
            pool = self.by_name[name] = Pool(name)
            self._names = None
        return pool

    def _end(self, replicas: Replicas) -> None:
        """The last of some replicas has left."""
        del self._replicas[replicas.key]
        for name in replicas.models:
            pool = self.by_name[name]
            pool.remove(replicas)
            if not pool.replicas:
                del self.by_name[name]
                self._names = None
                self._gone.add(name)


def merge_models(models: Sequence[ModelInfo]) -> ModelInfo:
    """One description of a model that several workers serve: what a caller can count on with any of them."""
    distinct = list(dict.fromkeys(models))
    first = distinct[0]
    if len(distinct) == 1:
        return first
    return ModelInfo(
        name=first.name,
        context_length=min(model.context_length for model in distinct),
        capabilities=frozenset.intersection(*(model.capabilities for model in distinct)),
        base_model=first.base_model,
        backend=",".join(sorted({model.backend for model in distinct})),
        embedding_size=first.embedding_size if len({model.embedding_size for model in distinct}) == 1 else 0,
        vocabulary_size=first.vocabulary_size if len({model.vocabulary_size for model in distinct}) == 1 else 0,
        fingerprint=_shared([model.fingerprint for model in distinct]),
        revision=_shared([model.revision for model in distinct]),
        quantization=_shared([model.quantization for model in distinct]),
        tokenizer_fingerprint=_shared([model.tokenizer_fingerprint for model in distinct]),
        max_output_length=min(lengths) if all(lengths := [model.max_output_length for model in distinct]) else 0,
    )


def _shared(texts: Sequence[str]) -> str:
    """What all say alike; empty where they differ."""
    return texts[0] if len(set(texts)) == 1 else ""
