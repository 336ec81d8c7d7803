"""A controller that benchmarks start as a process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastchat_grpc.config import MetricsConfig


async def serve_controller(worker: str, model: str, metrics: MetricsConfig | None = None) -> None:
    """Say "ready <address>" and serve until killed: a controller that knows one worker, which sends no heartbeats.

    Args:
        worker: its address.
        model: its only model, and its id.
        metrics: none are told unless it says so.
    """
    from fastchat_grpc.config import ControllerConfig, ListenConfig, MetricsConfig
    from fastchat_grpc.controller.app import ControllerApp
    from fastchat_grpc.controller.fleet import WorkerSpec
    from fastchat_grpc.core import Capability, Load, ModelInfo

    app = ControllerApp(ControllerConfig(listen=ListenConfig(port=0), metrics=metrics or MetricsConfig()))
    await app.start()
    capabilities = frozenset({Capability.GENERATE, Capability.RESUME})
    spec = WorkerSpec(
        worker_id=model,
        instance_id="1",
        address=worker,
        models=(ModelInfo(name=model, context_length=4096, capabilities=capabilities),),
        check_heartbeat=False,
    )
    app.registry.register(spec, Load())
    print(f"ready {app.address}", flush=True)
    await asyncio.Event().wait()
