"""Controllers in this process, on free ports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastchat_grpc.config import ControllerConfig, LeaseConfig, ListenConfig
from fastchat_grpc.controller.app import ControllerApp
from fastchat_grpc.worker.app import WorkerApp

QUICK = LeaseConfig(time_to_live_s=0.9, heartbeat_interval_s=0.3)
"""Leases that end soon, for tests that wait for it."""


@asynccontextmanager
async def running_controller(port: int = 0, *, young: bool = False, **config: Any) -> AsyncIterator[ControllerApp]:
    """A started controller, stopped on exit without patience. Its fleet counts as whole, unless it is to be `young`."""
    config.setdefault("lease", QUICK)
    config.setdefault("drain_timeout_s", 0.0)
    config.setdefault("listen", ListenConfig(port=port))
    app = ControllerApp(ControllerConfig(**config))
    if not young:
        app.registry.settle()
    await app.start()
    try:
        yield app
    finally:
        await app.stop()


def silence(worker: WorkerApp) -> None:
    """Let a worker say nothing more to its controllers, not even goodbye; its connections stand."""
    for registration, task in worker._registrations._running.values():
        registration._lease = None  # nothing to deregister
        task.cancel()
    for task in list(worker._supervisor._tasks.values()):
        task.cancel()


async def vanish(worker: WorkerApp) -> None:
    """Take a worker away as a crash does: no goodbye to anybody, connections cut, no more heartbeats."""
    silence(worker)
    assert worker._server is not None
    await worker._server._server.stop(0)


async def in_use(controller: ControllerApp, timeout_s: float = 10.0) -> str:
    """Address of a worker that runs something for the controller, once there is one."""
    async with asyncio.timeout(timeout_s):
        while True:
            for worker in controller.registry.workers():
                if worker.reserved_count:
                    return worker.spec.address
            await asyncio.sleep(0.005)
