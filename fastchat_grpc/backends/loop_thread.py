"""An event loop in a thread of its own, for engines that take over the loop and the signals of where they run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

T = TypeVar("T")
JOIN_TIMEOUT_S = 30.0


class LoopThread:
    """Runs coroutines and asynchronous generators elsewhere, for callers on their own event loop."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def call(self, function: Callable[[], T]) -> T:
        """Run a blocking function in the thread; nothing else runs there meanwhile."""

        async def run() -> T:
            return function()

        return await self.run(run)

    async def run(self, make: Callable[[], Awaitable[T]]) -> T:
        """Await what `make` returns, in the thread. A cancel here is a cancel there."""

        async def run() -> T:
            return await make()

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run(), self._loop))

    async def stream(self, make: Callable[[], Awaitable[AsyncGenerator[T, None]]]) -> AsyncGenerator[T, None]:
        """Items of a generator that `make` gives in the thread. Closing this one closes that one, and waits for it."""
        here = asyncio.get_running_loop()
        items: asyncio.Queue[tuple[bool, Any]] = asyncio.Queue()
        ended = asyncio.Event()
        tasks: list[asyncio.Task[None]] = []

        async def read() -> None:
            async with aclosing(await make()) as source:
                async for item in source:
                    here.call_soon_threadsafe(items.put_nowait, (True, item))

        def start() -> None:
            tasks.append(self._loop.create_task(read()))
            tasks[0].add_done_callback(lambda task: here.call_soon_threadsafe(finish, task))

        def finish(task: asyncio.Task[None]) -> None:
            ended.set()
            items.put_nowait((False, asyncio.CancelledError() if task.cancelled() else task.exception()))

        self._loop.call_soon_threadsafe(start)
        try:
            while True:
                more, item = await items.get()
                if not more:
                    break
                yield item
            if item is not None:
                raise item
        finally:
            if not ended.is_set():
                self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
                await ended.wait()

    async def close(self) -> None:
        """Stop the loop, cancelling what runs in it, and join the thread. Safe to call twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
