"""The official OpenAI client, sync and async, and other clients of the API, against a real Envoy."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.conftest import eventually
from tests.e2e.gateway_site import KEY, KEYS, Site, running_site

pytestmark = pytest.mark.slow

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(params=["direct", "relay"])
async def site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    async with running_site(request.param, controller={"api_keys": KEYS}, key=KEY) as site:
        yield site


@pytest.fixture
async def client(site: Site) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{site.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


async def test_chat_whole_and_streamed(client: AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="echo", messages=user("hello"), n=2, logprobs=True, top_logprobs=1
    )
    assert [choice.message.content for choice in reply.choices] == ["hello", "hello"]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 12
    assert reply.choices[0].logprobs is not None
    assert [entry.token for entry in reply.choices[0].logprobs.content or []][:5] == list("hello")
    stream = await client.chat.completions.create(
        model="echo", messages=user("hello"), stream=True, stream_options={"include_usage": True}, stop="lo"
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hel"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []


async def test_the_clients_stream_helper_gathers_a_completion(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="echo", messages=user(f"ok {CALL}"), tools=[TOOL]) as stream:
        async for _ in stream:
            pass
        whole = await stream.get_final_completion()
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.choices[0].message.content == "ok"
    (call,) = whole.choices[0].message.tool_calls or []
    assert call.function.name == "weather"
    assert call.function.arguments == '{"city": "Oslo"}'


async def test_tools_whole_and_sent_back(client: AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model="echo", messages=user(CALL), tools=[TOOL])
    message = reply.choices[0].message
    (call,) = message.tool_calls or []
    assert call.type == "function"
    history: Any = [*user(CALL), message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    answer = await client.chat.completions.create(model="echo", messages=history, tools=[TOOL])
    assert answer.choices[0].message.content == "rain"


async def test_text_completions(client: AsyncOpenAI) -> None:
    reply = await client.completions.create(
        model="echo", prompt=["abc", "xyz"], max_tokens=2, logprobs=1, echo=True, extra_body={"ignore_eos": True}
    )
    assert [choice.text for choice in reply.choices] == ["abcab", "xyzxy"]
    assert reply.choices[0].logprobs is not None
    assert reply.choices[0].logprobs.tokens == ["a", "b", "c", "a", "b"]
    stream = await client.completions.create(model="echo", prompt=[97, 98, 99], max_tokens=2, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "ab"


async def test_embeddings_are_the_same_as_numbers_and_as_base64(client: AsyncOpenAI) -> None:
    coded = await client.embeddings.create(model="echo", input=["a", "b"])
    plain = await client.embeddings.create(model="echo", input=["a", "b"], encoding_format="float")
    for a, b in zip(coded.data, plain.data, strict=True):
        assert a.embedding == pytest.approx(b.embedding, abs=1e-6)
    assert coded.usage.prompt_tokens == 2


async def test_models(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["echo"]
    assert (await client.models.retrieve("echo")).id == "echo"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nope")


async def test_errors_are_the_clients_own_classes(site: Site, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="echo", messages=user("x"), temperature=-1)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nope", messages=user("x"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as stranger:
        await client.with_options(api_key="sk-wrong").models.list()
    assert stranger.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError) as long:
        await client.chat.completions.create(model="echo", messages=user("x" * 5000))
    assert long.value.code == "context_length_exceeded"


async def test_a_failure_midway_raises_in_the_client() -> None:
    failing = {"options": {"fail_after": "6", "delay_ms": "1"}}
    async with running_site(workers=[failing]) as site:
        client = AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)
        stream = await client.chat.completions.create(model="echo", messages=user("0123456789"), stream=True)
        texts: list[str] = []

        async def read() -> None:
            async for chunk in stream:
                texts.append(chunk.choices[0].delta.content or "")

        with pytest.raises(openai.APIError, match="failed after 6 tokens"):
            await read()
        assert "0123456789".startswith("".join(texts))
        assert any(texts)


async def test_a_client_that_breaks_off_stops_its_generation() -> None:
    async with running_site(workers=[{"options": {"delay_ms": "10"}}]) as site:
        client = AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none")
        stream = await client.chat.completions.create(model="echo", messages=user("x" * 2000), stream=True)
        async for _ in stream:
            break
        assert site.running == 1
        await stream.close()
        await eventually(lambda: site.running == 0, timeout_s=1.0)


async def test_the_sync_client(site: Site) -> None:
    def ask() -> list[Any]:
        with OpenAI(base_url=f"{site.url}/v1", api_key=KEY) as client:
            whole = client.chat.completions.create(model="echo", messages=user("hello"))
            stream = client.chat.completions.create(model="echo", messages=user("hello"), stream=True)
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            listed = [model.id for model in client.models.list()]
            return [whole.choices[0].message.content, streamed, listed, threading.current_thread().name]

    found = await asyncio.to_thread(ask)
    assert found[:3] == ["hello", "hello", ["echo"]]


async def test_curl_streams_and_shows_errors(site: Site) -> None:
    async def curl(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            "curl", "-sN", "-m", "10", "-H", f"authorization: Bearer {KEY}", *arguments, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        return out.decode()

    body = '{"model": "echo", "stream": true, "messages": [{"role": "user", "content": "hello"}]}'
    shown = await curl(f"{site.url}/v1/chat/completions", "-H", "content-type: application/json", "-d", body)
    assert shown.count("data: ") >= 4
    assert shown.endswith("data: [DONE]\n\n")
    whole = body.replace("true", "false")
    assert "hello" in await curl(f"{site.url}/v1/chat/completions", "--json", whole)
    assert "invalid_request_error" in await curl(f"{site.url}/v1/chat/completions", "--json", "not json")
    # curl says application/x-www-form-urlencoded unless it is told otherwise, as a page of the web would.
    assert "must be application/json" in await curl(f"{site.url}/v1/chat/completions", "-d", whole)


async def test_grpcurl_lists_describes_and_streams(site: Site) -> None:
    async def grpcurl(*arguments: str) -> str:
        key = f"authorization: Bearer {KEY}"
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("grpcurl")),
            *("-plaintext", "-max-time", "10", "-H", key, *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        return out.decode()

    address = site.gateway.address
    assert "fastchat_grpc.v1.GenerationService" in await grpcurl(address, "list")
    assert "rpc Generate" in await grpcurl(address, "describe", "fastchat_grpc.v1.GenerationService")
    shown = await grpcurl(
        "-d", '{"model": "echo", "prompt": "abc"}', address, "fastchat_grpc.v1.GenerationService/Generate"
    )
    assert "FINISH_REASON_STOP" in shown
