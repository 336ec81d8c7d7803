"""Admission: at most so many sequences run, at most so many requests wait, the rest are refused at once."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic

from fastchat_grpc.errors import Draining, QueueFull

MIN_RETRY_S = 0.1
MAX_RETRY_S = 30.0
PRIORITY_STEP_S = 1.0
"""One level of priority is worth this much waiting."""
MAX_PRIORITY = 60
"""Levels beyond this, either way, count as this one: nobody is overtaken by what comes two minutes later."""
MIN_RESUMED = 64
RESUMED_PER_SLOT = 4


@dataclass(eq=False)
class Slot:
    """What one request holds: as many of the sequences as it generates. Given back once, early or late."""

    weight: int
    taken_at: float
    _give_back: Callable[[Slot], None] = field(repr=False)
    released: bool = False

    def release(self) -> None:
        """Give the slot back. Does nothing the second time."""
        if not self.released:
            self.released = True
            self._give_back(self)


@dataclass(order=True)
class _Waiter:
    due: float
    """Arrival, moved by priority: since all age alike, this orders the queue and never changes."""
    number: int
    weight: int = field(compare=False)
    resumed: bool = field(compare=False)
    turn: asyncio.Future[None] = field(compare=False)
    arrived: float = field(compare=False)


class Admission:
    """Slots and a queue in front of them, by priority (lower first), then by arrival.

    A request counts as many sequences as it generates (`n` choices: n, but never more than there are), since that
    is what an engine batches. The queue ages: a level of priority is worth PRIORITY_STEP_S of waiting, so that
    whoever waits is served, whatever comes later. Nobody is overtaken for being larger.

    A request that was begun elsewhere and lost its worker passes the queue's bound: it has been let in once, and
    what it would lose is a stream that somebody reads. Such requests are bounded by themselves, and go first.

    A waiting request whose caller cancels, or whose deadline passes, leaves the queue: grpc cancels
    its task, and `slot` cleans up. Used on one event loop only.
    """

    def __init__(self, max_running: int, max_waiting: int, clock: Callable[[], float] = monotonic) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.max_resumed = max(RESUMED_PER_SLOT * max_running, MIN_RESUMED)
        self.running = 0
        """Sequences that run."""
        self._clock = clock
        self._queue: list[_Waiter] = []
        self._waiting = {True: 0, False: 0}  # by whether resumed
        self._numbers = itertools.count()
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._held: set[Slot] = set()
        self._service_time_s = 1.0  # running average of how long a slot is held

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._waiting[True] + self._waiting[False]

    @property
    def oldest_waiting_s(self) -> float | None:
        """Age of the request that waits longest; None: none waits."""
        arrivals = [waiter.arrived for waiter in self._queue if not waiter.turn.done()]
        return self._clock() - min(arrivals) if arrivals else None

    @asynccontextmanager
    async def slot(self, priority: int = 0, *, weight: int = 1, resumed: bool = False) -> AsyncIterator[Slot]:
        """Hold a slot. Raises QueueFull, or Draining after `close`; both before waiting.

        Args:
            priority: lower goes first, within what ageing allows.
            weight: sequences that the request generates.
            resumed: whether it was begun elsewhere.
        """
        weight = min(max(weight, 1), self.max_running)
        await self._acquire(priority, weight, resumed)
        slot = Slot(weight, self._clock(), self._give_back)
        self._held.add(slot)
        try:
            yield slot
        finally:
            slot.release()

    def close(self) -> None:
        """Refuse new requests from now on. Those that run or wait go on."""
        self._closed = True

    def reopen(self) -> None:
        """Take new requests again."""
        self._closed = False

    async def idle(self) -> None:
        """Return when nothing runs or waits."""
        await self._idle.wait()

    async def _acquire(self, priority: int, weight: int, resumed: bool) -> None:
        if self._closed:
            raise Draining("this worker is shutting down and takes no new requests")
        if not self.waiting and self.running + weight <= self.max_running:
            self.running += weight
            self._idle.clear()
            return
        bound = self.max_resumed if resumed else self.max_waiting
        if self._waiting[resumed] >= bound:
            raise QueueFull(
                f"all {self.max_running} slots are taken and {self._waiting[resumed]} requests wait already",
                metadata={"max_running": str(self.max_running), "max_waiting": str(bound)},
                retry_after_s=self._retry_after_s(),
            )
        await self._wait(priority, weight, resumed)

    async def _wait(self, priority: int, weight: int, resumed: bool) -> None:
        level = -MAX_PRIORITY if resumed else min(max(priority, -MAX_PRIORITY), MAX_PRIORITY)
        now = self._clock()
        due = now + level * PRIORITY_STEP_S
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, _Waiter(due, next(self._numbers), weight, resumed, turn, now))
        self._waiting[resumed] += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._free(weight)  # the slot came just before the cancel: pass it on
            else:
                self._waiting[resumed] -= 1
                self._forget_cancelled()
                self._admit()  # it may have stood before smaller ones
            raise

    def _forget_cancelled(self) -> None:
        """Drop the entries of those who left, once they are the greater part."""
        if len(self._queue) > 2 * self.waiting:
            self._queue = [waiter for waiter in self._queue if not waiter.turn.done()]
            heapq.heapify(self._queue)

    def _give_back(self, slot: Slot) -> None:
        self._held.discard(slot)
        self._service_time_s += 0.2 * (self._clock() - slot.taken_at - self._service_time_s)
        self._free(slot.weight)

    def _free(self, weight: int) -> None:
        self.running -= weight
        self._admit()
        if self.running == 0:
            self._idle.set()

    def _admit(self) -> None:
        """Let in those at the head of the queue, as far as there is room for them."""
        while self._queue:
            first = self._queue[0]
            if not first.turn.done():
                if self.running + first.weight > self.max_running:
                    return
                self.running += first.weight
                self._waiting[first.resumed] -= 1
                first.turn.set_result(None)
            heapq.heappop(self._queue)

    def _retry_after_s(self) -> float:
        """About when a slot is free for one more: the queue's length over the rate at which slots free.

        What runs now may take longer than what ended before, or than nothing that ended yet: its age counts, too.
        """
        ages = self._clock() * len(self._held) - sum(slot.taken_at for slot in self._held)
        mean_age_s = ages / len(self._held) if self._held else 0.0
        hold_s = max(self._service_time_s, mean_age_s)
        estimate = hold_s * (self.waiting + 1) / max(len(self._held), 1)
        return min(max(estimate, MIN_RETRY_S), MAX_RETRY_S)
