"""Big bodies are read beside the event loop, a bounded number at a time, and small ones are not held up by them."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fastchat_grpc.errors import QueueFull
from fastchat_grpc.openai.beside import BIG_BYTES, HUGE_BYTES, MAX_WAITING, Beside
from fastchat_grpc.openai.servicer import OpenAIServicer
from tests.unit.openai.fakes import FakeContext, FakePort, body


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
        waiting[-1].cancel()
    finally:
        release.set()
    await asyncio.gather(*waiting, return_exceptions=True)
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
