"""Accounts of workers: what requests and connections tell of them, and where dispatch finds them for it.

Each report goes into the worker's health or ledger; what follows for its tier and score is put into the
pools at once, so that a pick only looks.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from fastchat_grpc.config import BreakerConfig
from fastchat_grpc.controller.breaker import BreakerState
from fastchat_grpc.controller.fleet import Change, ChangeKind, Reservation, Worker
from fastchat_grpc.controller.health import Tier
from fastchat_grpc.controller.pools import Pools
from fastchat_grpc.controller.room import Room

Listener = Callable[[Change], None]


@dataclass(slots=True)
class Counts:
    """What has happened since start. Whoever tells of it reads; nothing depends on it."""

    heartbeats: int = 0
    breakers: Counter[BreakerState] = field(default_factory=Counter)
    """Breakers of workers that have come into a state."""
    attempts: Counter[str] = field(default_factory=Counter)
    """Ends of attempts at workers, by what they say of them (`evidence`)."""


class Accounts:
    """The pools of candidates, and what changes a worker's place in them. Pure: the clock is injected.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, breaker: BreakerConfig, clock: Callable[[], float] = monotonic) -> None:
        self._breaker_config = breaker
        self._clock = clock
        self._pools = Pools()
        self._timers: list[tuple[float, int, Worker]] = []
        self._timer_ids = itertools.count()
        self._listeners: dict[object, Listener] = {}
        self.counts = Counts()
        self.room = Room()
        """Requests that wait for a worker."""
        self._queues = self.room.queues  # looked at so often that it is at hand

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` at every change, at once and in order; the returned function ends that.

        A listener must be quick, must not raise and must not change the registry.
        """
        key = object()
        self._listeners[key] = listener

        def unsubscribe() -> None:
            self._listeners.pop(key, None)

        return unsubscribe

    def reserve(self, worker: Worker, on_trouble: Callable[[], None] | None = None) -> Reservation:
        """Count one request as load of a worker until it is released.

        Args:
            on_trouble: given by those who carry the request themselves, and so are sure to see its end.
        """
        probe = worker.guarded and self._begin_probe(worker)
        ledger, index = worker.ledger, worker.index
        mark = ledger.reserve(on_trouble is not None)
        if index is not None and index.sorts:
            index.move(worker, ledger.score)
        else:
            worker.score = ledger.score
        reservation = Reservation(self, worker, on_trouble, mark, probe)
        if on_trouble is not None:
            if worker.watched is None:
                worker.watched = set()
            worker.watched.add(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """End a reservation; called by `Reservation.release` alone."""
        worker = reservation.worker
        ledger, index = worker.ledger, worker.index
        ledger.release(reservation.mark)
        if index is not None and index.sorts:
            index.move(worker, ledger.score)
        else:
            worker.score = ledger.score
        if worker.watched is not None:
            worker.watched.discard(reservation)
        if reservation.probe and worker.health.end_probe():
            self._settle(worker)  # it ended without a verdict: another may probe
        if self._queues:
            self.room.freed(worker)

    def answered(self, reservation: Reservation) -> None:
        """A probe has begun to answer; called by `Reservation.answered` alone.

        That closes no breaker, but lets the next probe in: a generation may take minutes to succeed.
        """
        if reservation.worker.health.end_probe():
            self._settle(reservation.worker)

    def succeeded(self, reservation: Reservation) -> None:
        """A request has run to its end; called by `Reservation.succeeded` alone."""
        self.counts.attempts["good"] += 1
        if reservation.worker.health.succeeded(self._clock(), probe=reservation.probe):
            self.counts.breakers[BreakerState.CLOSED] += 1
            self._settle(reservation.worker)

    def failed(self, worker: Worker) -> None:
        """A request failed through a worker's fault."""
        if worker.removed is None:
            worker.guarded = True
            was = worker.health.breaker
            probe_at = worker.health.failed(self._clock())
            if probe_at is not None:
                self.counts.breakers[BreakerState.OPEN] += was is not BreakerState.OPEN
                self._set_timer(worker, probe_at)
                self._settle(worker)

    def lost(self, worker: Worker) -> None:
        """A worker went away under a request, or the path to it: nothing more goes there until its next heartbeat.

        One broken connection takes many requests with it and counts as one failure.
        """
        if not worker.health.suspect:
            self.failed(worker)
        self.suspect(worker)

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
        pool = self._pools.by_name.get(model)
        return pool is not None and pool.recovering

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

    # ------------------------------------------------------------------------------- inside

    def _begin_probe(self, worker: Worker) -> bool:
        """A request goes there: True if it is a probe. After the cooldown the next may go, ended or not."""
        ends = self._clock() + self._breaker_config.cooldown_s
        if not worker.health.begin_probe(ends):
            return False
        self._set_timer(worker, ends)
        self._settle(worker)
        return True

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
        score, index = worker.ledger.score, worker.index
        if score != worker.score:
            if index is not None and index.sorts:
                index.move(worker, score)
            else:
                worker.score = score

    def _set_timer(self, worker: Worker, when: float) -> None:
        heapq.heappush(self._timers, (when, next(self._timer_ids), worker))

    def _notify(self, change: Change) -> None:
        for listener in tuple(self._listeners.values()):
            listener(change)
