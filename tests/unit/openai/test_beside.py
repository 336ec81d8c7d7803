"""Big bodies are read beside the event loop, a bounded number at a time, and small ones are not held up by them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator

import pytest

from fastchat_grpc.core import Event, GenerateRequest, PromptEcho
from fastchat_grpc.errors import QueueFull
from fastchat_grpc.openai import completion_reply
from fastchat_grpc.openai.beside import BIG_BYTES, HUGE_BYTES, MAX_WAITING, Beside
from fastchat_grpc.openai.logprobs import completion_logprobs
from fastchat_grpc.openai.servicer import OpenAIServicer
from fastchat_grpc.text.offsets import Placed
from tests.unit.openai.fakes import FakeContext, FakePort, body, logprob


async def test_only_big_bodies_leave_the_event_loop() -> None:
    beside, here = Beside(), threading.get_ident()
    assert await beside.run(BIG_BYTES - 1, threading.get_ident) == here
    big, huge = await beside.run(BIG_BYTES, threading.get_ident), await beside.run(HUGE_BYTES, threading.get_ident)
    assert len({here, big, huge}) == 3


async def test_huge_bodies_hold_up_neither_big_ones_nor_small_ones_and_are_bounded() -> None:
    beside, release = Beside(), threading.Event()
    waiting = [asyncio.create_task(beside.run(HUGE_BYTES, release.wait)) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    try:
        with pytest.raises(QueueFull):
            await beside.run(HUGE_BYTES, release.wait)
        assert await beside.run(BIG_BYTES, len, "big") == 3
        assert await beside.run(1, len, "small") == 5
        answer = asyncio.create_task(beside.write(HUGE_BYTES, len, "answer"))
        waiting[-1].cancel()
    finally:
        release.set()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert await answer == 6  # what is made already is never refused
    assert await beside.run(HUGE_BYTES, len, "next") == 4


async def test_a_big_request_is_read_in_another_thread() -> None:
    port, threads = FakePort(), []
    tokenize = port.tokenize

    async def noted(model: str, prompt: object) -> object:
        threads.append(type(prompt))
        return await tokenize(model, prompt)  # type: ignore[arg-type]

    port.tokenize = noted  # type: ignore[method-assign, assignment]
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0)
    before = ticks
    await OpenAIServicer(port).Tokenize(body(model="m", prompt="x" * HUGE_BYTES), FakeContext())  # type: ignore[arg-type]
    ticker.cancel()
    assert threads
    assert ticks > before


@pytest.mark.parametrize("stream", [True, False])
async def test_the_log_probabilities_of_a_long_prompt_are_written_in_another_thread(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[int, int] = {}

    def noted(entries: list[Placed]) -> object:
        threads[len(entries)] = threading.get_ident()
        return completion_logprobs(entries)

    monkeypatch.setattr(completion_reply, "completion_logprobs", noted)
    long = PromptEcho(text="Say: " * 1000, token_ids=(7,) * 1000, logprobs=(logprob("Say: "),) * 1000)

    class LongPort(FakePort):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
            async for event in super().generate(request):
                yield long if isinstance(event, PromptEcho) else event

    asked = body(model="m", prompt="Say: " * 1000, echo=True, logprobs=2, stream=stream)
    replies = OpenAIServicer(LongPort()).Completions(asked, FakeContext())  # type: ignore[arg-type]
    written = b"".join([reply.data async for reply in replies])
    assert written.count(b"Say: ") >= 2000
    assert threads.pop(max(threads)) != threading.get_ident()
    assert set(threads.values()) <= {threading.get_ident()}
