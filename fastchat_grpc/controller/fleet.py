"""What the registry holds: workers, reservations and changes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import TYPE_CHECKING

from fastchat_grpc.controller.breaker import Breaker, BreakerState
from fastchat_grpc.core import Capability, Load, ModelInfo, WorkerState

if TYPE_CHECKING:
    from fastchat_grpc.controller.registry import Registry


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


@dataclass(frozen=True, slots=True)
class Drain:
    """An order to drain; `timeout_s` None: the worker's own drain timeout."""

    timeout_s: float | None


class Tier(Enum):
    """Whether a worker is picked: at all, only where no READY one is left, or by choice."""

    NONE = 0
    DEGRADED = 1
    READY = 2


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
    """A live worker, owned and changed by the registry alone.

    Attributes that readers may use: `spec`, `load`, `lease_id`, `heartbeat_at`, `suspect`, `drain`,
    `tier`, `removed` (None while it is registered), `reserved_count`, `score`, `weight`, `affinity`.
    """

    __slots__ = (
        "affinity",
        "breaker",
        "deadline",
        "drain",
        "heartbeat_at",
        "lease_id",
        "load",
        "others",
        "picks",
        "probe_ends",
        "probing",
        "recovered_at",
        "removed",
        "reserved",
        "score",
        "spec",
        "suspect",
        "terms",
        "tier",
        "timer_at",
        "unreachable",
        "watched",
        "weight",
    )

    def __init__(self, spec: WorkerSpec, lease_id: str, load: Load, now: float, terms: LeaseTerms) -> None:
        self.spec = spec
        self.lease_id = lease_id
        self.load = load
        self.terms = terms
        self.heartbeat_at = now
        self.recovered_at = now  # time of the last evidence of life
        self.deadline = now + terms.time_to_live_s
        self.timer_at = -math.inf  # no lease timer
        self.suspect = False
        self.unreachable = False
        self.drain: Drain | None = None
        self.breaker: Breaker | None = None
        self.probing = False
        self.probe_ends = 0.0
        self.removed: Removal | None = None
        self.tier = Tier.NONE
        self.weight = spec.weight
        self.affinity = int.from_bytes(blake2b(spec.worker_id.encode(), digest_size=7).digest(), "big") % (2**31 - 1)
        self.reserved = 0
        self.picks: deque[float] | None = None  # times of picks whose end nobody tells us
        self.others = load.queue_length
        self.watched: set[Reservation] | None = None  # reservations that want to hear of trouble
        self.score = 0.0
        self.update_score()

    @property
    def reserved_count(self) -> int:
        """Requests that this controller has sent there and that have not ended, as far as it knows."""
        return self.reserved + (len(self.picks) if self.picks else 0)

    def update_score(self) -> None:
        """Queue length as best known, over weight: others' requests as last reported, ours as they are."""
        self.score = (self.others + self.reserved + (len(self.picks) if self.picks else 0)) / self.weight

    def model(self, name: str) -> ModelInfo | None:
        """The model of that name, if it is served here."""
        for model in self.spec.models:
            if model.name == name:
                return model
        return None

    def can(self, model: str, capability: Capability) -> bool:
        """Whether the worker's model has a capability."""
        info = self.model(model)
        return info is not None and capability in info.capabilities

    def natural_tier(self) -> Tier:
        """The tier that follows from everything known of the worker."""
        if self.removed is not None or self.drain is not None or self.suspect or self.unreachable:
            return Tier.NONE
        if self.breaker is not None:
            if self.breaker.state is BreakerState.OPEN:
                return Tier.NONE
            if self.breaker.state is BreakerState.HALF_OPEN and self.probing:
                return Tier.NONE
        match self.load.state:
            case WorkerState.SERVING:
                return Tier.READY
            case WorkerState.DEGRADED:
                return Tier.DEGRADED
        return Tier.NONE


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the registry. `removal` is set where `kind` is REMOVED."""

    kind: ChangeKind
    worker: Worker
    removal: Removal | None = None


class Reservation:
    """A picked worker, counted as its load until `release`. Release it on every exit; twice is harmless.

    Args:
        on_trouble: called once at most, when the worker has expired, was replaced or does not progress:
            what runs there had better go on elsewhere. Not called when it leaves in good order.
    """

    __slots__ = ("_on_trouble", "_registry", "probe", "released", "worker")

    def __init__(self, registry: Registry, worker: Worker, on_trouble: Callable[[], None] | None, probe: bool) -> None:
        self._registry = registry
        self._on_trouble = on_trouble
        self.worker = worker
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
            self._registry.release(self)

    def succeeded(self) -> None:
        """The worker answered: tell its breaker."""
        self._registry.succeeded(self.worker)

    def failed(self) -> None:
        """The request failed through the worker's fault: tell its breaker."""
        self._registry.failed(self.worker)

    def suspect(self) -> None:
        """Send nothing more there until the worker's next heartbeat."""
        self._registry.suspect(self.worker)

    def trouble(self) -> None:
        """Called by the registry."""
        if self._on_trouble is not None and not self.released:
            callback, self._on_trouble = self._on_trouble, None
            callback()

    @property
    def watches(self) -> bool:
        """Whether somebody wants to hear of trouble."""
        return self._on_trouble is not None
