"""Fixtures: real servers on free ports, with the echo backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from hypothesis import settings

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import AdmissionConfig, BackendConfig, ListenConfig, ModelConfig, WorkerConfig
from fastchat_grpc.worker.app import WorkerApp

# How long an example takes says nothing on a machine that does other work beside.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

StartWorker = Callable[..., Awaitable[WorkerApp]]


def echo_config(
    model: str = "echo",
    *,
    port: int = 0,
    controllers: tuple[str, ...] = (),
    max_running: int | None = None,
    max_waiting: int = 256,
    context_length: int | None = None,
    options: dict[str, str] | None = None,
    reasoning_parser: str = "auto",
    **worker: Any,
) -> WorkerConfig:
    """A worker with the echo backend on a free port."""
    names = tuple(model.split(","))
    return WorkerConfig(
        backend=BackendConfig(
            name="echo",
            model=ModelConfig(
                path=names[0], names=names, context_length=context_length, reasoning_parser=reasoning_parser
            ),
            options=options or {},
        ),
        listen=ListenConfig(port=port),
        controller_addresses=controllers,
        admission=AdmissionConfig(max_running=max_running, max_waiting=max_waiting),
        **worker,
    )


@asynccontextmanager
async def running_worker(config: WorkerConfig) -> AsyncIterator[WorkerApp]:
    """A started worker, stopped on exit."""
    app = WorkerApp(config)
    try:
        await app.start()
        yield app
    finally:
        await app.stop()


@pytest.fixture
async def start_worker() -> AsyncIterator[StartWorker]:
    """Starts echo workers; takes the arguments of `echo_config`. Stops them at the end of the test."""
    async with AsyncExitStack() as stack:

        async def start(*args: Any, **kwargs: Any) -> WorkerApp:
            kwargs.setdefault("drain_timeout_s", 0.0)
            return await stack.enter_async_context(running_worker(echo_config(*args, **kwargs)))

        yield start


@pytest.fixture
async def worker(start_worker: StartWorker) -> WorkerApp:
    """An echo worker that serves "echo"."""
    return await start_worker()


@pytest.fixture
async def client(worker: WorkerApp) -> AsyncIterator[AsyncClient]:
    """A client of `worker`."""
    async with AsyncClient(worker.address) as client:
        yield client


async def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until the condition holds; fail after the timeout."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
