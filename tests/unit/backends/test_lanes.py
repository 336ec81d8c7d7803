"""Long texts are read beside the event loop, in turn, and never before short ones."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fastchat_grpc.backends import driver, lanes
from fastchat_grpc.backends.echo import EchoTokenizer
from fastchat_grpc.core import ChatMessage, ChatPrompt, GenerateRequest, TextPrompt, TokenPrompt, Tool, ToolCall
from fastchat_grpc.errors import InvalidArgument, PromptTooLong, QueueFull
from tests.conftest import eventually


class Held(EchoTokenizer):
    """Long texts wait for `release`; notes the threads that encode."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.threads: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.threads.append(threading.current_thread().name)
        if len(text) >= lanes.LONG_CHARACTERS:
            assert self.release.wait(60)
        return super().encode(text[:100], add_special_tokens=add_special_tokens)


def long(count: int) -> TextPrompt:
    return TextPrompt("x" * count)


@pytest.fixture
async def held():
    tokenizer = Held()
    yield tokenizer
    tokenizer.release.set()


async def test_huge_texts_keep_neither_short_nor_long_ones_waiting(held):
    huge = [asyncio.create_task(driver.tokenize(held, long(lanes.HUGE_CHARACTERS))) for _ in range(6)]
    await eventually(lambda: len(held.threads) == 1)
    assert await driver.tokenize(held, TextPrompt("short")) == list(b"short")
    held_long = Held()
    held_long.release.set()
    assert len(await driver.tokenize(held_long, long(lanes.LONG_CHARACTERS))) == 100
    # The default pool, which other parts of the worker use, has nothing to do with any of it.
    assert await asyncio.to_thread(lambda: 5) == 5
    held.release.set()
    assert [len(ids) for ids in await asyncio.gather(*huge)] == [100] * 6
    assert {name.split("_")[0] for name in held.threads} == {"huge texts", threading.current_thread().name}


async def test_a_lane_that_is_full_refuses(held, monkeypatch):
    monkeypatch.setattr(lanes, "MAX_WAITING", 3)
    waiting = [asyncio.create_task(driver.tokenize(held, long(lanes.LONG_CHARACTERS))) for _ in range(3)]
    await eventually(lambda: len(held.threads) == 2)
    with pytest.raises(QueueFull):
        await driver.tokenize(held, long(lanes.LONG_CHARACTERS))
    waiting[2].cancel()
    await asyncio.wait([waiting[2]])
    late = asyncio.create_task(driver.tokenize(held, long(lanes.LONG_CHARACTERS)))
    held.release.set()
    assert len(await late) == 100
    await asyncio.gather(*waiting[:2])


@pytest.mark.parametrize(
    "part",
    [
        {"reasoning": "x" * 500_000},
        {"tool_calls": (ToolCall(id="1", name="f", arguments_json='"' + "x" * 500_000 + '"'),)},
    ],
    ids=lambda part: next(iter(part)),
)
async def test_all_that_a_message_holds_counts(part):
    message = ChatMessage(role="assistant", **part)
    tool = Tool(name="f", description="x" * 10, parameters_json='{"a": 1}')
    chat = ChatPrompt(messages=(message,), tools=(tool,), template_arguments_json='{"b": 2}')
    assert 500_026 <= lanes.characters(chat) <= 500_030


async def test_errors_and_results_are_those_of_the_function():
    tokenizer = EchoTokenizer()
    assert await driver.detokenize(tokenizer, list(b"hello") * 10_000) == "hello" * 10_000
    with pytest.raises(InvalidArgument, match="999 is not below"):
        await driver.detokenize(tokenizer, [1, 999])
    with pytest.raises(PromptTooLong):
        request = GenerateRequest(prompt=TokenPrompt((1,) * 300_000))
        await driver.prepare(tokenizer, request, 1000)


@pytest.mark.parametrize("size", [2_000, 50_000, 1_000_000])
async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(size, held):
    with pytest.raises(PromptTooLong, match=f"at least {size} tokens, but the context of 1000 tokens"):
        await driver.prepare(held, GenerateRequest(prompt=long(size)), 1000)
    chat = ChatPrompt(messages=(ChatMessage(role="user", content="x" * size),))
    with pytest.raises(PromptTooLong, match="at least"):
        await driver.prepare(held, GenerateRequest(prompt=chat), 1000)
    assert not held.threads
    held.release.set()
    truncated = GenerateRequest(prompt=long(size), truncate_prompt_tokens=10)
    assert len(await driver.prepare(held, truncated, 1000)) == 10
