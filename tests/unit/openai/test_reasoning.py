"""Reasoning in the OpenAI API's answers, whole and streamed, from a model that says what it is told."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fastchat_grpc.backends.echo import EchoBackend
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import Event, GenerateRequest
from tests.unit.openai.fakes import FakePort, ask_chat, stream_chat

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


class EchoPort(FakePort):
    """The echo backend as a reasoning model."""

    def __init__(self) -> None:
        super().__init__()
        model = ModelConfig(path="m", reasoning_parser="qwen3")
        self._backend = EchoBackend(BackendConfig(name="echo", model=model))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        async for event in self._backend.generate(request):
            yield event


def said(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


async def whole(text: str, **values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The message and the usage."""
    reply = await ask_chat(EchoPort(), **said(text), **values)
    ChatCompletion.model_validate(reply, strict=True)
    return reply["choices"][0]["message"], reply["usage"]


async def streamed(text: str, **values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same, put together from the chunks. Checks that the reasoning comes first."""
    options = {"stream_options": {"include_usage": True}}
    chunks = await stream_chat(EchoPort(), **said(text), **options, **values)
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    calls: list[dict[str, Any]] = []
    for chunk in chunks[:-2]:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        delta = chunk["choices"][0]["delta"]
        for name in ("reasoning_content", "reasoning"):
            if name in delta:
                assert not message["content"]
                assert not calls
                message[name] = message.get(name, "") + delta[name]
        message["content"] += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append({name: call[name] for name in ("type", "function")})
            else:
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    if calls:
        message["tool_calls"] = calls
    if calls or "reasoning" in message:
        message["content"] = message["content"] or None
    return message, chunks[-2]["usage"]


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("<think>why</think>so", {}, {"content": "so", "reasoning": "why"}),
        ("<think>why", {}, {"content": None, "reasoning": "why"}),
        ("so <think>why</think>", {}, {"content": "so <think>why</think>"}),
        ("<think>why</think>so", {"max_tokens": 9}, {"content": None, "reasoning": "wh"}),
        ("<think>why, oh</think>so", {"stop": [","]}, {"content": None, "reasoning": "why"}),
        ("<think>why</think>so, there", {"stop": [","]}, {"content": "so", "reasoning": "why"}),
        ("<think>why</think>so", {"logprobs": True}, {"content": "so", "reasoning": "why"}),
        ("<think>why</think>so", {"include_reasoning": False}, {"content": "so"}),
        (f"<think>{CALL}</think>so", {"tools": TOOLS}, {"content": "so", "reasoning": CALL}),
        (
            f"<think>why</think>\n\n{CALL}",
            {"tools": TOOLS},
            {"content": None, "reasoning": "why", "tool_calls": [("weather", '{"city": "Oslo"}')]},
        ),
        (
            '<think>why</think>\n\n{"name": "weather", "parameters": {}}',
            {"tools": TOOLS},
            {"content": None, "reasoning": "why", "tool_calls": [("weather", "{}")]},
        ),
    ],
)
async def test_reasoning_is_beside_the_content_whole_and_streamed(
    text: str, values: dict[str, Any], expected: dict[str, Any]
) -> None:
    message, usage = await whole(text, **values)
    for call in message.get("tool_calls", ()):
        call.pop("id")
    assert (message, usage) == await streamed(text, **values)
    assert message.get("reasoning_content") == message.get("reasoning") == expected.get("reasoning")
    assert message["content"] == expected["content"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    assert calls == expected.get("tool_calls", [])


async def test_usage_tells_the_tokens_of_reasoning_where_there_are_any() -> None:
    _, usage = await whole("<think>why</think>so", n=2)
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 2 * len("why</think")}
    _, usage = await whole("so")
    assert "completion_tokens_details" not in usage


async def test_logprobs_tell_every_token_of_reasoning_and_answer() -> None:
    text = "<think>why</think>so"
    reply = await ask_chat(EchoPort(), **said(text), logprobs=True)
    tokens = "".join(entry["token"] for entry in reply["choices"][0]["logprobs"]["content"])
    assert tokens == text
