"""The registry: which workers live, what they serve, how loaded they are. Pure: clock and ids are injected.

State is soft: a new registry is empty, and registrations and heartbeats fill it. All calls are made on
one event loop; none blocks, and none but the listings costs more than the models of one worker.
"""

from __future__ import annotations

import heapq
import itertools
import math
import secrets
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from time import monotonic

from fastchat_grpc.config import BreakerConfig, LeaseConfig
from fastchat_grpc.controller.breaker import Breaker, BreakerState
from fastchat_grpc.controller.fleet import (
    Change,
    ChangeKind,
    Drain,
    LeaseTerms,
    Removal,
    Reservation,
    Tier,
    Worker,
    WorkerSpec,
)
from fastchat_grpc.controller.pools import REMEMBERED, Pool, Pools, Recent
from fastchat_grpc.core import Load, ModelInfo
from fastchat_grpc.errors import (
    InstanceReplaced,
    LeaseNotFound,
    WorkerNotFound,
)

SETTLE_S = 0.25
"""A pick this old shows in the worker's own figures."""
STALL_S = 1.0
"""A gap between two looks at the clock that is this long was the controller's own: nobody expires for it."""

DEFAULT_LEASE = LeaseConfig()
DEFAULT_BREAKER = BreakerConfig()

Listener = Callable[[Change], None]


class Registry:
    """Workers by id and by lease, and a pool of candidates per model.

    Args:
        lease: interval and time to live, and the rate of heartbeats above which they are scaled up.
        clock: monotonic seconds.
        new_id: makes lease ids; they are secrets, since who knows one can end the lease.
    """

    def __init__(
        self,
        lease: LeaseConfig = DEFAULT_LEASE,
        breaker: BreakerConfig = DEFAULT_BREAKER,
        *,
        clock: Callable[[], float] = monotonic,
        new_id: Callable[[], str] = lambda: secrets.token_hex(16),
    ) -> None:
        self._config = lease
        self._breaker_config = breaker
        self._clock = clock
        self._new_id = new_id
        self._workers: dict[str, Worker] = {}
        self._leases: dict[str, Worker] = {}
        self._pools = Pools()
        self._replaced = Recent()
        self._interned: dict[ModelInfo, ModelInfo] = {}
        self._timers: list[tuple[float, int, Worker]] = []
        self._timer_ids = itertools.count()
        self._listeners: dict[int, Listener] = {}
        self._listener_ids = itertools.count()
        self._looked_at = clock()
        self._grace_until = 0.0
        self.terms = LeaseTerms(lease.time_to_live_s, lease.heartbeat_interval_s)

    # ------------------------------------------------------------------------------- leases

    def register(self, spec: WorkerSpec, load: Load) -> Worker:
        """Add a worker, or replace its earlier self. The same instance keeps its reservations.

        Raises:
            InstanceReplaced: a newer instance has taken this one's place before.
        """
        self.expire()
        worker = self._workers.get(spec.worker_id)
        if worker is not None and worker.spec.instance_id != spec.instance_id and spec.instance_id in self._replaced:
            raise InstanceReplaced(
                f"worker {spec.worker_id!r} was taken over by a newer process; "
                "two workers must not share a worker id (set --worker-id)"
            )
        spec = self._intern(spec)
        if worker is not None and worker.spec.instance_id == spec.instance_id:
            return self._renew(worker, spec, load)
        if worker is not None:
            self._replaced.add(worker.spec.instance_id)
            self._remove(worker, Removal.REPLACED)
        worker = Worker(spec, self._new_id(), load, self._clock(), self._terms_for(len(self._workers) + 1))
        self._workers[spec.worker_id] = worker
        self._leases[worker.lease_id] = worker
        self._join(worker)
        if spec.check_heartbeat:
            self._set_lease_timer(worker)
        self._notify(Change(ChangeKind.ADDED, worker))
        return worker

    def heartbeat(self, lease_id: str, load: Load) -> Worker:
        """Renew a lease. Raises LeaseNotFound if it is unknown, expired or replaced."""
        self.expire()
        worker = self._leases.get(lease_id)
        if worker is None:
            raise LeaseNotFound("the lease is unknown or has expired; register again")
        self._report(worker, load)
        return worker

    def deregister(self, lease_id: str) -> None:
        """End a lease in good order: what runs there goes on. An unknown lease is no error."""
        worker = self._leases.get(lease_id)
        if worker is not None:
            self._remove(worker, Removal.DEREGISTERED)

    def drop(self, worker: Worker) -> None:
        """Remove a worker that does not answer."""
        if worker.removed is None:
            self._remove(worker, Removal.UNREACHABLE)

    def drain(self, worker_id: str, timeout_s: float | None) -> Worker:
        """Stop new work on a worker; its heartbeats tell it to drain. Raises WorkerNotFound."""
        worker = self.worker(worker_id)
        worker.drain = Drain(timeout_s)
        self._settle(worker)
        return worker

    def expire(self) -> None:
        """Act on every timer that is due: remove expired leases, end cooldowns. Cheap when none is."""
        now = self._clock()
        if now - self._looked_at > STALL_S:
            # The process was stopped or starved; heartbeats wait in its sockets. Read them first.
            self._grace_until = now + self.terms.heartbeat_interval_s * 1.5
        self._looked_at = now
        timers = self._timers
        while timers and timers[0][0] <= now:
            when, _, worker = heapq.heappop(timers)
            if worker.removed is None:
                self._on_timer(worker, when, now)

    # ----------------------------------------------------------------------------- dispatch

    def pool(self, model: str) -> tuple[str, Pool]:
        """Name and pool of a model, and errors, as `Pools.find`."""
        self.expire()
        return self._pools.find(model)

    def reserve(self, worker: Worker, on_trouble: Callable[[], None] | None = None) -> Reservation:
        """Count one request as load of a worker until it is released."""
        reservation = Reservation(self, worker, on_trouble, probe=self._begin_probe(worker))
        worker.reserved += 1
        worker.update_score()
        if on_trouble is not None:
            if worker.watched is None:
                worker.watched = set()
            worker.watched.add(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """End a reservation; called by `Reservation.release` alone."""
        worker = reservation.worker
        worker.reserved -= 1
        worker.update_score()
        if worker.watched is not None:
            worker.watched.discard(reservation)
        if reservation.probe and worker.probing:
            worker.probing = False  # it ended without a verdict: another may probe
            self._settle(worker)

    def count_pick(self, worker: Worker) -> None:
        """Count a pick whose end nobody will tell, until the worker's figures show it."""
        now = self._clock()
        if worker.picks is None:
            worker.picks = deque()
        if not worker.spec.check_heartbeat:
            self._forget_picks(worker, now - worker.terms.heartbeat_interval_s)
        worker.picks.append(now)
        worker.update_score()
        if self._begin_probe(worker):
            worker.probe_ends = now + self._breaker_config.cooldown_s
            self._set_timer(worker, worker.probe_ends)

    def succeeded(self, worker: Worker) -> None:
        """A worker answered a request."""
        breaker = worker.breaker
        if breaker is not None:
            was = breaker.state
            breaker.success(self._clock())
            if breaker.state is not was:
                worker.probing = False
                self._settle(worker)

    def failed(self, worker: Worker) -> None:
        """A request failed through a worker's fault."""
        if worker.removed is not None:
            return
        if worker.breaker is None:
            worker.breaker = Breaker(self._breaker_config)
        worker.breaker.failure(self._clock())
        if worker.breaker.state is BreakerState.OPEN:
            worker.probing = False
            self._set_timer(worker, worker.breaker.ready_at)
            self._settle(worker)

    def suspect(self, worker: Worker) -> None:
        """A dispatch failed: nothing more goes there until the next heartbeat."""
        worker.suspect = True
        if not worker.spec.check_heartbeat:  # no heartbeat will clear it; time does
            worker.deadline = self._clock() + worker.terms.time_to_live_s
            self._set_timer(worker, worker.deadline)
        self._settle(worker)

    def full(self, worker: Worker) -> None:
        """A worker refused a request because its queue is full: believe that until its next heartbeat."""
        load = worker.load
        worker.others = max(worker.others, load.max_running + load.max_waiting - worker.reserved)
        worker.update_score()

    def recovering(self, model: str) -> bool:
        """Whether a worker of a model may be back at its next heartbeat."""
        pool = self._pools.get(model)
        return pool is not None and any(worker.suspect or worker.unreachable for worker in pool.members)

    def at(self, address: str) -> Sequence[Worker]:
        """The live workers that advertise an address."""
        return [worker for worker in self._workers.values() if worker.spec.address == address]

    def set_reachable(self, worker: Worker, reachable: bool) -> None:
        """Tell whether the controller's own connection to the worker stands."""
        if worker.unreachable is reachable:
            worker.unreachable = not reachable
            if reachable:
                worker.recovered_at = self._clock()
            self._settle(worker)

    # ------------------------------------------------------------------------------- readers

    def __len__(self) -> int:
        return len(self._workers)

    def worker(self, worker_id: str) -> Worker:
        """A live worker by id. Raises WorkerNotFound."""
        self.expire()
        worker = self._workers.get(worker_id)
        if worker is None:
            raise WorkerNotFound(
                f"no worker {worker_id[:128]!r} is registered", metadata={"worker_id": worker_id[:128]}
            )
        return worker

    def workers(self, model: str = "") -> Sequence[Worker]:
        """The live workers, ordered by id; with a model, those that serve it."""
        self.expire()
        pool = self._pools.get(model)
        found: Iterable[Worker] = self._workers.values() if not model else pool.members if pool is not None else ()
        return sorted(found, key=lambda worker: worker.spec.worker_id)

    def models(self) -> Sequence[str]:
        """Names of the models that live workers serve, in order."""
        self.expire()
        return self._pools.names()

    def heartbeat_age_s(self, worker: Worker) -> float:
        """Seconds since a worker's last heartbeat."""
        return self._clock() - worker.heartbeat_at

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` at every change, at once and in order; the returned function ends that.

        A listener must be quick, must not raise and must not change the registry.
        """
        number = next(self._listener_ids)
        self._listeners[number] = listener

        def unsubscribe() -> None:
            self._listeners.pop(number, None)

        return unsubscribe

    # ------------------------------------------------------------------------------- inside

    def _renew(self, worker: Worker, spec: WorkerSpec, load: Load) -> Worker:
        """The same process registers again: perhaps its models changed, perhaps an answer was lost."""
        del self._leases[worker.lease_id]
        worker.lease_id = self._new_id()
        self._leases[worker.lease_id] = worker
        self._pools.leave(worker)
        worker.spec, worker.weight = spec, spec.weight
        self._join(worker)
        self._report(worker, load)
        self._notify(Change(ChangeKind.STATE, worker))
        return worker

    def _report(self, worker: Worker, load: Load) -> None:
        """Take a worker's figures, and with them its word that it lives."""
        now = self._clock()
        stalled = load.state is not worker.load.state and load.state.value == "degraded"
        worker.load = load
        worker.heartbeat_at = worker.recovered_at = now
        worker.suspect = False
        worker.terms = self.terms
        worker.deadline = now + worker.terms.time_to_live_s
        if worker.deadline < worker.timer_at:
            self._set_lease_timer(worker)  # the interval has shrunk with the fleet
        if worker.picks:
            self._forget_picks(worker, now - SETTLE_S)
        worker.others = max(0, load.queue_length - worker.reserved)
        worker.update_score()
        if not self._settle(worker):
            self._notify(Change(ChangeKind.LOAD, worker))
        if stalled:
            self._trouble(worker)

    def _settle(self, worker: Worker) -> bool:
        """Put a worker into the pools that its tier asks for; True if that changed."""
        tier = worker.natural_tier()
        if tier is worker.tier:
            return False
        worker.tier = tier
        if worker.removed is None:
            self._pools.place(worker)
            self._notify(Change(ChangeKind.STATE, worker))
        return True

    def _remove(self, worker: Worker, removal: Removal) -> None:
        worker.removed = removal
        worker.tier = Tier.NONE
        del self._workers[worker.spec.worker_id]
        del self._leases[worker.lease_id]
        self._pools.leave(worker)
        self.terms = self._terms_for(len(self._workers))
        self._notify(Change(ChangeKind.REMOVED, worker, removal))
        if removal is not Removal.DEREGISTERED:
            self._trouble(worker)

    def _trouble(self, worker: Worker) -> None:
        for reservation in list(worker.watched or ()):
            reservation.trouble()

    def _join(self, worker: Worker) -> None:
        worker.tier = worker.natural_tier()
        self._pools.join(worker)

    def _terms_for(self, size: int) -> LeaseTerms:
        """Scale interval and time to live so that all heartbeats together stay under the set rate."""
        config = self._config
        interval_s = max(config.heartbeat_interval_s, size / config.max_heartbeats_per_s)
        if interval_s != self.terms.heartbeat_interval_s:
            scale = interval_s / config.heartbeat_interval_s
            self.terms = LeaseTerms(config.time_to_live_s * scale, interval_s)
        return self.terms

    def _set_timer(self, worker: Worker, when: float) -> None:
        heapq.heappush(self._timers, (when, next(self._timer_ids), worker))

    def _set_lease_timer(self, worker: Worker) -> None:
        """One timer per lease; a heartbeat only moves the deadline, and the timer finds it moved."""
        worker.timer_at = max(worker.deadline, self._grace_until)
        self._set_timer(worker, worker.timer_at)

    def _on_timer(self, worker: Worker, when: float, now: float) -> None:
        breaker = worker.breaker
        if breaker is not None and breaker.state is BreakerState.OPEN and breaker.ready_at <= now:
            breaker.half_open()
        if worker.probing and worker.probe_ends <= now:
            worker.probing = False
        if not worker.spec.check_heartbeat:
            worker.suspect = worker.suspect and worker.deadline > now
        elif when == worker.timer_at:
            if max(worker.deadline, self._grace_until) <= now:
                self._remove(worker, Removal.EXPIRED)
                return
            self._set_lease_timer(worker)
        self._settle(worker)

    def _begin_probe(self, worker: Worker) -> bool:
        if worker.breaker is None or worker.breaker.state is not BreakerState.HALF_OPEN or worker.probing:
            return False
        worker.probing = True
        worker.probe_ends = math.inf
        self._settle(worker)
        return True

    def _forget_picks(self, worker: Worker, before: float) -> None:
        picks = worker.picks
        while picks and picks[0] <= before:
            picks.popleft()

    def _intern(self, spec: WorkerSpec) -> WorkerSpec:
        """Share equal model descriptions: ten thousand workers serve fifty models."""
        if len(self._interned) > REMEMBERED:
            self._interned.clear()
        models = tuple(self._interned.setdefault(model, model) for model in spec.models)
        return WorkerSpec(
            worker_id=spec.worker_id,
            instance_id=spec.instance_id,
            address=spec.address,
            models=models,
            weight=spec.weight,
            labels={sys.intern(key): sys.intern(value) for key, value in spec.labels.items()},
            check_heartbeat=spec.check_heartbeat,
            version=sys.intern(spec.version),
        )

    def _notify(self, change: Change) -> None:
        for listener in tuple(self._listeners.values()):
            listener(change)
