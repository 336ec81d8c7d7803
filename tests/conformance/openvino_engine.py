"""Kills the process of an OpenVINO backend's engine."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from fastchat_grpc.backends.openvino.backend import OpenVinoBackend
from fastchat_grpc.errors import BackendFailed


async def kill_while(backend: OpenVinoBackend, request: asyncio.Task[Any]) -> None:
    """Kill the engine once it computes `request`, see the request fail, and wait for the next engine."""
    engine = backend._running
    tokens = engine.processed_tokens
    async with asyncio.timeout(60):
        while engine.processed_tokens == tokens:
            await asyncio.sleep(0.005)
    assert engine._process is not None
    os.kill(engine._process.pid, signal.SIGKILL)
    with pytest.raises(BackendFailed, match="status -9"):
        await request
    async with asyncio.timeout(100):
        while not engine._ready:
            await asyncio.sleep(0.05)
