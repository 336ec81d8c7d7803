"""A reply that goes on at another worker is the reply that nothing has disturbed, wherever it breaks."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.backends import registry
from fastchat_grpc.openai import servicer
from fastchat_grpc.openai.servicer import OpenAIServicer
from fastchat_grpc.worker.admission import Admission
from fastchat_grpc.worker.generation import LocalGeneration
from tests.bridge import OPENAI, Method, carry
from tests.conftest import echo_config
from tests.unit.openai.fakes import FakeContext


@asynccontextmanager
async def open_worker(config: Any) -> AsyncIterator[OpenAIServicer]:
    """The OpenAI service of a worker, without a server."""
    backend = registry.create(config)
    generation = LocalGeneration(backend)
    generation.open(await registry.start(backend, config), Admission(max_running=8, max_waiting=8))
    yield OpenAIServicer(generation, worker_id=lambda: "w")
    await backend.close()


@pytest.fixture
async def workers(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> AsyncIterator[list[OpenAIServicer]]:
    """Two echo workers, whose ids, times and seeds are always the same. Long texts come a few tokens at a time."""
    still(monkeypatch)
    interval = 4 if "call" in request.node.name else 1
    async with AsyncExitStack() as stack:
        config = replace(echo_config(reasoning_parser="qwen3").backend, stream_interval=interval)
        yield [await stack.enter_async_context(open_worker(config)) for _ in range(2)]


def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ids and times of replies the same each time."""
    monkeypatch.setattr(servicer, "uuid", SimpleNamespace(uuid4=lambda: SimpleNamespace(hex="0123456789abcdef")))
    monkeypatch.setattr(servicer, "time", SimpleNamespace(time=lambda: 1234.5, monotonic=itertools.count().__next__))


def methods(workers: list[OpenAIServicer], name: str) -> list[Method]:
    """A method of each worker, as a bridge calls it."""

    def method(worker: OpenAIServicer) -> Method:
        async def call(request: bytes) -> AsyncGenerator[bytes, None]:
            worker._rng = random.Random(7)
            context = FakeContext(x_fastchat_resume="1", x_request_id="r")
            async for body in getattr(worker, name)(HttpBody.FromString(request), context):
                yield body.SerializeToString()
            assert not context.initial_metadata or context.initial_metadata["x-fastchat-worker"] == "w"

        return call

    return [method(worker) for worker in workers]


def joined(frames: list[bytes]) -> bytes:
    """What a caller reads."""
    bodies = [HttpBody.FromString(frame) for frame in frames]
    assert [body.content_type for body in bodies[:1]] != [""]
    assert not any(body.content_type for body in bodies[1:])
    assert not any(body.extensions for body in bodies)
    return b"".join(body.data for body in bodies)


def spoken(data: bytes) -> Any:
    """A reply as its reader puts it together: by choice, whatever the order and the cuts of its chunks."""
    if not data.startswith(b"data: "):
        return json.loads(data)
    blocks = [block.removeprefix("data: ") for block in data.decode().split("\n\n")[:-1]]
    assert blocks.pop() == "[DONE]"
    choices: dict[int, dict[str, Any]] = {}
    heads, usages = set(), []
    for chunk in map(json.loads, blocks):
        heads.add((chunk["id"], chunk["created"], chunk["model"]))
        usages += [chunk["usage"]] if chunk.get("usage") else []
        for choice in chunk["choices"]:
            known = choices.setdefault(choice["index"], {"roles": 0, "calls": [], "logprobs": []})
            delta = choice.get("delta", {"content": choice.get("text")})
            known["roles"] += "role" in delta
            for name in ("content", "reasoning"):
                known[name] = known.get(name, "") + (delta.get(name) or "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    known["calls"].append([call["id"], call["function"]["name"], ""])
                known["calls"][call["index"]][2] += call["function"]["arguments"]
            if logprobs := choice["logprobs"]:
                lists = logprobs["content"] if "content" in logprobs else list(zip(*logprobs.values(), strict=True))
                known["logprobs"] += lists
            if choice["finish_reason"]:
                assert "end" not in known
                known["end"] = (choice["finish_reason"], choice["stop_reason"])
    return heads, choices, usages[-1:]


async def check_every_break(workers: list[OpenAIServicer], name: str, request: dict[str, Any]) -> bytes:
    """Break a reply after each of its responses, and after all of them; returns the reply that nothing disturbs."""
    body = HttpBody(data=json.dumps({"model": "", **request}).encode()).SerializeToString()
    at = methods(workers, name)
    frames = [frame async for frame in at[0](body)]
    whole = joined(await carry(at, OPENAI, body))
    for breaks in [*([k] for k in range(len(frames) + 1)), [1] * (len(frames) + 1)]:
        assert spoken(joined(await carry(at, OPENAI, body, breaks))) == spoken(whole), breaks
    return whole


CALLS = (
    'Is <tool_call>{"name": "f", "arguments": {"a": "ä"}}</tool_call>'
    '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
)
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]


def chat(content: str, **values: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **values}


CHATS = {
    "plain": chat("hé 🦜 wo"),
    "choices": chat("one", n=3),
    "stop_held_back": chat("a two th", stop=["two t", "o xx"]),
    "stop_shown": chat("a two th", stop=["two"], include_stop_str_in_output=True),
    "cut": chat("a two th", max_tokens=5),
    "logprobs": chat("hé 🦜 two", logprobs=True, top_logprobs=2, stop=["tw"]),
    "calls": chat(CALLS, tools=TOOLS),
    "calls_with_logprobs": chat(CALLS, tools=TOOLS, logprobs=True, top_logprobs=1, n=2),
    "reasoning": chat("<think>why é</think>so", n=2),
    "reasoning_with_calls": chat("<think>why</think>" + CALLS[:65], tools=TOOLS, logprobs=True),
    "sampled": chat("abc", temperature=1.0, presence_penalty=1.0, seed=5),
}
TEXTS = {
    "plain": {"prompt": "hé 🦜 wo", "max_tokens": 40},
    "prompts": {"prompt": ["one", "twoo 🦜"], "n": 2, "max_tokens": 40},
    "stop_held_back": {"prompt": "a two th", "stop": ["two t"], "max_tokens": 40},
    "stop_that_was_none": {"prompt": "a two th", "stop": ["two x"], "max_tokens": 40},
    "logprobs": {"prompt": ["hé 🦜", "b"], "logprobs": 2, "max_tokens": 40, "stop": ["h"]},
    "echo": {"prompt": ["ab", "c"], "echo": True, "n": 2, "max_tokens": 3},
    "echo_with_logprobs": {"prompt": ["ab", "c🦜"], "echo": True, "logprobs": 1, "max_tokens": 9},
    "scored": {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 0},
}
STREAM = {"stream": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.mark.parametrize("how", [STREAM, {}], ids=["stream", "whole"])
@pytest.mark.parametrize("case", CHATS)
async def test_a_chat_goes_on_from_every_break(workers: list[OpenAIServicer], case: str, how: dict[str, Any]) -> None:
    await check_every_break(workers, "ChatCompletions", CHATS[case] | how)


@pytest.mark.parametrize("how", [STREAM, {}], ids=["stream", "whole"])
@pytest.mark.parametrize("case", TEXTS)
async def test_a_text_goes_on_from_every_break(workers: list[OpenAIServicer], case: str, how: dict[str, Any]) -> None:
    await check_every_break(workers, "Completions", TEXTS[case] | how)


async def test_usage_goes_on_from_every_break(workers: list[OpenAIServicer]) -> None:
    await check_every_break(workers, "ChatCompletions", CHATS["choices"] | USAGE)
    await check_every_break(workers, "Completions", TEXTS["prompts"] | USAGE)
