"""Big bodies are read and written beside the event loop, which streams wait on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from fastchat_grpc.errors import QueueFull

BIG_BYTES = 64 * 1024
"""Checking a body of this size takes about as long as a thread's turn."""
HUGE_BYTES = 1024 * 1024
MAX_WAITING = 64
"""Bodies in one lane; more are refused, since each holds megabytes."""

P = ParamSpec("P")
T = TypeVar("T")


class Beside:
    """One thread for big bodies and one for huge ones, first come first served; small ones never wait.

    More threads would share one interpreter, and take turns from the event loop that nobody waits for.
    """

    def __init__(self) -> None:
        self._lanes = {name: ThreadPoolExecutor(1, thread_name_prefix=f"{name}-bodies") for name in ("big", "huge")}
        self._waiting = dict.fromkeys(self._lanes, 0)

    async def run(self, size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that reads or writes `size` bytes, at once where they are few. Raises QueueFull."""
        if size < BIG_BYTES:
            return function(*args, **kwargs)
        name = "big" if size < HUGE_BYTES else "huge"
        if self._waiting[name] >= MAX_WAITING:
            raise QueueFull("too many big requests are being read; try again later", retry_after_s=1.0)
        return await self._enter(name, lambda: function(*args, **kwargs))

    async def write(self, size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for an answer, which is there already: however many wait, it is not thrown away."""
        if size < BIG_BYTES:
            return function(*args, **kwargs)
        return await self._enter("big" if size < HUGE_BYTES else "huge", lambda: function(*args, **kwargs))

    async def _enter(self, name: str, function: Callable[[], T]) -> T:
        self._waiting[name] += 1
        call = asyncio.get_running_loop().run_in_executor(self._lanes[name], function)

        def leave(_: object) -> None:
            self._waiting[name] -= 1

        # Who gave up waiting leaves the work in its lane.
        call.add_done_callback(leave)
        return await call
