"""Many requests at once, cancels, embeddings, closing and starting again."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing
from dataclasses import replace
from time import monotonic

import pytest

from fastchat_grpc.backends.capabilities import Feature
from fastchat_grpc.core import Capability, Delta, EmbedRequest
from fastchat_grpc.errors import ConfigError, FastChatError, InvalidArgument, NotSupported, PromptTooLong
from tests.conformance.harness import LONG, PROMPT, Harness, Result, lively, request

pytestmark = pytest.mark.asyncio(loop_scope="session")

CROWD = 32
IDLE_S = 0.4


async def test_32_requests_at_once_each_get_their_own_text(harness: Harness) -> None:
    prompts = [f"Here are {i} facts about the number {i}: first," for i in range(CROWD)]
    alone = [await harness.ask(prompt, max_new_tokens=8) for prompt in prompts[::8]]
    crowd = await asyncio.gather(*(harness.ask(prompt, max_new_tokens=8) for prompt in prompts))
    for prompt, result in zip(prompts, crowd, strict=True):
        assert result.first.prompt_tokens == len(await harness.tokens_of(prompt))
        assert 1 <= result.first.tokens <= 8
    same = sum(a.text == b.text for a, b in zip(alone, crowd[::8], strict=True))
    assert same == len(alone) if not harness.target.batch_changes_text else same >= len(alone) - 1


async def test_a_seeded_text_is_the_same_in_a_crowd(harness: Harness) -> None:
    if not harness.supports(Feature.SEED):
        pytest.skip("no seeds")
    requests = [request(PROMPT, seed=seed, max_new_tokens=12, **lively(harness)) for seed in range(11, 19)]
    alone = [(await harness.run(asked)).text for asked in requests]
    others = [harness.ask(f"Story number {i} begins", temperature=1.0, max_new_tokens=12) for i in range(15)]
    crowd = [result.text for result in await asyncio.gather(*map(harness.run, requests), *others)][: len(requests)]
    if not harness.target.batch_changes_text:
        assert crowd == alone
    # Rounding may change a close choice here and there; other random numbers would change most first words.
    same = sum(a.split()[:1] == b.split()[:1] for a, b in zip(alone, crowd, strict=True))
    assert same > len(requests) // 2


async def test_cancelled_requests_leave_the_engine_within_a_second(harness: Harness) -> None:
    ignore_eos = {"ignore_eos": True} if harness.supports(Feature.IGNORE_EOS) else {}
    streams = [harness.events(request(f"{i} and", max_new_tokens=LONG, **ignore_eos)) for i in range(8)]
    await asyncio.gather(*(_first_delta(stream) for stream in streams))
    await asyncio.gather(*(stream.aclose() for stream in streams))
    closed = monotonic()
    await _idle(harness)
    assert monotonic() - closed < 1.0 + IDLE_S + 0.2
    assert (harness.backend.load().kv_cache_usage or 0.0) < 0.5


async def test_a_task_that_is_cancelled_stops_its_request(harness: Harness) -> None:
    async def read() -> None:
        async with aclosing(harness.events(request(max_new_tokens=LONG))) as events:
            async for _ in events:
                begun.set()

    begun = asyncio.Event()
    task = asyncio.create_task(read())
    await asyncio.wait_for(begun.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _idle(harness)


async def test_a_request_that_is_closed_before_it_began_costs_nothing(harness: Harness) -> None:
    events = harness.events(request())
    await events.aclose()
    assert (await harness.ask(max_new_tokens=2)).first.tokens == 2


async def test_load_tells_capacity_and_progress(harness: Harness) -> None:
    before = harness.backend.load()
    assert before.max_running >= 1
    assert 0 <= (before.kv_cache_usage or 0.0) <= 1
    await harness.ask(max_new_tokens=8)
    assert harness.backend.load().processed_tokens >= before.processed_tokens + 8


async def test_the_model_says_what_the_backend_declares(harness: Harness) -> None:
    info = harness.info
    assert info.name == "tested"
    assert info.backend == harness.target.name
    assert info.context_length == harness.target.context_length
    assert info.capabilities <= harness.traits.capabilities()
    assert Capability.GENERATE in info.capabilities
    assert (Capability.LOGPROBS in info.capabilities) == harness.supports(Feature.LOGPROBS)
    assert (Capability.RESUME in info.capabilities) == harness.supports(Feature.RESUME)
    assert (Capability.STATEFUL_RESUME in info.capabilities) == harness.supports(Feature.RESUME_STATE)


async def test_embeddings_are_unit_vectors_that_depend_on_their_input_alone(harness: Harness) -> None:
    texts = ("Paris is in France.", "A much longer sentence about cats, dogs and other animals of the house.", "Hi")
    asking = EmbedRequest(inputs=texts, model="tested")
    if Capability.EMBED not in harness.info.capabilities:
        with pytest.raises(NotSupported):
            await harness.backend.embed(asking)
        return
    together = await harness.backend.embed(asking)
    assert together.prompt_tokens == sum([len(await harness.tokens_of(text)) for text in texts])
    for text, vector in zip(texts, together.embeddings, strict=True):
        assert len(vector) == (harness.info.embedding_size or len(vector))
        assert math.hypot(*vector) == pytest.approx(1, abs=1e-3)
        alone = await harness.backend.embed(EmbedRequest(inputs=(text,), model="tested"))
        assert cosine(alone.embeddings[0], vector) > 0.999
    if not harness.supports(Feature.EMBED_OPTIONS):
        return
    raw = await harness.backend.embed(replace(asking, normalize=False))
    assert cosine(raw.embeddings[0], together.embeddings[0]) > 0.999


async def test_embeddings_of_long_inputs_are_refused_or_truncated_as_asked(harness: Harness) -> None:
    if Capability.EMBED not in harness.info.capabilities:
        pytest.skip("no embeddings")
    inputs = ("word " * (harness.info.context_length + 10),)
    with pytest.raises(PromptTooLong):
        await harness.backend.embed(EmbedRequest(inputs=inputs, model="tested", truncate=False))
    if not harness.supports(Feature.EMBED_OPTIONS):
        return
    result = await harness.backend.embed(EmbedRequest(inputs=inputs, model="tested", truncate=True))
    assert result.prompt_tokens <= harness.info.context_length


async def test_detokenize_refuses_unknown_tokens(harness: Harness) -> None:
    if harness.info.vocabulary_size:
        with pytest.raises(InvalidArgument):
            await harness.backend.detokenize("tested", [harness.info.vocabulary_size])


async def test_a_missing_model_is_one_line(harness: Harness) -> None:
    if not harness.target.real:
        pytest.skip("no model files")
    async with harness.another(path="/no/such/folder") as backend:
        with pytest.raises(ConfigError) as failed:
            await backend.start()
        assert "\n" not in str(failed.value)
        assert "/no/such/folder" in str(failed.value)


async def test_an_unknown_option_is_refused(harness: Harness) -> None:
    from fastchat_grpc.backends import registry

    with pytest.raises(ConfigError, match="no_such_option"):
        registry.create(harness.target.config({**harness._options, "no_such_option": "1"}))


async def test_closing_while_busy_ends_what_runs_and_a_restart_serves_again(harness: Harness) -> None:
    before = await harness.ask(max_new_tokens=8)
    ignore_eos = {"ignore_eos": True} if harness.supports(Feature.IGNORE_EOS) else {}
    running = [asyncio.create_task(harness.ask(f"{i} and", max_new_tokens=400, **ignore_eos)) for i in range(4)]
    await asyncio.sleep(0.1)
    await asyncio.wait_for(harness.backend.close(), 30)
    results = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 30)
    assert all(isinstance(result, FastChatError | Result) for result in results), results
    await harness.backend.close()
    await harness.start()
    assert (await harness.ask(max_new_tokens=8)).text == before.text


async def _first_delta(stream: object) -> None:
    async for event in stream:  # type: ignore[attr-defined]
        if isinstance(event, Delta):
            return


async def _idle(harness: Harness) -> None:
    """Return when the engine has made no progress for a while; fail after some seconds."""
    async with asyncio.timeout(10):
        while True:
            tokens = harness.backend.load().processed_tokens
            await asyncio.sleep(IDLE_S)
            if harness.backend.load().processed_tokens == tokens:
                return


def cosine(a: object, b: object) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))  # type: ignore[misc]
