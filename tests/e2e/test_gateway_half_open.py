"""Half-open connections between the gateway and a worker."""

from __future__ import annotations

from time import monotonic

import httpx2
import pytest

from tests.e2e.gateway_site import running_site
from tests.e2e.processes import free_port
from tests.integration.blackhole import through

pytest.importorskip("envoy.service.auth.v3", reason="needs the extra gateway")

pytestmark = pytest.mark.slow
BOUND_S = 6.0
SLACK_S = 6.0
"""What a busy machine may add."""


async def test_a_direct_stream_whose_path_swallows_packets_ends_within_the_lease() -> None:
    port = free_port()
    async with through(f"127.0.0.1:{port}") as path:
        worker = {"port": port, "advertised_address": path.address, "options": {"delay_ms": "60"}}
        async with running_site(workers=[worker], resume=False) as site:
            ended_at = swallowed_at = 0.0
            try:
                async for event in site.stream("x" * 3000, max_tokens=3000):
                    if not swallowed_at:
                        path.swallow(new=False)
                        swallowed_at = monotonic()
                    assert event != "[DONE]"
            except httpx2.HTTPError:
                pass  # Envoy may end the stream with an error in band, or cut it
            ended_at = monotonic()
            assert swallowed_at
            assert ended_at - swallowed_at < BOUND_S + SLACK_S
