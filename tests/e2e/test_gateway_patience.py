"""How long the gateway waits, when it says to come back, and what it lets in before it has seen a key."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import pytest

from fastchat_grpc.config import DispatchMethod
from tests.conftest import eventually
from tests.e2e.echo_worker import worker_process
from tests.e2e.gateway_site import KEY, KEYS, Site, content, running_site

pytestmark = pytest.mark.slow
MODES = ("direct", "relay", "sidecar")


@pytest.mark.parametrize("mode", MODES)
async def test_an_answer_in_one_piece_may_take_longer_than_silence_between_tokens(mode: str) -> None:
    async with running_site(mode, [{"options": {"delay_ms": "50"}}], idle_timeout_s=1.0) as site:
        text = "x" * 50
        whole, pieces, many, typed = await asyncio.gather(
            site.chat(text),
            _collect(site, text),
            site.chat(text, n=2),
            site.http.post("/v1/completions", json={"model": "echo", "prompt": text, "max_tokens": 50}),
        )
        assert whole.status_code == 200, whole.text
        assert whole.json()["choices"][0]["message"]["content"] == text
        assert content(pieces) == text
        assert len(many.json()["choices"]) == 2
        assert typed.json()["choices"][0]["text"] == text


async def _collect(site: Site, text: str) -> list[Any]:
    return [event async for event in site.stream(text)]


async def test_a_stream_whose_worker_says_nothing_ends() -> None:
    async with running_site("direct", [{"options": {"first_delay_ms": "30000"}}], idle_timeout_s=1.0) as site:
        reply = await site.chat("x", stream=True)
        assert reply.status_code == 504
        assert reply.json()["error"]["type"] == "timeout_error"


@pytest.mark.parametrize("mode", MODES)
async def test_a_stream_that_is_long_silent_before_its_first_token_pings_and_is_not_cut(mode: str) -> None:
    worker = {"options": {"first_delay_ms": "1600"}, "sse_ping_s": 0.1}
    async with running_site(mode, [worker], controller={"sse_ping_s": 0.1}, idle_timeout_s=1.0) as site:
        body = {"model": "echo", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
        async with site.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            assert response.headers["content-type"] == "text/event-stream"
            lines = [line async for line in response.aiter_lines() if line]
        assert lines[0] == ": ping"
        assert lines[-1] == "data: [DONE]"
        assert content([json.loads(line[6:]) for line in lines if line.startswith("data: {")]) == "hello"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/generate"])
async def test_full_is_429_and_says_when_to_come_back(mode: str, path: str) -> None:
    full = {"max_running": 1, "max_waiting": 0, "options": {"delay_ms": "20"}}
    async with running_site(mode, [full]) as site:
        busy = site.stream("x" * 300)
        await anext(busy)
        for stream in (False, True):
            body: dict[str, Any] = {"model": "echo", "prompt": "x"}
            if path.endswith("completions"):
                body = {"model": "echo", "stream": stream, "messages": [{"role": "user", "content": "x"}]}
            reply = await site.http.post(path, json=body, headers={"origin": "http://localhost:1"})
            assert reply.status_code == 429, reply.text
            assert int(reply.headers["retry-after"]) >= 1
            assert "retry-after" in reply.headers["access-control-expose-headers"]
        await busy.aclose()


@pytest.mark.parametrize("mode", MODES)
async def test_nobody_there_is_503_and_says_when_to_come_back(mode: str) -> None:
    async with running_site(mode) as site:
        if mode == "sidecar":
            await site.workers[0].stop()
        else:
            await site.controller.stop()
        for stream in (False, True):
            reply = await site.chat(stream=stream)
            assert reply.status_code == 503, reply.text
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["type"] == "server_error"


async def test_a_frozen_worker_is_left_for_another_within_seconds() -> None:
    """Its machine answers nothing, but its connections stand and its lease has not ended."""
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(running_site(controller={"dispatch": DispatchMethod.LOTTERY}))
        slow = await stack.enter_async_context(
            worker_process(site.controller.address, first_delay_ms=60_000, weight=1e6)
        )
        await eventually(lambda: len(site.controller.registry) == 2)
        bridge = site.controller.bridge
        assert bridge is not None
        await eventually(lambda: any(slow.address in (g.acked or ()) for g in bridge.endpoints._gateways.values()))
        asked = asyncio.create_task(site.chat("hello"))
        await eventually(lambda: any(worker.reserved_count for worker in site.controller.registry.at(slow.address)))
        await asyncio.sleep(0.2)
        slow.process.send_signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(20):
                reply = await asked
            assert reply.json()["choices"][0]["message"]["content"] == "hello"
        finally:
            slow.process.send_signal(signal.SIGCONT)


# ------------------------------------------------------------------------------------ before the key is seen


@pytest.mark.parametrize("mode", ["direct", "relay"])
@pytest.mark.parametrize("length", ["content-length: 7000000", "transfer-encoding: chunked"])
async def test_a_large_body_is_not_taken_before_its_key_is_known(mode: str, length: str) -> None:
    async with running_site(mode, controller={"api_keys": KEYS}) as site:
        host, _, port = site.gateway.address.rpartition(":")
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{length}\r\n"
        for key in ("", "authorization: Bearer sk-wrong\r\n"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"{head}{key}\r\n".encode())  # and none of the body
            async with asyncio.timeout(10):
                answer = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(int(answer.lower().partition(b"content-length: ")[2].split(b"\r")[0]))
            writer.close()
            assert b" 401 " in answer
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
        big = "x" * 200_000
        with_key = {"authorization": f"Bearer {KEY}"}
        values = {"model": "echo", "messages": [{"role": "user", "content": big}]}
        reply = await site.http.post("/v1/chat/completions", json=values, headers=with_key)
        assert reply.json()["error"]["code"] == "context_length_exceeded"


async def test_many_callers_without_a_key_fill_no_memory() -> None:
    async with running_site(controller={"api_keys": KEYS}) as site:
        before = _resident(site.gateway.pid)
        body = b"x" * 7_900_000

        async def push() -> int:
            async with httpx2.AsyncClient(base_url=site.url, timeout=30, trust_env=False) as http:
                try:
                    reply = await http.post(
                        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
                    )
                except httpx2.TransportError:  # refused while it still sends
                    return 0
                return reply.status_code

        statuses = await asyncio.gather(*(push() for _ in range(20)))
        assert set(statuses) <= {0, 401}
        assert _resident(site.gateway.pid) - before < 60_000_000


def _resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as status:
        return int(status.read().split()[1]) * 4096
