"""Whatever a request holds, it is served or refused, and the request beside it does not notice.

`make fuzz NAME=openvino ARGS=10000` runs more examples than CI does, without a limit of time, on a tiny model.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fastchat_grpc.backends.capabilities import Feature
from fastchat_grpc.core import GenerateRequest, StopConditions, TextPrompt
from tests.conformance.fuzz import requests, supported_part
from tests.conformance.fuzz_run import WIDTH, Fuzz, reduced
from tests.conformance.fuzz_watch import ANSWERS, QUIET_S, STILL_S, Progress, StuckError, brief, resident, watched
from tests.conformance.harness import Harness, request
from tests.conformance.targets import TARGETS, chosen

pytestmark = pytest.mark.asyncio(loop_scope="session")

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
SECONDS = float(os.environ.get("FUZZ_SECONDS", "14400" if "FUZZ_EXAMPLES" in os.environ else "30"))
"""Of each backend; what is left of its examples then is not run, as the last line says."""
SKIPPED = int(os.environ.get("FUZZ_SKIPPED", "0"))
"""Of the first examples, so that a failure is met again sooner."""
RUNNING = os.environ.get("FUZZ_RUNNING", "")
"""A file that tells what ran last, where it has ended the process."""
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
    loop = asyncio.get_running_loop()
    began = monotonic()
    batch: list[GenerateRequest] = []
    drawn = 0

    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\n{harness.target.label or harness.target.name}: {text}", end=" ", flush=True)

    def report() -> None:
        ended = ", ".join(f"{name} {count}" for name, count in fuzz.seen.most_common())
        took, memory = monotonic() - began, resident() >> 20
        show(f"{fuzz.seen.total()} examples of seed {SEED} in {took:.0f} s, {memory} MiB ({ended})")

    def flush() -> None:
        if RUNNING:
            Path(RUNNING).write_text("\n".join(map(brief, batch)))
        asyncio.run_coroutine_threadsafe(fuzz.run(batch), loop).result()
        batch.clear()
        if fuzz.seen.total() % REPORTED_EVERY < WIDTH <= EXAMPLES - fuzz.seen.total():
            report()

    def take(asked: GenerateRequest, whole: int) -> None:
        nonlocal drawn
        drawn += 1
        if drawn > SKIPPED and monotonic() - began < SECONDS:
            batch.append(supported_part(asked, harness.traits) if whole else asked)
            if len(batch) == WIDTH:
                flush()

    fuzz = Fuzz(harness, show)
    await fuzz.start()
    await asyncio.to_thread(draw, take)
    if batch:
        await fuzz.run(batch)
    report()
    assert not fuzz.failures, f"{len(fuzz.failures)} failures, as above"


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


async def test_a_request_that_must_have_a_length_is_made_shorter() -> None:
    async def fails(asked: GenerateRequest) -> bool:
        return asked.stopping.min_new_tokens > 2

    smallest = await reduced(request("Hello", min_new_tokens=11, max_new_tokens=11), fails, monotonic() + 60)
    assert smallest.stopping == StopConditions(max_new_tokens=5, min_new_tokens=5)


async def test_a_slow_machine_is_no_fault_and_a_stuck_request_is() -> None:
    now = 0.0
    progress = Progress(lambda: now)
    stuck = progress.mark()
    beside = progress.mark()
    for _ in range(ANSWERS - 1):  # one answer in a minute: it is slow for everybody
        now += 2 * QUIET_S
        progress.moved(beside)
        progress.answered()
        assert not progress.problem(stuck)
    progress.moved(beside)
    progress.answered()
    assert f"answered {ANSWERS} times" in progress.problem(stuck)
    assert not progress.problem(beside)
    now += STILL_S + 1
    assert "no request got anything" in progress.problem(beside)


async def test_what_is_stuck_is_left() -> None:
    now = 0.0
    progress = Progress(lambda: now)
    left = False

    async def work(mark: object) -> None:
        nonlocal now, left
        now = STILL_S + 1
        try:
            await asyncio.Event().wait()
        finally:
            left = True

    with pytest.raises(StuckError, match="no request got anything"):
        await watched(progress, work)
    assert left


async def test_a_request_is_told_by_what_is_not_plain_in_it() -> None:
    asked = request("Hello", temperature=0.5, n=3, max_new_tokens=2, priority=4)
    told = "TextPrompt(text='Hello'), sampling.temperature=0.5, stopping.max_new_tokens=2, output.n=3, priority=4"
    assert brief(asked) == told


@pytest.mark.parametrize("tokens", [400, 10_000])
async def test_at_least_more_tokens_than_there_is_room_for_is_served_to_the_room(harness: Harness, tokens: int) -> None:
    if not harness.supports(Feature.MIN_NEW_TOKENS, Feature.TOKEN_PROMPT):
        pytest.skip("refuses min tokens")
    prompt = (await harness.tokens_of("one two three four"))[:1] * 480
    result = await harness.run(request(prompt, max_new_tokens=tokens, min_new_tokens=tokens))
    assert result.first.tokens <= 32
