"""The upstream backend: what servers say that others do not, and what they must be told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from fastchat_grpc.backends import registry
from fastchat_grpc.backends.base import Backend
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import (
    ChatMessage,
    ChatPrompt,
    Delta,
    GenerateRequest,
    OutputOptions,
    StopConditions,
    TextPrompt,
    Tool,
    ToolChoice,
)
from fastchat_grpc.errors import InvalidArgument
from tests.unit.backends.asking import ask
from tests.unit.backends.upstream_stand_in import Answer, Refusal, UpstreamServer, chat, upstream_server

pytest.importorskip("httpx2")

HI = ChatPrompt(messages=(ChatMessage(role="user", content="hi"),))
CHAT = GenerateRequest(prompt=HI)
OPENAI_SAYS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
PYDANTIC_SAYS = [{"type": "extra_forbidden", "loc": ["body", "messages", 1, "assistant", "reasoning_content"]}]


@asynccontextmanager
async def started(server: UpstreamServer, **options: str) -> AsyncIterator[Backend]:
    config = BackendConfig(name="upstream", model=ModelConfig(path="served"), options={"url": server.url, **options})
    backend = registry.create(config)
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()


async def said(*chunks: Any) -> str:
    """The text of an answer of these chunks."""
    async with upstream_server() as server:
        server.answer = lambda path, body: [*chunks, chat(finish="stop"), "[DONE]"]
        async with started(server) as backend:
            return (await ask(backend, CHAT)).text


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b", "caf\u00e9 \U0001f99c"])
async def test_what_json_need_not_escape_arrives(text: str) -> None:
    """Python's splitlines ends a line at U+0085 and U+2028; JSON and event streams do not."""
    assert await said(json.dumps(chat(text), ensure_ascii=False)) == text


async def test_a_refusal_of_the_model_is_what_it_says() -> None:
    assert await said(chat(refusal="I can't "), chat(refusal="help with that.")) == "I can't help with that."


async def test_thoughts_and_text_may_come_as_parts() -> None:
    """As Mistral's reasoning models stream them."""
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    chunks = [chat(content=[thinking]), chat(content=[{"type": "text", "text": "4"}]), chat("2")]
    assert await said(*chunks) == "42"
    async with upstream_server() as server, started(server) as backend:
        server.answer = lambda path, body: [*chunks, chat(finish="stop"), "[DONE]"]
        events = (await ask(backend, CHAT)).events
    assert "".join(event.reasoning for event in events if isinstance(event, Delta)) == "hm"


@pytest.mark.parametrize("arguments", ["", None, {}], ids=["empty", "null", "an object"])
async def test_a_call_without_arguments_is_json(arguments: Any) -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "now", "arguments": arguments}}
    assert await said(chat(tool_calls=[call])) == '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("member", "message", "asked"),
    [
        ("max_tokens", OPENAI_SAYS, replace(CHAT, stopping=StopConditions(max_new_tokens=9))),
        ("stream_options", "stream_options: extra fields not permitted", CHAT),
        ("n", "n: only one completion is supported", replace(CHAT, output=OutputOptions(n=2))),
    ],
)
async def test_requests_that_are_refused_together_are_all_sent_again(
    member: str, message: str, asked: GenerateRequest
) -> None:
    """The first to be refused tells how the server wants it; the others are on their way by then."""
    refused = Refusal(400, {"error": {"message": message, "param": member}})
    async with upstream_server() as server, started(server) as backend:
        server.answer = lambda path, body: (
            refused if body.get(member, 1) != 1 else [chat("hi"), chat(finish="stop"), "[DONE]"]
        )
        answers = await asyncio.gather(*(ask(backend, asked) for _ in range(8)))
    assert [answer.text for answer in answers] == ["hi"] * 8


async def test_a_completion_that_is_refused_for_its_limit_is_refused() -> None:
    """There the other name does not exist."""
    async with upstream_server() as server, started(server) as backend:
        server.answer = lambda path, body: Refusal(400, {"error": {"message": OPENAI_SAYS, "param": "max_tokens"}})
        with pytest.raises(InvalidArgument):
            await ask(backend, GenerateRequest(prompt=TextPrompt("hi")))
        assert len(server.bodies) == 1


THOUGHT = replace(
    CHAT,
    prompt=ChatPrompt(
        messages=(
            ChatMessage(role="user", content="hi"),
            ChatMessage(role="assistant", content="lo", reasoning="a greeting"),
            ChatMessage(role="user", content="well?"),
        )
    ),
)


async def test_thoughts_of_the_history_reach_the_server() -> None:
    """Models that call tools go on from what they thought; templates and servers know it by one of two names."""
    async with upstream_server() as server, started(server) as backend:
        await ask(backend, THOUGHT)
    told = server.bodies[0]["messages"]
    assert told[1]["reasoning_content"] == "a greeting"
    assert set(told[0]) == set(told[2]) == {"role", "content"}


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "property 'messages.1.reasoning_content' is unsupported"}},
        {"detail": PYDANTIC_SAYS},
        {"object": "error", "message": {"detail": PYDANTIC_SAYS}},
    ],
    ids=["groq", "fastapi", "mistral"],
)
async def test_a_server_that_takes_no_thoughts_is_asked_without_from_then_on(body: dict[str, Any]) -> None:
    def answer(path: str, asked: dict[str, Any]) -> Answer:
        thinks = any("reasoning_content" in message for message in asked["messages"])
        return Refusal(422, body) if thinks else [chat("hi"), chat(finish="stop"), "[DONE]"]

    async with upstream_server() as server, started(server) as backend:
        server.answer = answer
        assert [(await ask(backend, THOUGHT)).text for _ in range(2)] == ["hi", "hi"]
    assert len(server.bodies) == 3


async def test_a_refused_effort_says_nothing_of_thoughts() -> None:
    refused = Refusal(400, {"error": {"message": "Unknown parameter: 'reasoning_effort'", "param": "reasoning_effort"}})
    async with upstream_server() as server, started(server) as backend:
        server.answer = lambda path, body: refused
        with pytest.raises(InvalidArgument):
            await ask(backend, THOUGHT)
    assert len(server.bodies) == 1


async def test_tools_are_counted_as_the_model_sees_them() -> None:
    tool = Tool(name="f", parameters_json='{"type": "object"}')
    async with upstream_server() as server, started(server, dialect="vllm") as backend:
        # An answer without tokens is no fault of what this looks at.
        server.answer = lambda path, body: Refusal(200, {"tokens": [1, 2, 3]})
        asked = ChatPrompt(messages=HI.messages, tools=(tool,))
        assert list(await backend.tokenize("served", asked)) == [1, 2, 3]
        await backend.tokenize("served", replace(asked, tool_choice=ToolChoice.NONE))
        await backend.tokenize("served", HI)
    function = {"name": "f", "parameters": {"type": "object"}}
    assert [body.get("tools") for body in server.bodies] == [[{"type": "function", "function": function}], None, None]
