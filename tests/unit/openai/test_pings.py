"""Streams that say that they live while their model has said nothing yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.core import Delta, Event, GenerateRequest, Usage
from fastchat_grpc.errors import QueueFull
from fastchat_grpc.openai import sse
from fastchat_grpc.openai.servicer import OpenAIServicer
from tests.unit.openai.fakes import FakeContext, FakePort, body, chat, events

INTERVAL_S = 0.005
CALL = '<tool_call>{"name": "w", "arguments": "'


class SilentPort(FakePort):
    """Says nothing before it is released."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(error=error, fail_after=0)
        self.released = asyncio.Event()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.closed += 1
            raise
        async for event in super().generate(request):
            yield event


def stream(port: FakePort, ping_s: float = INTERVAL_S, **values: object) -> AsyncGenerator[HttpBody, None]:
    servicer = OpenAIServicer(port, ping_s=ping_s)
    return servicer.ChatCompletions(body(**chat(stream=True, **values)), FakeContext())


async def test_a_silent_stream_pings_until_it_speaks_and_readers_skip_that() -> None:
    port, found = SilentPort(), []
    async with aclosing(stream(port)) as bodies:
        async for item in bodies:
            found.append(item)
            if len(found) == 3:
                port.released.set()
    assert [item.data for item in found[:3]] == [sse.PING] * 3
    assert found[0].content_type == "text/event-stream"
    assert not any(item.content_type for item in found[1:])
    said = b"".join(item.data for item in found)
    assert events(said.replace(sse.PING, b""))[-1] == "[DONE]"
    assert _read_by_the_sdk(said) == "Hello"


def _read_by_the_sdk(data: bytes) -> str:
    import httpx2
    from openai import OpenAI

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=data)

    with OpenAI(
        api_key="k", base_url="http://x/v1", http_client=httpx2.Client(transport=httpx2.MockTransport(answer))
    ) as client:
        chunks = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


async def test_what_fails_after_a_ping_fails_in_the_stream_and_before_as_a_status() -> None:
    port = SilentPort(error=QueueFull("full"))
    bodies = stream(port)
    assert (await anext(bodies)).data == sse.PING
    port.released.set()
    failure = b"".join([item.data async for item in _until_it_fails(bodies)]).replace(sse.PING, b"")
    error, done = events(failure)
    assert error["error"]["code"] == "rate_limit_exceeded"
    assert done == "[DONE]"
    port = SilentPort(error=QueueFull("full"))
    port.released.set()
    with pytest.raises(QueueFull):
        await anext(stream(port, ping_s=60))


async def _until_it_fails(bodies: AsyncGenerator[HttpBody, None]) -> AsyncGenerator[HttpBody, None]:
    with pytest.raises(QueueFull):
        async for item in bodies:
            yield item


async def test_a_caller_that_goes_away_in_the_silence_ends_the_generation() -> None:
    port = SilentPort()
    bodies = stream(port)
    await anext(bodies)
    await bodies.aclose()
    assert port.closed == 1
    asked = asyncio.ensure_future(anext(stream(port, ping_s=60)))
    await asyncio.sleep(0)
    while not port.released._waiters:  # type: ignore[attr-defined]
        await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert port.closed == 2


async def test_no_ping_where_they_are_off_nor_in_an_answer_in_one_piece() -> None:
    port = SilentPort()
    first = asyncio.ensure_future(anext(stream(port, ping_s=0)))
    whole = OpenAIServicer(port, ping_s=INTERVAL_S).ChatCompletions(body(**chat()), FakeContext())
    second = asyncio.ensure_future(anext(whole))
    await asyncio.wait({first, second}, timeout=5 * INTERVAL_S)
    assert not first.done()
    assert not second.done()
    port.released.set()
    assert (await first).data.startswith(b"data: ")
    assert (await second).data.startswith(b"{")


class HoldingPort(FakePort):
    """Writes a long argument, which is not shown before it is whole."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        for piece in [CALL, *("x" * 50)]:
            await asyncio.sleep(INTERVAL_S)
            yield Delta(index=0, text=piece, token_ids=(1,), usage=Usage())


async def test_a_stream_whose_text_is_held_back_pings() -> None:
    tools = [{"type": "function", "function": {"name": "w"}}]
    async with aclosing(stream(HoldingPort(), tools=tools)) as bodies:
        async for item in bodies:
            if item.data == sse.PING:
                break
        else:
            pytest.fail("no ping")
