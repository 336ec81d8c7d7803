"""What the registry holds: workers, reservations and changes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from fastchat_grpc.controller.health import Health, Tier
from fastchat_grpc.controller.index import Candidates, ScoreIndex
from fastchat_grpc.controller.ledger import Ledger
from fastchat_grpc.controller.ring import affinity
from fastchat_grpc.core import Capability, Load, ModelInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """How a worker presents itself."""

    worker_id: str
    instance_id: str
    address: str
    models: tuple[ModelInfo, ...]
    weight: float = 1.0
    labels: Mapping[str, str] = field(default_factory=dict)
    check_heartbeat: bool = True
    version: str = ""


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """How long a lease lasts without heartbeats, and how often they should come, in seconds."""

    time_to_live_s: float
    heartbeat_interval_s: float


class ChangeKind(Enum):
    """What happened to a worker. LOAD: nothing but its figures; it is by far the most frequent."""

    ADDED = "added"
    STATE = "state"
    LOAD = "load"
    REMOVED = "removed"


class Removal(Enum):
    """Why a worker left."""

    DEREGISTERED = "deregistered"
    EXPIRED = "expired"
    REPLACED = "replaced"
    UNREACHABLE = "unreachable"


class Worker:
    """A live worker, owned and changed by the registry alone: its lease, its health and its ledger.

    Attributes that readers may use: `spec`, `health`, `ledger`, `lease_id`, `terms`, `heartbeat_at`, `tier`,
    `removed` (None while it is registered), `score`, `weight`, `affinity`, and the properties.
    """

    __slots__ = (
        "affinity",
        "deadline",
        "guarded",
        "health",
        "heartbeat_at",
        "index",
        "lease_id",
        "ledger",
        "place",
        "rank",
        "removed",
        "replicas",
        "score",
        "spec",
        "terms",
        "tier",
        "timer_at",
        "watched",
        "weight",
    )

    def __init__(
        self, spec: WorkerSpec, lease_id: str, terms: LeaseTerms, health: Health, ledger: Ledger, now: float
    ) -> None:
        self.spec = spec
        self.lease_id = lease_id
        self.terms = terms
        self.health = health
        self.ledger = ledger
        self.heartbeat_at = now
        self.deadline = now + terms.time_to_live_s
        self.timer_at = -math.inf  # no lease timer
        self.removed: Removal | None = None
        self.guarded = False  # whether it has a breaker at all: where not, a pick need not look at its health
        self.watched: set[Reservation] | None = None  # reservations that want to hear of trouble
        self.weight = spec.weight
        self.affinity = affinity(spec.worker_id)
        # Where dispatch finds it: its tier and score as they are indexed, and its places in the index.
        self.tier = Tier.NONE
        self.score = ledger.score
        self.replicas: Replicas | None = None
        self.index: ScoreIndex[Worker] | None = None
        self.place = 0
        self.rank = 0

    @property
    def load(self) -> Load:
        """Its figures, as it last reported them."""
        return self.ledger.load

    @property
    def reserved_count(self) -> int:
        """Requests that this controller has sent there and that have not ended, as far as it knows."""
        return self.ledger.reserved

    @property
    def recovered_at(self) -> float:
        """Time of the last evidence of life, by the registry's clock."""
        return self.health.recovered_at

    def model(self, name: str) -> ModelInfo | None:
        """The model of that name, if it is served here; its sizes may be those of another replica."""
        return self.replicas.models.get(name) if self.replicas is not None else None

    def can(self, model: str, capability: Capability) -> bool:
        """Whether the worker's model has a capability."""
        info = self.model(model)
        return info is not None and capability in info.capabilities


Served = tuple[str, frozenset[Capability], str, str, str]
"""What tells a model from another for dispatch: name, capabilities, fingerprint, backend and base model."""


def served(model: ModelInfo) -> Served:
    """What dispatch goes by. Sizes and the like are none of it: a context length may differ from worker to worker."""
    return model.name, model.capabilities, model.fingerprint, model.backend, model.base_model


class Replicas:
    """Workers that serve the same models, as far as dispatch goes. What one of them can do, all can."""

    __slots__ = ("_others", "_variants", "candidates", "degraded", "key", "listed", "members", "models", "ready")

    def __init__(self, key: frozenset[Served], models: Sequence[ModelInfo]) -> None:
        self.key = key
        self.listed = tuple(models)
        self.models = {model.name: model for model in models}
        """As the first member serves them."""
        self._others: dict[tuple[ModelInfo, ...], tuple[ModelInfo, ...]] = {}  # ways to serve them but `listed`
        self._variants: dict[int, tuple[tuple[ModelInfo, ...], int]] = {}  # by id: a way, and how many serve so
        self.members: dict[Worker, None] = {}
        self.ready: ScoreIndex[Worker] = ScoreIndex()
        self.degraded: ScoreIndex[Worker] = ScoreIndex()
        self.candidates = Candidates([self.ready])
        """All that are picked by choice."""

    def index(self, tier: Tier) -> ScoreIndex[Worker] | None:
        """The members of a tier that can be picked."""
        return self.ready if tier is Tier.READY else self.degraded if tier is Tier.DEGRADED else None

    def share(self, spec: WorkerSpec) -> WorkerSpec:
        """The same with what equals others held once: ten thousand workers serve fifty models."""
        models = tuple([shared if (shared := self.models[model.name]) == model else model for model in spec.models])
        return WorkerSpec(
            worker_id=spec.worker_id,
            instance_id=spec.instance_id,
            address=spec.address,
            models=self.listed if models == self.listed else self._others.setdefault(models, models),
            weight=spec.weight,
            labels={sys.intern(key): sys.intern(value) for key, value in spec.labels.items()},
            check_heartbeat=spec.check_heartbeat,
            version=sys.intern(spec.version),
        )

    def join(self, worker: Worker) -> bool:
        """Take a worker in whose spec `share` gave. True: nobody else serves the models just like it."""
        self.members[worker] = None
        models = worker.spec.models
        _, count = self._variants.get(id(models), (models, 0))
        self._variants[id(models)] = models, count + 1
        return not count

    def leave(self, worker: Worker) -> bool:
        """Take a member out. True: nobody else serves the models just like it."""
        del self.members[worker]
        models, count = self._variants.pop(id(worker.spec.models))
        if count > 1:
            self._variants[id(models)] = models, count - 1
            return False
        self._others.pop(models, None)
        return True

    def described(self, name: str) -> list[ModelInfo]:
        """A model as the members serve it, each way once."""
        return [model for models, _ in self._variants.values() for model in models if model.name == name]

    def serves(self, model: str, needs: frozenset[Capability], fingerprint: str = "") -> bool:
        """Whether a model is served here with all capabilities that are needed, and not with other weights."""
        info = self.models.get(model)
        if info is None or not needs <= info.capabilities:
            return False
        known: str = getattr(info, "fingerprint", "")
        return not fingerprint or not known or known == fingerprint


class Change(NamedTuple):
    """One change of the registry. `removal` is set where `kind` is REMOVED."""

    kind: ChangeKind
    worker: Worker
    removal: Removal | None = None


class Keeper(Protocol):
    """Who keeps the books on reservations: the registry."""

    def release(self, reservation: Reservation) -> None: ...
    def answered(self, reservation: Reservation) -> None: ...
    def succeeded(self, reservation: Reservation) -> None: ...
    def failed(self, worker: Worker) -> None: ...
    def lost(self, worker: Worker) -> None: ...
    def suspect(self, worker: Worker) -> None: ...


class Reservation:
    """A picked worker, counted as its load until `release`. Release it on every exit; twice is harmless.

    Args:
        on_trouble: called once at most, when the worker has expired, was replaced or does not progress:
            what runs there had better go on elsewhere. Not called when it leaves in good order.
        mark: what the worker's ledger gave for it.
        probe: whether it is the one request that a half-open breaker lets through.
    """

    __slots__ = ("_keeper", "_on_trouble", "mark", "probe", "released", "worker")

    def __init__(
        self, keeper: Keeper, worker: Worker, on_trouble: Callable[[], None] | None, mark: int, probe: bool
    ) -> None:
        self._keeper = keeper
        self._on_trouble = on_trouble
        self.worker = worker
        self.mark = mark
        self.probe = probe
        self.released = False

    @property
    def address(self) -> str:
        """host:port of the worker."""
        return self.worker.spec.address

    @property
    def instance_id(self) -> str:
        """Identity of the worker's process."""
        return self.worker.spec.instance_id

    def release(self) -> None:
        """The request has ended there."""
        if not self.released:
            self.released = True
            self._keeper.release(self)

    def answered(self) -> None:
        """The first of the answer has come."""
        if self.probe:
            self._keeper.answered(self)

    def succeeded(self) -> None:
        """The request has run to its good end: tell the worker's breaker. A first token is no end."""
        self._keeper.succeeded(self)

    def failed(self) -> None:
        """The request failed through the worker's fault: tell its breaker."""
        self._keeper.failed(self.worker)

    def lost(self) -> None:
        """The worker went away, or the path to it: tell its breaker, and send nothing more there for now."""
        self._keeper.lost(self.worker)

    def suspect(self) -> None:
        """Send nothing more there until the worker's next heartbeat."""
        self._keeper.suspect(self.worker)

    def trouble(self) -> None:
        """Called by the registry."""
        if self._on_trouble is not None and not self.released:
            callback, self._on_trouble = self._on_trouble, None
            callback()
