"""A TCP proxy that can stop forwarding without closing, as a network does that drops packets, or cut connections."""

from __future__ import annotations

import asyncio
from contextlib import suppress

CHUNK = 65536
TASK_NAME = "chaos-proxy"
"""Name of the tasks of connections, so that whoever counts tasks can leave them out."""


class Proxy:
    """Forwards a port of its own to another one on this machine. Connections pass while `open`."""

    def __init__(self, port: int, target_port: int) -> None:
        self.port = port
        self._target_port = target_port
        self._passes = asyncio.Event()
        self._passes.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    def drop(self) -> None:
        """Keep every connection open, take new ones, and pass nothing on."""
        self._passes.clear()

    def heal(self) -> None:
        """Pass on again, what has come meanwhile first."""
        self._passes.set()

    def cut(self) -> None:
        """Reset every connection; new ones pass."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def close(self) -> None:
        """Stop listening and end every connection."""
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.set_name(TASK_NAME)
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            await self._passes.wait()
            target = await asyncio.open_connection("127.0.0.1", self._target_port)
            self._writers.add(target[1])
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pump(reader, target[1]), name=TASK_NAME)
                    both.create_task(self._pump(target[0], writer), name=TASK_NAME)
            finally:
                self._writers.discard(target[1])
                target[1].transport.abort()
        except* (OSError, asyncio.CancelledError):
            pass  # nobody listens there now, or the connection was cut
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            await self._passes.wait()
            writer.write(data)
            await writer.drain()
        with suppress(OSError):
            if writer.can_write_eof():
                writer.write_eof()
