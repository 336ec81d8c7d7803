"""The registry: which workers live, what they serve, how loaded they are. Pure: clock and ids are injected.

State is soft: a new registry is empty, and registrations and heartbeats fill it. All calls are made on
one event loop; none blocks, and none but the listings costs more than the models of one worker.
"""

from __future__ import annotations

import heapq
import math
import secrets
from collections.abc import Callable, Collection, Sequence
from time import monotonic

from fastchat_grpc.config import BreakerConfig, LeaseConfig
from fastchat_grpc.controller.accounts import Accounts
from fastchat_grpc.controller.directory import Directory, by_id
from fastchat_grpc.controller.fleet import (
    Change,
    ChangeKind,
    LeaseTerms,
    Removal,
    Replicas,
    Worker,
    WorkerSpec,
)
from fastchat_grpc.controller.health import Drain, Health, Tier
from fastchat_grpc.controller.leases import LATE_S, STALL_S, Leases
from fastchat_grpc.controller.ledger import Ledger, sane
from fastchat_grpc.controller.pools import JUST_STARTED, STARTING_RETRY_S, FleetModel, Pool, Recent
from fastchat_grpc.core import Load, WorkerState
from fastchat_grpc.errors import FleetFull, InstanceReplaced, LeaseNotFound, Starting, WorkerNotFound

QUIET_S = 0.1
"""A young controller that has workers, and has not heard of a new one for this long, may be sent requests."""

DEFAULT_LEASE = LeaseConfig()
DEFAULT_BREAKER = BreakerConfig()
UNKNOWN_LEASE = "the lease is unknown or has expired; register again"
TAKEN_OVER = "worker {!r} was taken over by a newer process; two workers must not share a worker id (set --worker-id)"


class Registry(Accounts):
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
        super().__init__(breaker, clock)
        self._config = lease
        self._new_id = new_id
        self._directory = Directory()
        self._leases = self._directory.leases
        self._replaced = Recent()
        self._policy = Leases(lease, clock())
        self._joined_at = -math.inf
        self._young = True
        self._sure = False

    @property
    def terms(self) -> LeaseTerms:
        """What a lease gets now."""
        return self._policy.terms

    @property
    def settled(self) -> bool:
        """Whether the registry is old enough to know what there is: until then, what it lacks may yet come."""
        return not self._young or self._clock() >= self._policy.settles_at

    @property
    def serving(self) -> bool:
        """Whether requests had better come here: it has settled, or has workers and no more come just now."""
        return self.settled or (len(self) > 0 and self._clock() - self._joined_at >= QUIET_S)

    @property
    def pickable(self) -> bool:
        """Whether there is a model of which a worker can be picked."""
        return any(pool.pickable for pool in self._pools.by_name.values())

    def settle(self) -> None:
        """The fleet is known to be whole: what is not here does not exist."""
        self._sure = True
        self._grow_up()

    def _grow_up(self) -> None:
        """Requests for what is not there wait no longer."""
        self._young = False
        for model in list(self._queues):
            if self._pools.by_name.get(model) is None:
                self.room.look_again(model)  # who waits for it shall hear that it is not there

    # ------------------------------------------------------------------------------- leases

    def register(self, spec: WorkerSpec, load: Load) -> Worker:
        """Add a worker, or replace its earlier self. The same instance keeps its reservations.

        Raises:
            InstanceReplaced: a newer instance has taken this one's place before.
            FleetFull: there are as many workers as the registry holds.
        """
        self.expire()
        load = sane(load)
        worker = self._directory.get(spec.worker_id)
        if worker is not None and worker.spec.instance_id == spec.instance_id:
            return self._renew(worker, spec, load)
        if worker is not None:
            if spec.instance_id in self._replaced:
                raise InstanceReplaced(TAKEN_OVER.format(spec.worker_id))
            self._replaced.add(worker.spec.instance_id)
            self._remove(worker, Removal.REPLACED)
        elif len(self) >= self._config.max_workers:
            raise FleetFull(
                f"the controller holds {len(self)} workers and takes no more (--max-workers)",
                metadata={"max_workers": str(self._config.max_workers)},
            )
        return self._add(spec, load)

    def holder(self, spec: WorkerSpec) -> Worker | None:
        """The live worker whose place a process would take by registering: it has the same id, and is another one."""
        worker = self._directory.get(spec.worker_id)
        return worker if worker is not None and worker.spec.instance_id != spec.instance_id else None

    def heartbeat(self, lease_id: str, load: Load) -> Worker:
        """Renew a lease. Raises LeaseNotFound if it is unknown, expired or replaced."""
        now, timers = self._clock(), self._timers
        if timers and timers[0][0] <= now:
            self.expire()
        worker = self._leases.get(lease_id)
        if worker is None:
            raise LeaseNotFound(UNKNOWN_LEASE)
        self.counts.heartbeats += 1
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
        """Stop new work on a worker; its heartbeats tell it to drain. Raises as `worker`."""
        worker = self.worker(worker_id)
        worker.health.drained(Drain(timeout_s))
        self._settle(worker)
        return worker

    def undrain(self, worker_id: str) -> Worker:
        """Take a drain back; the worker's heartbeats tell it to take work again. Raises as `worker`."""
        worker = self.worker(worker_id)
        worker.health.undrained()
        self._settle(worker)
        return worker

    def expire(self) -> float:
        """Act on every timer that is due: remove expired leases, end cooldowns. Cheap when none is; returns now."""
        now = self._clock()
        policy, timers = self._policy, self._timers
        if now - policy.looked_at > STALL_S:
            policy.stalled(now)
        policy.looked_at = now
        if self._young and now >= policy.settles_at:
            self._grow_up()
        if not self._sure and now >= policy.sure_at:
            self._sure = True
        while timers and timers[0][0] <= now:
            when, _, worker = heapq.heappop(timers)
            if worker.removed is None:
                self._on_timer(worker, when, now)
        return now

    # ----------------------------------------------------------------------------- dispatch

    def pool(self, model: str) -> tuple[str, Pool]:
        """Name and pool of a model, and errors, as `Pools.find`."""
        timers = self._timers
        if self._young or (timers and timers[0][0] <= self._clock()):
            self.expire()
        pool = self._pools.by_name.get(model)
        if pool is not None:
            return model, pool
        return self._pools.find(model, young=self._young, sure=self._sure)

    def at(self, address: str) -> Collection[Worker]:
        """The live workers that advertise an address."""
        return self._directory.at(address)

    # ------------------------------------------------------------------------------- readers

    def __len__(self) -> int:
        return len(self._directory)

    def worker(self, worker_id: str) -> Worker:
        """A live worker by id. Raises WorkerNotFound, or Starting where it may not have come back yet."""
        self.expire()
        worker = self._directory.get(worker_id)
        if worker is not None:
            return worker
        metadata = {"worker_id": worker_id[:128]}
        if self._young:
            raise Starting(JUST_STARTED, metadata=metadata, retry_after_s=STARTING_RETRY_S)
        raise WorkerNotFound(f"no worker {worker_id[:128]!r} is registered", metadata=metadata)

    def workers(self, model: str = "") -> Sequence[Worker]:
        """The live workers, ordered by id; with a model, those that serve it. Not to be changed."""
        self.expire()
        if model:
            pool = self._pools.by_name.get(model)
            return sorted(pool.members, key=by_id) if pool is not None else ()
        return self._directory.ordered()

    def models(self) -> Sequence[str]:
        """Names of the models that live workers serve, in order."""
        self.expire()
        return self._pools.names()

    def catalogue(self) -> Sequence[FleetModel]:
        """The models that live workers serve, by name, and how many workers serve each."""
        self.expire()
        return self._pools.catalogue()

    def now(self) -> float:
        """The time by which the registry's times are, in seconds."""
        return self._clock()

    def groups(self) -> Sequence[Replicas]:
        """The live workers, those of the same models together. May be called in any thread, and changes nothing."""
        return self._pools.groups()

    def heartbeat_age_s(self, worker: Worker) -> float:
        """Seconds since a worker's last heartbeat."""
        return self._clock() - worker.heartbeat_at

    # ------------------------------------------------------------------------------- inside

    def _add(self, spec: WorkerSpec, load: Load) -> Worker:
        now = self._clock()
        self._joined_at = now
        self._policy.joined(now, len(self) + 1)
        health = Health(load.state, now, self._breaker_config)
        replicas = self._pools.replicas(spec.models)
        spec = replicas.share(spec)
        worker = Worker(spec, self._new_id(), self.terms, health, Ledger(load, spec.weight, now), now)
        self._join(worker, replicas)
        self._set_lease_timer(worker, now)
        self._notify(Change(ChangeKind.ADDED, worker))
        self.room.freed(worker)
        if not self._sure and self._is_whole():
            self.settle()
        return worker

    def _is_whole(self) -> bool:
        """Whether all workers are here that are expected."""
        ids, count = self._config.expect_worker_ids, self._config.expect_workers
        return all(self._directory.get(each) is not None for each in ids) if ids else 0 < count <= len(self)

    def _renew(self, worker: Worker, spec: WorkerSpec, load: Load) -> Worker:
        """The same process registers again: perhaps its models changed, perhaps an answer was lost."""
        self._leave(worker)
        begins = spec.check_heartbeat and not worker.spec.check_heartbeat
        worker.lease_id = self._new_id()
        replicas = self._pools.replicas(spec.models)
        worker.spec, worker.weight = replicas.share(spec), spec.weight
        worker.ledger.reweigh(spec.weight)
        worker.score = worker.ledger.score
        self._join(worker, replicas)
        now = self._clock()
        self._report(worker, load, now)
        if begins:
            self._set_lease_timer(worker, now)
        self._notify(Change(ChangeKind.STATE, worker))
        return worker

    def _report(self, worker: Worker, load: Load, now: float) -> None:
        """Take a worker's figures, and with them its word that it lives."""
        policy, health = self._policy, worker.health
        was, state = health.state, load.state
        late_s = now - worker.heartbeat_at - worker.terms.heartbeat_interval_s
        if late_s > LATE_S or policy.late:
            policy.heard(late_s, now)
        worker.heartbeat_at = now
        worker.terms = terms = policy.terms
        worker.deadline = now + terms.time_to_live_s
        if worker.deadline < worker.timer_at:
            self._set_lease_timer(worker, now)  # the interval has shrunk with the fleet
        worker.ledger.report(load, now, terms.heartbeat_interval_s)
        score = worker.ledger.score
        if score != worker.score:
            index = worker.index
            if index is not None and index.sorts:
                index.move(worker, score)
            else:
                worker.score = score
        if not (health.heard(state, now) and self._settle(worker)) and self._listeners:
            self._notify(Change(ChangeKind.LOAD, worker))
        if state is not was and state is WorkerState.DEGRADED:
            self._trouble(worker)
        if self._queues:
            self.room.freed(worker)

    def _remove(self, worker: Worker, removal: Removal) -> None:
        worker.removed = removal
        worker.tier = Tier.NONE
        self._leave(worker)
        self._policy.resize(len(self))
        self._notify(Change(ChangeKind.REMOVED, worker, removal))
        if removal is not Removal.DEREGISTERED:
            self._trouble(worker)

    def _trouble(self, worker: Worker) -> None:
        for reservation in list(worker.watched or ()):
            reservation.trouble()

    def _join(self, worker: Worker, replicas: Replicas) -> None:
        worker.tier = worker.health.tier
        self._pools.join(worker, replicas)
        self._directory.add(worker)

    def _leave(self, worker: Worker) -> None:
        self._pools.leave(worker)
        self._directory.remove(worker)

    def _set_lease_timer(self, worker: Worker, now: float) -> None:
        """One timer per lease; a heartbeat only moves the deadline, and the timer finds it moved."""
        worker.timer_at = self._policy.ends_at(worker, now)
        self._set_timer(worker, worker.timer_at)

    def _on_timer(self, worker: Worker, when: float, now: float) -> None:
        was = worker.health.breaker
        worker.health.on_time(now)
        if worker.health.breaker is not was:
            self.counts.breakers[worker.health.breaker] += 1
        worker.ledger.on_time(now)
        self._rescore(worker)
        if worker.spec.check_heartbeat and when == worker.timer_at:
            if self._policy.ends_at(worker, now) <= now:
                self._remove(worker, Removal.EXPIRED)
                return
            self._set_lease_timer(worker, now)
        self._settle(worker)
        self.room.freed(worker)
