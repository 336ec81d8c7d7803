"""A controller restarts under a large fleet: how long it takes to know all, and whether it expires who lives.

A simulation in virtual time with the real registry. The controller is one queue, first come first served,
with the CPU that each call costs it; the workers behave as `fastchat_grpc.rpc.registration` does.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass
from random import Random
from typing import Any

REGISTER_S = 350e-6
HEARTBEAT_S = 270e-6
TICK_S = 0.25
CALL_TIMEOUT_S = 5.0
RETRY_S = 1.0
"""A worker that had no answer asks again after this time."""
RECONNECT_S = 1.0
"""Within this time after its start every worker has found the controller again."""


@dataclass
class Outcome:
    """What came of it. Times in seconds of the simulation, after the controller's start."""

    all_known_s: float | None = None
    false_expiries: int = 0
    longest_queue_s: float = 0.0
    expired_after_death_s: float | None = None
    """How long it took to miss a worker that really died, in the end."""


class Simulation:
    """So many workers that find a new controller all at once.

    Args:
        slowness: multiplies what each call costs the controller.
        register_s: what it costs to register, before that.
        max_heartbeats_per_s: as LeaseConfig.
    """

    def __init__(
        self,
        workers: int,
        slowness: float = 1.0,
        seed: int = 1,
        max_heartbeats_per_s: float = 1000.0,
        register_s: float = REGISTER_S,
    ) -> None:
        from fastchat_grpc.config import LeaseConfig
        from fastchat_grpc.controller.registry import Registry

        self._count = workers
        self._slowness = slowness
        self._register_s = register_s
        self._rng = Random(seed)
        self.now = 0.0
        self._registry = Registry(LeaseConfig(max_heartbeats_per_s=max_heartbeats_per_s), clock=lambda: self.now)
        self._registry.subscribe(self._on_change)
        self._events: list[tuple[float, int, Any]] = []
        self._order = itertools.count()
        self._queue: deque[tuple[int, int, float]] = deque()  # worker, number and time of its call
        self._busy = False
        self._leases: dict[int, str] = {}
        self._calls = [0] * workers  # number of each worker's last call
        self._dead: int | None = None
        self.outcome = Outcome()

    def run(self, seconds: float) -> Outcome:
        """Let all come back, run so long, then let one worker die and wait for it to be missed."""
        for i in range(self._count):
            self._at(self._rng.uniform(0, RECONNECT_S), lambda i=i: self._call(i))
        self._at(TICK_S, self._tick)
        self._until(seconds)
        self._dead, died_at = 0, self.now
        while self.outcome.expired_after_death_s is None and self.now < died_at + 1000:
            self._until(self.now + 1)
        return self.outcome

    def _until(self, end: float) -> None:
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = end

    def _at(self, when: float, action: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), action))

    def _tick(self) -> None:
        self._registry.expire()
        self._at(self.now + TICK_S, self._tick)

    def _call(self, i: int) -> None:
        """A worker calls: it registers, or says that it lives."""
        if i == self._dead:
            return
        self._calls[i] += 1
        number = self._calls[i]
        self._queue.append((i, number, self.now))
        self._at(self.now + CALL_TIMEOUT_S, lambda: self._give_up(i, number))
        if not self._busy:
            self._serve()

    def _give_up(self, i: int, number: int) -> None:
        """No answer in time: the worker asks again, though the controller may still come to the call."""
        if self._calls[i] == number:
            self._calls[i] += 1
            self._at(self.now + self._rng.uniform(0.5, 1.0) * RETRY_S, lambda: self._call(i))

    def _serve(self) -> None:
        """The controller takes the next call from its queue."""
        if not self._queue:
            self._busy = False
            return
        self._busy = True
        i, number, asked_at = self._queue.popleft()
        self.outcome.longest_queue_s = max(self.outcome.longest_queue_s, self.now - asked_at)
        cost = (HEARTBEAT_S if i in self._leases else self._register_s) * self._slowness
        self._at(self.now + cost, lambda: self._answer(i, number))

    def _answer(self, i: int, number: int) -> None:
        """The controller does what a call asks; the worker goes on from there, if it still waits."""
        if i != self._dead:
            interval_s = self._served(i, heard=self._calls[i] == number)
            if len(self._registry) == self._count and self.outcome.all_known_s is None:
                self.outcome.all_known_s = self.now
            if self._calls[i] == number:
                self._calls[i] += 1
                self._at(self.now + interval_s * self._rng.uniform(0.9, 1.1), lambda: self._call(i))
        self._serve()

    def _served(self, i: int, *, heard: bool) -> float:
        """Register or renew; and the time until the worker's next call. Only if `heard` does it learn its lease."""
        from fastchat_grpc.core import Load
        from fastchat_grpc.errors import LeaseNotFound

        try:
            if i in self._leases:
                return float(self._registry.heartbeat(self._leases[i], Load()).terms.heartbeat_interval_s)
            worker = self._registry.register(_spec(i), Load())
            if heard:
                self._leases[i] = worker.lease_id
            return float(worker.terms.heartbeat_interval_s)
        except LeaseNotFound:
            del self._leases[i]
            return RETRY_S / 5

    def _on_change(self, change: Any) -> None:
        from fastchat_grpc.controller.fleet import Removal

        if change.removal is Removal.EXPIRED:
            i = int(change.worker.spec.worker_id)
            if i != self._dead:
                self.outcome.false_expiries += 1
            else:
                self.outcome.expired_after_death_s = self.now - change.worker.heartbeat_at


def _spec(i: int) -> Any:
    from fastchat_grpc.controller.fleet import WorkerSpec
    from fastchat_grpc.core import ModelInfo

    return WorkerSpec(
        worker_id=str(i),
        instance_id=str(i),
        address=f"10.{i // 65536}.{i // 256 % 256}.{i % 256}:21002",
        models=(ModelInfo(name="m", context_length=4096),),
    )
