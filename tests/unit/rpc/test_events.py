"""Large events are converted a slice at a time, so that other calls of the process have their turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from fastchat_grpc.controller.generation import RelayedGeneration
from fastchat_grpc.core import (
    Delta,
    Event,
    GenerateRequest,
    ModelInfo,
    PromptEcho,
    TextPrompt,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from fastchat_grpc.rpc import convert
from fastchat_grpc.rpc.events import SLICE, event_from_pb, event_to_pb
from fastchat_grpc.v1 import generation_pb2 as pb
from fastchat_grpc.worker.servicer import GenerationServicer

SLICES = 20
LOGPROBS = tuple(
    TokenLogprob(i, "a", b"a", None if i == 0 else -0.5, () if i == 0 else (TopLogprob(1, "b", b"b", -2.0),) * 3)
    for i in range(SLICES * SLICE // 4)
)
ECHO = PromptEcho(text="a" * len(LOGPROBS), token_ids=tuple(range(len(LOGPROBS))), logprobs=LOGPROBS)
DELTA = Delta(index=0, text="a", token_ids=(1,), usage=Usage(), logprobs=LOGPROBS)


class Turns:
    """Counts the turns of the event loop."""

    count = 0

    async def run(self) -> None:
        while True:
            self.count += 1
            await asyncio.sleep(0)


@asynccontextmanager
async def counted() -> AsyncIterator[Turns]:
    turns = Turns()
    task = asyncio.create_task(turns.run())
    try:
        yield turns
    finally:
        task.cancel()


@pytest.mark.parametrize("event", [ECHO, DELTA])
async def test_a_large_event_comes_whole_over_the_wire_and_the_loop_has_a_turn_after_each_slice(event: Event) -> None:
    async with counted() as turns:
        message = await event_to_pb(event)
        written, turns.count = turns.count, 0
        assert message == convert.event_to_pb(event)
        again = await event_from_pb(pb.GenerateResponse.FromString(message.SerializeToString()))
    assert again == event
    assert min(written, turns.count) >= SLICES


async def test_a_worker_answers_others_while_it_writes_a_large_echo() -> None:
    async def events(_: GenerateRequest) -> AsyncGenerator[Event, None]:
        yield ECHO

    async def ignore(_: object) -> None: ...

    generation: Any = SimpleNamespace(generate=events, model=lambda name: ModelInfo(name="m", context_length=10))
    servicer = GenerationServicer(generation, lambda: ("w", "i"), lambda: None)  # type: ignore[arg-type, return-value]
    context: Any = SimpleNamespace(invocation_metadata=lambda: (), send_initial_metadata=ignore)
    async with counted() as turns:
        answers = [answer async for answer in servicer.Generate(pb.GenerateRequest(prompt="a", model="m"), context)]
    assert answers == [convert.event_to_pb(ECHO)]
    assert turns.count >= SLICES


async def test_a_controller_answers_others_while_it_reads_a_large_echo() -> None:
    raw = convert.event_to_pb(ECHO).SerializeToString()

    async def relayed(*_: object) -> AsyncGenerator[bytes, None]:
        yield raw

    relay: Any = SimpleNamespace(generate=relayed, dispatcher=SimpleNamespace(registry=None))
    async with counted() as turns:
        events = [event async for event in RelayedGeneration(relay).generate(GenerateRequest(prompt=TextPrompt("a")))]
    assert events == [ECHO]
    assert turns.count >= SLICES
