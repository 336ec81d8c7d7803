"""A backend behind a controller and two workers, one of which can die: each has the same engine, so it costs little."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

from fastchat_grpc.backends.base import Backend
from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import BackendConfig, ControllerConfig, ListenConfig, ModelConfig, WorkerConfig
from fastchat_grpc.controller.app import ControllerApp
from fastchat_grpc.core import Delta, Event, GenerateRequest
from fastchat_grpc.worker.app import WorkerApp
from tests.conformance.harness import Harness

TIMEOUT_S = 100.0


class Shared:
    """A backend that others have started and will close."""

    harness: Harness
    """Of the test that runs; a factory named by module and name takes no other argument."""

    def __init__(self, config: BackendConfig) -> None:
        self._backend: Backend = self.harness.backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def start(self) -> Any:
        return self.harness.infos

    async def close(self) -> None:
        pass


class Site:
    """The controller, its workers, and a client that knows the controller alone."""

    def __init__(self, controller: ControllerApp, workers: list[WorkerApp], client: AsyncClient) -> None:
        self.controller = controller
        self.workers = workers
        self.client = client

    async def run(self, request: GenerateRequest, *, kill_after: int | None = None) -> list[Event]:
        """The events of a request. With `kill_after` its worker dies when it has sent so many Deltas."""
        events: list[Event] = []
        deltas = 0
        async with asyncio.timeout(TIMEOUT_S), aclosing(self.client.stream(request)) as stream:
            async for event in stream:
                events.append(event)
                deltas += isinstance(event, Delta)
                if deltas == kill_after and isinstance(event, Delta):
                    await self._kill_the_busy_one()
        return events

    async def _kill_the_busy_one(self) -> None:
        (busy,) = [worker for worker in self.workers if worker._generation.admission.running]
        self.workers.remove(busy)
        assert busy._server is not None
        await busy._server.stop(0)  # its calls end at once, as with the process


@asynccontextmanager
async def relayed(harness: Harness) -> AsyncIterator[Site]:
    """The site, with workers that nothing has happened to."""
    Shared.harness = harness
    async with AsyncExitStack() as stack:
        controller = ControllerApp(ControllerConfig(listen=ListenConfig(), drain_timeout_s=0.0))
        await controller.start()
        stack.push_async_callback(controller.stop)
        workers = []
        for _ in range(2):
            backend = BackendConfig(name=f"{__name__}:Shared", model=ModelConfig(path="tested", names=("tested",)))
            worker = WorkerApp(
                WorkerConfig(
                    backend=backend,
                    listen=ListenConfig(),
                    controller_addresses=(controller.address,),
                    drain_timeout_s=0.0,
                )
            )
            await worker.start()
            stack.push_async_callback(worker.stop)
            workers.append(worker)
        async with asyncio.timeout(10):
            while not all(worker.registered for worker in workers):
                await asyncio.sleep(0.01)
        client = await stack.enter_async_context(AsyncClient(controller.address))
        yield Site(controller, workers, client)
