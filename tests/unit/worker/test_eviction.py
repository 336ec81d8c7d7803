"""Requests that are ended because their worker's time to drain is over: each is told why, whoever's turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from fastchat_grpc.backends import registry
from fastchat_grpc.core import GenerateRequest, TextPrompt
from fastchat_grpc.errors import Draining
from fastchat_grpc.openai.merge import merge
from fastchat_grpc.worker.admission import Admission
from fastchat_grpc.worker.generation import LocalGeneration
from tests.conftest import echo_config, eventually

REQUEST = GenerateRequest(prompt=TextPrompt("x" * 200))


@pytest.fixture
async def generation() -> AsyncIterator[LocalGeneration]:
    config = echo_config(options={"delay_ms": "5"}).backend
    backend = registry.create(config)
    generation = LocalGeneration(backend)
    generation.open(await registry.start(backend, config), Admission(max_running=2, max_waiting=2))
    yield generation
    await backend.close()


async def test_a_stream_whose_event_is_with_its_reader_hears_why_it_ends(generation: LocalGeneration) -> None:
    """Cancelled there, whoever sends the event would lose it, and the reason: the stream would seem to be whole."""
    stream = generation.generate(REQUEST)
    await anext(stream)
    generation.evict()
    await asyncio.sleep(0)  # a cancel of this task, which sends, would come here
    await eventually(lambda: generation.admission.running == 0)  # before the reader comes back
    with pytest.raises(Draining):
        await anext(stream)


async def test_a_stream_that_waits_for_the_engine_ends_at_once(generation: LocalGeneration) -> None:
    stream = generation.generate(REQUEST)
    await anext(stream)

    async def read() -> None:
        async for _ in stream:
            pass

    reader = asyncio.create_task(read())
    await eventually(lambda: generation.awaiting == 1)
    generation.evict()
    with pytest.raises(Draining):
        await reader
    assert generation.admission.running == 0


async def test_each_of_several_streams_that_are_read_as_one_is_ended(generation: LocalGeneration) -> None:
    merged = merge([generation.generate(REQUEST), generation.generate(REQUEST)])
    await anext(merged)
    await asyncio.sleep(0.05)
    generation.evict()
    with pytest.raises(Draining):
        async with asyncio.timeout(5):
            async for _ in merged:
                pass
    await eventually(lambda: generation.admission.running == 0)
