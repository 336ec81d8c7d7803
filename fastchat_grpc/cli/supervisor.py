"""Keeps the processes of a fleet running: what crashes is started again, and all stop in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

from fastchat_grpc.cli import USAGE_ERROR
from fastchat_grpc.cli.process import SUPERVISED
from fastchat_grpc.errors import ConfigError

logger = logging.getLogger(__name__)

MIN_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
HEALTHY_AFTER_S = 60.0
"""A part that ran this long starts over with the shortest backoff."""


@dataclass
class Part:
    """A child process: its arguments, and how long it may take to stop."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(repr=False)
    """What it has besides this process's own."""
    stop_grace_s: float
    stop_order: int
    """Parts with a lower number stop first: callers' side before workers, workers before controllers."""
    process: asyncio.subprocess.Process | None = field(default=None, init=False)


class Supervisor:
    """Keeps its parts running until told to stop, or until one cannot run at all."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts

    async def run(self, stop: asyncio.Event) -> None:
        """Start all, restart what crashes with backoff, and on `stop` end all in order.

        Raises ConfigError when a part says that it can never start.
        """
        keepers = [asyncio.create_task(self._keep(part)) for part in self._parts]
        stopped = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait([*keepers, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        for order in sorted({part.stop_order for part in self._parts}):
            await asyncio.gather(*(self._end(part) for part in self._parts if part.stop_order == order))
        for task in done - {stopped}:
            await task  # raises what ended it

    async def _keep(self, part: Part) -> None:
        backoff_s = MIN_BACKOFF_S
        while True:
            started = monotonic()
            part.process = await self._start(part)
            status = await part.process.wait()
            if status == USAGE_ERROR:
                raise ConfigError(f"{part.name} cannot start; its message is above")
            if monotonic() - started > HEALTHY_AFTER_S:
                backoff_s = MIN_BACKOFF_S
            logger.error("%s ended with status %s; restarting it in %.1f s", part.name, status, backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _start(self, part: Part) -> asyncio.subprocess.Process:
        # In a session of its own a child does not get the terminal's Ctrl-C, so parts stop in order. The
        # pipe on its standard input closes if this process dies, and then it stops by itself.
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "fastchat_grpc",
            *part.arguments,
            stdin=asyncio.subprocess.PIPE,
            env={**os.environ, **part.environment, SUPERVISED: "1"},
            start_new_session=True,
        )

    async def _end(self, part: Part) -> None:
        process = part.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(part.stop_grace_s):
                await process.wait()
        except TimeoutError:
            logger.error("%s did not stop in %.0f s; killing it", part.name, part.stop_grace_s)
            process.kill()
            await process.wait()
