"""Requests that wait for a worker: one queue for each model, woken as there is room."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable

from fastchat_grpc.controller.fleet import Worker
from fastchat_grpc.controller.health import Tier

Fits = Callable[[Worker], bool]


class _Waiter:
    """One request that waits. `worker` is set when it is woken: the one that has room."""

    __slots__ = ("again", "fits", "woken", "worker")

    def __init__(self, fits: Fits | None) -> None:
        self.fits = fits
        self.woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.worker: Worker | None = None
        self.again = False


_Queue = OrderedDict[_Waiter, None]


class Room:
    """Queues of waiters by model, first come, first served.

    The registry calls `freed` whenever a worker may take more than before. As many waiters are woken as
    the worker has room for, so that a worker that comes back is not met by all who wait. Who was woken
    picks a worker as usual, and waits again if somebody else was quicker.
    """

    def __init__(self) -> None:
        self.queues: dict[str, _Queue] = {}
        """Those who wait, by model; without empty queues."""
        self._coming: Counter[Worker] = Counter()  # woken for a worker, but not yet running

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))

    def waiting(self, model: str) -> int:
        """How many wait for a model."""
        return len(self.queues.get(model, ()))

    async def wait(self, model: str, timeout_s: float, fits: Fits | None = None) -> bool:
        """Wait until a worker of a model may have room; False when `timeout_s` seconds have passed.

        Args:
            model: full name of the model, which need not be known yet; empty: any.
            fits: tells of a worker whether it would do; None: each would.
        """
        waiter = _Waiter(fits)
        self.queues.setdefault(model, OrderedDict())[waiter] = None
        try:
            async with asyncio.timeout(timeout_s):
                await waiter.woken
        except TimeoutError:
            return waiter.worker is not None or waiter.again
        except asyncio.CancelledError:
            if waiter.worker is not None:
                asyncio.get_running_loop().call_soon(self.freed, waiter.worker)  # its place goes to the next
            raise
        finally:
            self._leave(model, waiter)
        return True

    def freed(self, worker: Worker) -> None:
        """A worker may take more than before: wake as many as it has room for. Costs nothing where nobody waits."""
        queues = self.queues
        if not queues or worker.replicas is None or worker.tier is Tier.NONE:
            return
        names = worker.replicas.models.keys()
        if "" not in queues and queues.keys().isdisjoint(names):
            return
        for name in [name for name in queues if name in names or not name]:
            self._wake(queues[name], worker)

    def look_again(self, model: str) -> None:
        """Wake all who wait for a model: what is known of it has changed for good."""
        for waiter in self.queues.get(model, ()):
            waiter.again = True
            if not waiter.woken.done():
                waiter.woken.set_result(None)

    def _wake(self, queue: _Queue, worker: Worker) -> None:
        """Wake the first of a queue that the worker would do for, as many as it has room for."""
        room = (1 if worker.health.half_open else worker.ledger.room) - self._coming[worker]
        first: list[_Waiter] = []
        for waiter in queue:
            if len(first) >= room:
                break
            if waiter.fits is None or waiter.fits(worker):
                first.append(waiter)
        for waiter in first:
            del queue[waiter]
            waiter.worker = worker
            self._coming[worker] += 1
            if not waiter.woken.done():
                waiter.woken.set_result(None)

    def _leave(self, model: str, waiter: _Waiter) -> None:
        if waiter.worker is not None:
            self._coming[waiter.worker] -= 1
            if not self._coming[waiter.worker]:
                del self._coming[waiter.worker]
        queue = self.queues.get(model)
        if queue is not None:
            queue.pop(waiter, None)
            if not queue:
                del self.queues[model]
