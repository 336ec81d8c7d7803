"""Whatever a request holds, it is served or refused, and the request beside it does not notice.

`make fuzz NAME=openvino ARGS=10000` runs more examples than CI does, without a limit of time, on a tiny model.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from time import monotonic

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fastchat_grpc.backends.capabilities import Feature
from fastchat_grpc.core import GenerateRequest, StopConditions, TextPrompt
from tests.conformance.fuzz import requests, supported_part
from tests.conformance.fuzz_run import WIDTH, Fuzz, reduced
from tests.conformance.harness import Harness, request
from tests.conformance.targets import TARGETS, chosen

pytestmark = pytest.mark.asyncio(loop_scope="session")

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
SECONDS = float(os.environ.get("FUZZ_SECONDS", "14400" if "FUZZ_EXAMPLES" in os.environ else "30"))
"""Of each backend; what is left of its examples then is not run, as the last line says."""
SEED = int(os.environ.get("FUZZ_SEED", "0"))
REPORTED_EVERY = 1000


def _fuzzed() -> list[object]:
    """The targets of this run, and the 8-bit kernels beside the model's own precision."""
    targets = chosen()
    eight_bits = TARGETS["transformers-8bit"]
    if TARGETS["transformers"] in targets and eight_bits not in targets:
        targets.append(eight_bits)
    return [
        pytest.param(target, id=target.label or target.name, marks=[pytest.mark.slow] if target.real else [])
        for target in targets
    ]


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=_fuzzed())
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """A started backend, as in the rest of the suite."""
    harness = Harness(request.param)
    await harness.open()
    yield harness
    await harness.close()


def draw(take: Callable[[GenerateRequest, int], None]) -> None:
    """Hand over the examples, in the order of the seed."""

    @seed(SEED)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(asked=requests(), whole=st.integers(0, 4))
    def drawn(asked: GenerateRequest, whole: int) -> None:
        take(asked, whole)

    drawn()


@pytest.mark.timeout(14_400)
async def test_fuzz(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz = Fuzz(harness)
    await fuzz.start()
    loop = asyncio.get_running_loop()
    began = monotonic()
    batch: list[GenerateRequest] = []

    def report() -> None:
        ended = ", ".join(f"{name} {count}" for name, count in fuzz.seen.most_common())
        name = harness.target.label or harness.target.name
        took = monotonic() - began
        with capsys.disabled():
            print(
                f"\n{name}: {fuzz.seen.total()} examples of seed {SEED} in {took:.0f} s ({ended})", end=" ", flush=True
            )

    def flush() -> None:
        asyncio.run_coroutine_threadsafe(fuzz.run(batch), loop).result()
        batch.clear()
        if fuzz.seen.total() % REPORTED_EVERY < WIDTH <= EXAMPLES - fuzz.seen.total():
            report()

    def take(asked: GenerateRequest, whole: int) -> None:
        if monotonic() - began < SECONDS:
            batch.append(supported_part(asked, harness.traits) if whole else asked)
            if len(batch) == WIDTH:
                flush()

    await asyncio.to_thread(draw, take)
    if batch:
        await fuzz.run(batch)
    report()
    assert not fuzz.failures, "\n".join(fuzz.failures)


async def test_a_failure_is_made_smaller() -> None:
    whole = request("Hello world", n=3, top_k=5, seed=7, stop=("a",), ignore_eos=True, logprobs=2, priority=4)

    async def fails(asked: GenerateRequest) -> bool:
        return asked.output.n > 2 and asked.sampling.seed == 7

    smallest = await reduced(whole, fails, monotonic() + 60)
    assert smallest == replace(
        request("Hello", n=3, seed=7),
        prompt=TextPrompt("H"),
        sampling=replace(whole.sampling, temperature=1.0, top_k=-1),
        stopping=StopConditions(max_new_tokens=1),
    )


@pytest.mark.parametrize("tokens", [400, 10_000])
async def test_at_least_more_tokens_than_there_is_room_for_is_served_to_the_room(harness: Harness, tokens: int) -> None:
    if not harness.supports(Feature.MIN_NEW_TOKENS, Feature.TOKEN_PROMPT):
        pytest.skip("refuses min tokens")
    prompt = (await harness.tokens_of("one two three four"))[:1] * 480
    result = await harness.run(request(prompt, max_new_tokens=tokens, min_new_tokens=tokens))
    assert result.first.tokens <= 32
