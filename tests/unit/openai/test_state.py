"""A reply that goes on at another worker is the reply that nothing has disturbed, wherever it breaks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from fastchat_grpc.openai.servicer import OpenAIServicer
from tests.conftest import echo_config
from tests.unit.openai.carried import check_every_break, open_worker, still


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
