"""Whatever a request holds, it is served or refused, and the request beside it does not notice.

`make fuzz NAME=openvino ARGS=10000` runs more examples than CI does, without a limit of time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from time import monotonic

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from fastchat_grpc.backends.capabilities import Feature
from fastchat_grpc.core import Completion, GenerateRequest
from fastchat_grpc.errors import AdapterNotFound, FastChatError, InvalidArgument, NotSupported, OutOfMemory
from tests.conformance.fuzz import requests, supported_part
from tests.conformance.harness import Harness, empty, request, take
from tests.conformance.targets import TARGETS, chosen

pytestmark = pytest.mark.asyncio(loop_scope="session")

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
SECONDS = float(os.environ.get("FUZZ_SECONDS", "14400" if "FUZZ_EXAMPLES" in os.environ else "30"))
"""Of each backend; what is left of its examples then passes unseen, as the statistics say."""
MOST_EVENTS = 40
"""After so many the caller leaves, as callers do: long outputs are cut, and so are engines' sequences."""
TIMEOUT_S = 60.0
NEIGHBOUR = "1 2 3 4 5 6 7 8 9 10 11"
"""A text whose continuation no rounding changes."""
REFUSALS = (InvalidArgument, AdapterNotFound, NotSupported, OutOfMemory)

_undisturbed: dict[str, list[int] | str] = {}
_ends: dict[str, float] = {}


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


async def neighbour(harness: Harness) -> list[int] | str:
    """Tokens of a plain greedy request, or its text where a backend has no tokens."""
    result = await harness.ask(NEIGHBOUR, max_new_tokens=6)
    return result.token_ids or result.text


async def outcome(harness: Harness, asked: GenerateRequest) -> str:
    """Serve a request as far as a caller may want, and say how it ended. Raises what is nobody's fault but ours."""
    result, count = empty(asked), 0
    try:
        async with asyncio.timeout(TIMEOUT_S), aclosing(harness.backend.generate(asked)) as events:
            async for item in events:
                take(result, item, asked)
                count += not isinstance(item, Completion)
                if count == MOST_EVENTS:
                    return "left"
    except REFUSALS as error:
        return f"refused: {type(error).__name__}"
    assert all(choice.completion is not None for choice in result.choices.values())
    return "served"


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    phases=(Phase.generate, Phase.shrink) if EXAMPLES > 1000 else (Phase.generate,),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(asked=requests(), whole=st.integers(0, 4))
@pytest.mark.timeout(14_400)
async def test_fuzz(harness: Harness, asked: GenerateRequest, whole: int) -> None:
    if whole:
        asked = supported_part(asked, harness.traits)
    key = harness.target.label or harness.target.name
    if key not in _undisturbed:
        _undisturbed[key] = await neighbour(harness)
        _ends[key] = monotonic() + SECONDS
    if monotonic() > _ends[key]:
        event("out of time")
        return
    beside = asyncio.create_task(neighbour(harness))
    try:
        ended = await outcome(harness, asked)
    except FastChatError as error:
        raise AssertionError(f"{type(error).__name__} of {asked}: {error}") from error
    finally:
        text = await asyncio.gather(beside, return_exceptions=True)
    event(ended)
    assert text == [_undisturbed[key]], f"beside {asked}"


@pytest.mark.parametrize("tokens", [400, 10_000])
async def test_at_least_more_tokens_than_there_is_room_for_is_served_to_the_room(harness: Harness, tokens: int) -> None:
    if not harness.supports(Feature.MIN_NEW_TOKENS, Feature.TOKEN_PROMPT):
        pytest.skip("refuses min tokens")
    prompt = (await harness.tokens_of("one two three four"))[:1] * 480
    result = await harness.run(request(prompt, max_new_tokens=tokens, min_new_tokens=tokens))
    assert result.first.tokens <= 32
