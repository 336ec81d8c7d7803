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
from collections.abc import Callable, Collection, Sequence
from time import monotonic

from fastchat_grpc.config import BreakerConfig, LeaseConfig
from fastchat_grpc.controller.fleet import (
    Change,
    ChangeKind,
    LeaseTerms,
    Removal,
    Replicas,
    Reservation,
    Worker,
    WorkerSpec,
)
from fastchat_grpc.controller.health import Drain, Health, Tier
from fastchat_grpc.controller.leases import LATE_S, STALL_S, Leases
from fastchat_grpc.controller.ledger import Ledger, sane
from fastchat_grpc.controller.pools import FleetModel, Pool, Pools, Recent
from fastchat_grpc.controller.room import Room
from fastchat_grpc.core import Load, WorkerState
from fastchat_grpc.errors import FleetFull, InstanceReplaced, LeaseNotFound, WorkerNotFound

QUIET_S = 0.25
"""A young controller that has workers, and has not heard of a new one for this long, may be sent requests."""

DEFAULT_LEASE = LeaseConfig()
DEFAULT_BREAKER = BreakerConfig()

Listener = Callable[[Change], None]


class Registry:
    """Workers by id, by lease and by address, and a pool of candidates per model.

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
        self._ordered: Sequence[Worker] | None = None
        self._leases: dict[str, Worker] = {}
        self._by_address: dict[str, dict[Worker, None]] = {}
        self._pools = Pools()
        self._replaced = Recent()
        self._timers: list[tuple[float, int, Worker]] = []
        self._timer_ids = itertools.count()
        self._listeners: dict[int, Listener] = {}
        self._listener_ids = itertools.count()
        self._policy = Leases(lease, clock())
        self._joined_at = -math.inf
        self.room = Room()
        """Requests that wait for a worker."""
        self._queues = self.room.queues  # looked at so often that it is at hand

    @property
    def terms(self) -> LeaseTerms:
        """What a lease gets now."""
        return self._policy.terms

    @property
    def settled(self) -> bool:
        """Whether the registry is old enough to know what there is: until then, what it lacks may yet come."""
        return self._clock() >= self._policy.settles_at

    @property
    def serving(self) -> bool:
        """Whether requests had better come here: it has settled, or has workers and no more come just now."""
        return self.settled or (bool(self._workers) and self._clock() - self._joined_at >= QUIET_S)

    def settle(self) -> None:
        """The fleet is known to be whole: what is not here does not exist."""
        self._policy.settles_at = self._clock()

    # ------------------------------------------------------------------------------- leases

    def register(self, spec: WorkerSpec, load: Load) -> Worker:
        """Add a worker, or replace its earlier self. The same instance keeps its reservations.

        Raises:
            InstanceReplaced: a newer instance has taken this one's place before.
            FleetFull: there are as many workers as the registry holds.
        """
        self.expire()
        load = sane(load)
        worker = self._workers.get(spec.worker_id)
        if worker is not None and worker.spec.instance_id == spec.instance_id:
            return self._renew(worker, spec, load)
        if worker is not None:
            if spec.instance_id in self._replaced:
                raise InstanceReplaced(
                    f"worker {spec.worker_id!r} was taken over by a newer process; "
                    "two workers must not share a worker id (set --worker-id)"
                )
            self._replaced.add(worker.spec.instance_id)
            self._remove(worker, Removal.REPLACED)
        elif len(self._workers) >= self._config.max_workers:
            raise FleetFull(
                f"the controller holds {len(self._workers)} workers and takes no more (see max_workers)",
                metadata={"max_workers": str(self._config.max_workers)},
            )
        return self._add(spec, load)

    def heartbeat(self, lease_id: str, load: Load) -> Worker:
        """Renew a lease. Raises LeaseNotFound if it is unknown, expired or replaced."""
        now = self.expire()
        worker = self._leases.get(lease_id)
        if worker is None:
            raise LeaseNotFound("the lease is unknown or has expired; register again")
        self._report(worker, sane(load), now)
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
        worker.health.drain = Drain(timeout_s)
        self._settle(worker)
        return worker

    def expire(self) -> float:
        """Act on every timer that is due: remove expired leases, end cooldowns. Cheap when none is; returns now."""
        now = self._clock()
        policy, timers = self._policy, self._timers
        if now - policy.looked_at > STALL_S:
            policy.stalled(now)
        policy.looked_at = now
        while timers and timers[0][0] <= now:
            when, _, worker = heapq.heappop(timers)
            if worker.removed is None:
                self._on_timer(worker, when, now)
        return now

    # ----------------------------------------------------------------------------- dispatch

    def pool(self, model: str) -> tuple[str, Pool]:
        """Name and pool of a model, and errors, as `Pools.find`."""
        now = self.expire()
        pool = self._pools.get(model)
        if pool is not None:
            return model, pool
        return self._pools.find(model, young=now < self._policy.settles_at)

    def reserve(self, worker: Worker, on_trouble: Callable[[], None] | None = None) -> Reservation:
        """Count one request as load of a worker until it is released.

        Args:
            on_trouble: given by those who carry the request themselves, and so are sure to see its end.
        """
        probe = worker.health.begin_probe()
        if probe:
            self._settle(worker)
        mark = worker.ledger.reserve(on_trouble is not None)
        self._rescore(worker)
        reservation = Reservation(self, worker, on_trouble, mark, probe)
        if on_trouble is not None:
            if worker.watched is None:
                worker.watched = set()
            worker.watched.add(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """End a reservation; called by `Reservation.release` alone."""
        worker = reservation.worker
        worker.ledger.release(reservation.mark)
        self._rescore(worker)
        if worker.watched is not None:
            worker.watched.discard(reservation)
        if reservation.probe and worker.health.end_probe():
            self._settle(worker)  # it ended without a verdict: another may probe
        if self._queues:
            self.room.freed(worker)

    def count_pick(self, worker: Worker) -> None:
        """Count a pick whose end nobody will tell, until the worker's figures show it."""
        now = self._clock()
        if not worker.spec.check_heartbeat:
            worker.ledger.forget_picks(now - worker.terms.heartbeat_interval_s)
        worker.ledger.picked(now)
        self._rescore(worker)
        probe_ends = now + self._breaker_config.cooldown_s
        if worker.health.begin_probe(probe_ends):
            self._set_timer(worker, probe_ends)
            self._settle(worker)

    def succeeded(self, reservation: Reservation) -> None:
        """A request has run to its end; called by `Reservation.succeeded` alone."""
        if reservation.worker.health.succeeded(self._clock(), probe=reservation.probe):
            self._settle(reservation.worker)

    def failed(self, worker: Worker) -> None:
        """A request failed through a worker's fault."""
        if worker.removed is None:
            probe_at = worker.health.failed(self._clock())
            if probe_at is not None:
                self._set_timer(worker, probe_at)
                self._settle(worker)

    def suspect(self, worker: Worker) -> None:
        """A dispatch failed: nothing more goes there until the next heartbeat."""
        until = math.inf
        if not worker.spec.check_heartbeat:  # no heartbeat will clear it; time does
            until = self._clock() + worker.terms.time_to_live_s
            self._set_timer(worker, until)
        worker.health.suspected(until)
        self._settle(worker)

    def full(self, worker: Worker) -> None:
        """A worker refused a request because its queue is full: believe that until its next heartbeat."""
        until = self._clock() + worker.terms.heartbeat_interval_s
        if worker.ledger.full(until):
            self._set_timer(worker, until)
        self._rescore(worker)

    def recovering(self, model: str) -> bool:
        """Whether a worker of a model may be back at its next heartbeat."""
        pool = self._pools.get(model)
        return pool is not None and pool.recovering

    def at(self, address: str) -> Collection[Worker]:
        """The live workers that advertise an address."""
        return tuple(self._by_address.get(address, ()))

    def set_reachable(self, worker: Worker, reachable: bool | None) -> None:
        """Tell whether the controller's own connection to the worker stands; None: nobody watches it any more."""
        now, health = self._clock(), worker.health
        if reachable:
            health.connected(now)
        elif reachable is None:
            health.unwatched()
        else:
            health.lost_connection(now)
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
        """The live workers, ordered by id; with a model, those that serve it. Not to be changed."""
        self.expire()
        if model:
            pool = self._pools.get(model)
            return sorted(pool.members, key=_worker_id) if pool is not None else ()
        if self._ordered is None:
            self._ordered = sorted(self._workers.values(), key=_worker_id)
        return self._ordered

    def models(self) -> Sequence[str]:
        """Names of the models that live workers serve, in order."""
        self.expire()
        return self._pools.names()

    def catalogue(self) -> Sequence[FleetModel]:
        """The models that live workers serve, by name, and how many workers serve each."""
        self.expire()
        return self._pools.catalogue()

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

    def _add(self, spec: WorkerSpec, load: Load) -> Worker:
        now = self._clock()
        self._joined_at = now
        self._policy.joined(now, len(self._workers) + 1)
        health = Health(load.state, now, self._breaker_config)
        replicas = self._pools.replicas(spec.models)
        spec = _shared(spec, replicas)
        worker = Worker(spec, self._new_id(), self.terms, health, Ledger(load, spec.weight, now), now)
        self._workers[spec.worker_id] = worker
        self._leases[worker.lease_id] = worker
        self._join(worker, replicas)
        if spec.check_heartbeat:
            self._set_lease_timer(worker, now)
        self._notify(Change(ChangeKind.ADDED, worker))
        self.room.freed(worker)
        return worker

    def _renew(self, worker: Worker, spec: WorkerSpec, load: Load) -> Worker:
        """The same process registers again: perhaps its models changed, perhaps an answer was lost."""
        del self._leases[worker.lease_id]
        worker.lease_id = self._new_id()
        self._leases[worker.lease_id] = worker
        self._leave(worker)
        replicas = self._pools.replicas(spec.models)
        worker.spec, worker.weight = _shared(spec, replicas), spec.weight
        worker.ledger.reweigh(spec.weight)
        worker.score = worker.ledger.score
        self._join(worker, replicas)
        self._report(worker, load, self._clock())
        self._notify(Change(ChangeKind.STATE, worker))
        return worker

    def _report(self, worker: Worker, load: Load, now: float) -> None:
        """Take a worker's figures, and with them its word that it lives."""
        policy, health = self._policy, worker.health
        stalled = load.state is WorkerState.DEGRADED and health.state is not WorkerState.DEGRADED
        late_s = now - worker.heartbeat_at - worker.terms.heartbeat_interval_s
        if late_s > LATE_S or policy.late:
            policy.heard(late_s, now)
        worker.heartbeat_at = now
        worker.terms = terms = policy.terms
        worker.deadline = now + terms.time_to_live_s
        if worker.deadline < worker.timer_at:
            self._set_lease_timer(worker, now)  # the interval has shrunk with the fleet
        worker.ledger.report(load, now, terms.heartbeat_interval_s)
        if worker.ledger.score != worker.score:
            self._rescore(worker)
        if not (health.heard(load.state, now) and self._settle(worker)) and self._listeners:
            self._notify(Change(ChangeKind.LOAD, worker))
        if stalled:
            self._trouble(worker)
        if self._queues:
            self.room.freed(worker)

    def _settle(self, worker: Worker) -> bool:
        """Put a worker into the index that its health asks for; True if that changed."""
        tier = worker.health.tier if worker.removed is None else Tier.NONE
        if tier is worker.tier:
            return False
        worker.tier = tier
        if worker.removed is None:
            self._pools.place(worker)
            self._notify(Change(ChangeKind.STATE, worker))
            self.room.freed(worker)
        return True

    def _rescore(self, worker: Worker) -> None:
        """Move a worker in its index to where its ledger puts it."""
        score = worker.ledger.score
        if score != worker.score:
            if worker.index is None:
                worker.score = score
            else:
                worker.index.move(worker, score)

    def _remove(self, worker: Worker, removal: Removal) -> None:
        worker.removed = removal
        worker.tier = Tier.NONE
        del self._workers[worker.spec.worker_id]
        del self._leases[worker.lease_id]
        self._leave(worker)
        self._policy.resize(len(self._workers))
        self._notify(Change(ChangeKind.REMOVED, worker, removal))
        if removal is not Removal.DEREGISTERED:
            self._trouble(worker)

    def _trouble(self, worker: Worker) -> None:
        for reservation in list(worker.watched or ()):
            reservation.trouble()

    def _join(self, worker: Worker, replicas: Replicas) -> None:
        worker.tier = worker.health.tier
        self._pools.join(worker, replicas)
        self._by_address.setdefault(worker.spec.address, {})[worker] = None
        self._ordered = None

    def _leave(self, worker: Worker) -> None:
        self._pools.leave(worker)
        there = self._by_address[worker.spec.address]
        del there[worker]
        if not there:
            del self._by_address[worker.spec.address]
        self._ordered = None

    def _set_timer(self, worker: Worker, when: float) -> None:
        heapq.heappush(self._timers, (when, next(self._timer_ids), worker))

    def _set_lease_timer(self, worker: Worker, now: float) -> None:
        """One timer per lease; a heartbeat only moves the deadline, and the timer finds it moved."""
        worker.timer_at = self._policy.ends_at(worker, now)
        self._set_timer(worker, worker.timer_at)

    def _on_timer(self, worker: Worker, when: float, now: float) -> None:
        worker.health.on_time(now)
        worker.ledger.on_time(now)
        self._rescore(worker)
        if worker.spec.check_heartbeat and when == worker.timer_at:
            if self._policy.ends_at(worker, now) <= now:
                self._remove(worker, Removal.EXPIRED)
                return
            self._set_lease_timer(worker, now)
        self._settle(worker)
        self.room.freed(worker)

    def _notify(self, change: Change) -> None:
        for listener in tuple(self._listeners.values()):
            listener(change)


def _worker_id(worker: Worker) -> str:
    return worker.spec.worker_id


def _shared(spec: WorkerSpec, replicas: Replicas) -> WorkerSpec:
    """The same with what equals others held once: ten thousand workers serve fifty models."""
    return WorkerSpec(
        worker_id=spec.worker_id,
        instance_id=spec.instance_id,
        address=spec.address,
        models=replicas.as_in(spec.models),
        weight=spec.weight,
        labels={sys.intern(key): sys.intern(value) for key, value in spec.labels.items()},
        check_heartbeat=spec.check_heartbeat,
        version=sys.intern(spec.version),
    )
