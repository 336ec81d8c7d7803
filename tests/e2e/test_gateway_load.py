"""Many streams at once through a real Envoy."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import time

import httpx2
import pytest

from fastchat_grpc.config import GatewayConfig
from fastchat_grpc.gateway.app import GatewayApp
from tests.e2e.echo_worker import controller_process, worker_process

pytestmark = pytest.mark.slow

STREAMS = 500
SECONDS = float(os.environ.get("FASTCHAT_GRPC_LOAD_SECONDS", "7"))
"""A minute by hand: FASTCHAT_GRPC_LOAD_SECONDS=60."""


@pytest.mark.timeout(300)
async def test_500_streams_at_once_end_without_an_error() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    async with (
        controller_process() as controller,
        worker_process(controller.address, delay_ms=200, max_running=400),
        worker_process(controller.address, delay_ms=200, max_running=400),
    ):
        gateway = GatewayApp(GatewayConfig(port=0, controller_addresses=(controller.address,), drain_timeout_s=0))
        await gateway.start()
        try:
            await _until(gateway, lambda workers: len(workers) == 2)
            ends = time.monotonic() + SECONDS
            counts = await asyncio.gather(*(_caller(gateway.address, i, ends) for i in range(STREAMS)))
            assert min(counts) >= 1
            print(f"{sum(counts)} streams of {STREAMS} callers ended well in {SECONDS:g} s")
            await _until(gateway, lambda workers: not any(worker["reserved_count"] for worker in workers))
        finally:
            await gateway.stop()


async def _caller(address: str, number: int, ends: float) -> int:
    """Stream after stream on one connection until the time is over; each must be whole."""
    host, _, port = address.rpartition(":")
    text = f"caller {number:03d} " * 3
    body = json.dumps({"model": "echo", "stream": True, "messages": [{"role": "user", "content": text}]})
    kind = "content-type: application/json"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(host, int(port))
    done = 0
    try:
        while time.monotonic() < ends:
            writer.write((head + body).encode())
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
            assert answer.startswith(b"HTTP/1.1 200"), answer
            raw = await asyncio.wait_for(reader.readuntil(b"\r\n0\r\n\r\n"), 120)
            assert b"data: [DONE]\n\n" in raw
            assert b'"error"' not in raw
            assert raw.count(b'"finish_reason":"stop"') == 1
            done += 1
    finally:
        writer.close()
    return done


async def _until(gateway: GatewayApp, condition) -> None:  # type: ignore[no-untyped-def]
    """Wait until the workers that the gateway lists are as wished."""
    async with httpx2.AsyncClient(trust_env=False) as http, asyncio.timeout(20):
        while True:
            reply = await http.get(f"http://{gateway.address}/v1/workers")
            if reply.status_code == 200 and condition(reply.json()["workers"]):
                return
            await asyncio.sleep(0.1)
