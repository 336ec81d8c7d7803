"""A TCP proxy that can swallow packets: connections stay open, and nothing comes through.

That is what a partition, a firewall's forgotten state or a frozen machine looks like from the other side: no
FIN, no RST, no answer. What was sent meanwhile arrives when the path heals, as TCP's retransmissions would.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

CHUNK = 64 * 1024
TASK_NAME = "blackhole"
"""Name of the tasks of connections, so that whoever counts tasks can leave them out."""


class Blackhole:
    """A proxy from a port of its own to one target. Use `through` to start and stop it.

    Each direction of each connection passes a gate. A closed gate holds bytes and the end of the stream alike.
    """

    def __init__(self, target: str, port: int = 0) -> None:
        host, _, target_port = target.rpartition(":")
        self._target = (host.strip("[]"), int(target_port))
        self.port = port
        self._server: asyncio.Server | None = None
        self._gates: set[asyncio.Event] = set()
        self._swallows_new = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.accepted = 0
        """Connections since the start."""

    @property
    def address(self) -> str:
        """host:port to connect to instead of the target."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    def swallow(self, *, new: bool = True) -> None:
        """Let nothing through from now on: on the connections there are, and (`new`) on those still to come."""
        for gate in self._gates:
            gate.clear()
        self._swallows_new = new

    def heal(self) -> None:
        """Let everything through again, what was held first."""
        self._swallows_new = False
        for gate in self._gates:
            gate.set()

    def cut(self) -> None:
        """Break every connection."""
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        """Close everything."""
        if self._server is None:
            return
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        task.set_name(TASK_NAME)
        self._tasks.add(task)
        gate = asyncio.Event()
        self._gates.add(gate)
        if not self._swallows_new:
            gate.set()
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await gate.wait()  # a dropped SYN: the target hears nothing of it
                await self._join(gate, reader, writer)
        finally:
            self._gates.discard(gate)
            self._tasks.discard(task)
            writer.transport.abort()

    async def _join(self, gate: asyncio.Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target_reader, target_writer = await asyncio.open_connection(*self._target)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_carry(gate, reader, target_writer), name=TASK_NAME)
                group.create_task(_carry(gate, target_reader, writer), name=TASK_NAME)
        except* OSError:
            pass  # one side has broken the connection: the other is told below
        finally:
            target_writer.transport.abort()


async def _carry(gate: asyncio.Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes from one side to the other, to the end of the stream."""
    while chunk := await reader.read(CHUNK):
        await gate.wait()
        writer.write(chunk)
        await writer.drain()
    await gate.wait()
    writer.write_eof()


@asynccontextmanager
async def through(target: str) -> AsyncIterator[Blackhole]:
    """A running proxy to `target` (host:port)."""
    proxy = Blackhole(target)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
