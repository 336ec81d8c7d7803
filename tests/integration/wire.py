"""What stands between a controller and its workers in tests: connections that can be cut or stopped, and workers
whose model can do less than the echo backend's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from fastchat_grpc.core import Capability, Event, GenerateRequest, ModelInfo
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import echo_config


class Wire:
    """A TCP proxy in front of one server."""

    def __init__(self) -> None:
        self.target = 0
        """Port of the server."""
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def open(self) -> None:
        """Listen; connections wait for `target`."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Reset every connection; new ones are taken."""
        for writer in self._writers:
            writer.transport.abort()

    def stop(self) -> None:
        """Let no byte through, neither way, and say nothing: a network that drops packets."""
        self._flowing.clear()

    def go_on(self) -> None:
        """The end of `stop`."""
        self._flowing.set()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.go_on()
        self.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))
        finally:
            for end in (writer, far_writer):
                self._writers.discard(end)
                end.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@asynccontextmanager
async def open_wire() -> AsyncIterator[Wire]:
    """A wire that listens."""
    wire = Wire()
    await wire.open()
    try:
        yield wire
    finally:
        await wire.close()


Refuse = Callable[[GenerateRequest], Any]
"""Raises for requests that the backend would refuse."""


@asynccontextmanager
async def shaped_worker(
    model: str = "echo",
    *,
    capabilities: Collection[Capability] | None = None,
    backend: str = "echo",
    fingerprint: str = "",
    adapters: Collection[str] = (),
    refuse: Refuse = lambda request: None,
    **config: Any,
) -> AsyncIterator[WorkerApp]:
    """A started echo worker that says it is another backend's, and answers as that would.

    `worker.seen` holds the requests that it got.
    """
    config.setdefault("drain_timeout_s", 0.0)
    app = WorkerApp(echo_config(model, **config))
    echo, seen = app._backend, []
    real_start, real_generate = echo.start, echo.generate

    async def start() -> list[ModelInfo]:
        infos = await real_start()
        can = infos[0].capabilities if capabilities is None else frozenset(capabilities)
        bases = [replace(info, capabilities=can, backend=backend, fingerprint=fingerprint) for info in infos]
        return [*bases, *(replace(bases[0], name=name, base_model=bases[0].name) for name in adapters)]

    async def generate(request: GenerateRequest) -> AsyncGenerator[Event, None]:
        seen.append(request)
        refuse(request)
        asked = replace(request, lora_adapter="") if request.lora_adapter in adapters else request
        async for event in real_generate(asked):
            yield event

    echo.start, echo.generate = start, generate  # type: ignore[method-assign, assignment]
    app.seen = seen  # type: ignore[attr-defined]
    try:
        await app.start()
        yield app
    finally:
        await app.stop()
