"""Admission: at most so many requests run, at most so many wait, the rest are refused at once."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

from fastchat_grpc.errors import Draining, QueueFull

MIN_RETRY_S = 0.1
MAX_RETRY_S = 30.0


class Admission:
    """Slots and a queue in front of them, by priority (lower first), then by arrival.

    A waiting request whose caller cancels, or whose deadline passes, leaves the queue: grpc cancels
    its task, and `slot` cleans up. Used on one event loop only.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.running = 0
        self._queue: list[tuple[int, int, asyncio.Future[None]]] = []
        self._waiting = 0
        self._arrivals = itertools.count()
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._service_time_s = 1.0  # running average of how long a slot is held

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._waiting

    @asynccontextmanager
    async def slot(self, priority: int = 0) -> AsyncIterator[None]:
        """Hold a slot. Raises QueueFull, or Draining after `close`; both before waiting."""
        await self._acquire(priority)
        started = monotonic()
        try:
            yield
        finally:
            self._service_time_s += 0.2 * (monotonic() - started - self._service_time_s)
            self._release()

    def close(self) -> None:
        """Refuse new requests from now on. Those that run or wait go on."""
        self._closed = True

    async def idle(self) -> None:
        """Return when nothing runs or waits."""
        await self._idle.wait()

    async def _acquire(self, priority: int) -> None:
        if self._closed:
            raise Draining("this worker is shutting down and takes no new requests")
        if self.running < self.max_running:
            self.running += 1
            self._idle.clear()
            return
        if self._waiting >= self.max_waiting:
            raise QueueFull(
                f"all {self.max_running} slots are taken and {self._waiting} requests wait already",
                metadata={"max_running": str(self.max_running), "max_waiting": str(self.max_waiting)},
                retry_after_s=self._retry_after_s(),
            )
        await self._wait(priority)

    async def _wait(self, priority: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (priority, next(self._arrivals), turn))
        self._waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release()  # the slot came just before the cancel: pass it on
            else:
                self._waiting -= 1  # the entry stays in the heap, cancelled, until it comes up
            raise

    def _release(self) -> None:
        """Give the slot to the next in the queue, or free it."""
        while self._queue:
            _, _, turn = heapq.heappop(self._queue)
            if not turn.done():
                self._waiting -= 1
                turn.set_result(None)
                return
        self.running -= 1
        if self.running == 0:
            self._idle.set()

    def _retry_after_s(self) -> float:
        """About when a slot is free for one more: the queue's length over the rate at which slots free."""
        estimate = self._service_time_s * (self._waiting + 1) / self.max_running
        return min(max(estimate, MIN_RETRY_S), MAX_RETRY_S)
