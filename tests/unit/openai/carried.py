"""Replies that are carried past workers that break, and how a reader puts them together."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
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
from tests.unit.openai.fakes import FakeContext


@asynccontextmanager
async def open_worker(config: Any) -> AsyncIterator[OpenAIServicer]:
    """The OpenAI service of a worker, without a server."""
    backend = registry.create(config)
    generation = LocalGeneration(backend)
    generation.open(await registry.start(backend, config), Admission(max_running=8, max_waiting=8))
    yield OpenAIServicer(generation, worker_id=lambda: "w")
    await backend.close()


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


def rounded(value: Any) -> Any:
    """The same of a model that computes: numbers may differ in their last digits, and a prompt may be cached."""
    match value:
        case dict():
            return {key: rounded(item) for key, item in value.items() if key != "prompt_tokens_details"}
        case list() | tuple():
            return [rounded(item) for item in value]
        case float():
            return round(value, 2)
    return value


def same(value: Any) -> Any:
    """Every digit counts."""
    return value


async def check_every_break(
    workers: list[OpenAIServicer],
    name: str,
    request: dict[str, Any],
    seen: Callable[[Any], Any] = same,
    *,
    step: int = 1,
) -> bytes:
    """Break a reply after each of its responses, and after all of them; returns the reply that nothing disturbs.

    Args:
        seen: what of a reply is compared.
        step: every how many responses.
    """
    body = HttpBody(data=json.dumps({"model": "", **request}).encode()).SerializeToString()
    at = methods(workers, name)
    frames = [frame async for frame in at[0](body)]
    whole = joined(await carry(at, OPENAI, body))
    for breaks in [*([k] for k in range(0, len(frames) + 1, step)), [step] * (len(frames) // step + 1)]:
        assert seen(spoken(joined(await carry(at, OPENAI, body, breaks)))) == seen(spoken(whole)), breaks
    return whole
