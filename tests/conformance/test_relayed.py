"""Every backend through a controller, and past a worker that dies in the middle: what runs straight must run there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from fastchat_grpc.backends.capabilities import GRAMMARS, Feature
from fastchat_grpc.core import Capability, ChatPrompt, Event, GenerateRequest, Grammar, GrammarKind, Tool
from tests.conformance.harness import (
    PROMPT,
    Harness,
    Result,
    chat,
    empty,
    grammar_request,
    lively,
    request,
    take,
)
from tests.conformance.relayed import relayed

pytestmark = pytest.mark.asyncio(loop_scope="session")

TOKENS = 24
SCHEMA = '{"type": "object", "properties": {"z": {"type": "integer", "minimum": 1}, "a": {"type": "string"}}}'


def _long(harness: Harness, prompt: Any = PROMPT, **fields: Any) -> GenerateRequest:
    """A request that ends by its length, and sends every token by itself."""
    if harness.supports(Feature.IGNORE_EOS):
        fields["ignore_eos"] = True
    return request(prompt, **{"max_new_tokens": TOKENS, "stream_interval": 1, **fields})


def _with_tools(harness: Harness) -> GenerateRequest:
    asked = _long(harness, chat("What is the weather in Paris?"))
    assert isinstance(asked.prompt, ChatPrompt)
    return replace(asked, prompt=replace(asked.prompt, tools=(Tool(name="weather", parameters_json=SCHEMA),)))


def _schema(harness: Harness) -> GenerateRequest:
    grammar = Grammar(GrammarKind.JSON_SCHEMA, SCHEMA)
    return grammar_request(grammar, max_new_tokens=TOKENS, stream_interval=1)


@dataclass(frozen=True)
class Case:
    """A request, what a backend needs for it, and whether it draws random numbers."""

    make: Callable[[Harness], GenerateRequest]
    needs: tuple[Feature, ...] = ()
    draws: bool = False
    grammar: bool = False


CASES: dict[str, Case] = {
    "greedy": Case(_long),
    "sampled": Case(lambda h: _long(h, **lively(h)), draws=True),
    "seeded": Case(lambda h: _long(h, seed=11, **lively(h)), (Feature.SEED,), draws=True),
    "tools": Case(_with_tools, (Feature.CHAT,)),
    "grammar": Case(_schema, (GRAMMARS[GrammarKind.JSON_SCHEMA], Feature.CHAT), grammar=True),
    "two choices": Case(lambda h: _long(h, n=2, seed=5, **lively(h)), (Feature.N, Feature.SEED), draws=True),
    "two choices without a seed": Case(lambda h: _long(h, n=2, **lively(h)), (Feature.N,), draws=True),
    "logprobs": Case(lambda h: _long(h, logprobs=0), (Feature.LOGPROBS,)),
    "penalties": Case(lambda h: _long(h, presence_penalty=0.5), (Feature.PRESENCE_PENALTY,)),
    "stops": Case(lambda h: _long(h, stop=("\n\n\n", "Q:"), echo=h.supports(Feature.ECHO)), ()),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, harness: Harness) -> Case:
    """A case that the backend can do."""
    found = CASES[request.param]
    if lacking := [feature.value for feature in found.needs if not harness.supports(feature)]:
        pytest.skip(f"the backend has no {', '.join(lacking)}")
    if found.make is _with_tools and "tools" not in harness.backend.chat_template("tested"):
        pytest.skip("the model's chat template takes no tools")
    return found


async def test_what_runs_straight_runs_through_a_controller(harness: Harness, case: Case) -> None:
    asked = case.make(harness)
    async with relayed(harness) as site:
        through = _collect(asked, await site.run(asked))
    straight = await harness.run(asked)
    _compare(harness, case, asked, straight, through)


async def test_a_stream_goes_on_when_its_worker_dies(harness: Harness, case: Case) -> None:
    if not harness.supports(Feature.RESUME):
        pytest.skip("streams of this backend are not resumed")
    asked = case.make(harness)
    if _needs_state(asked) and not harness.supports(Feature.RESUME_STATE):
        pytest.skip("this backend does not resume what depends on earlier output; that it says so is tested elsewhere")
    if asked.sampling.seed is not None and Capability.SEEDED_RESUME not in harness.info.capabilities:
        pytest.skip("this backend cannot go on with a seed; that it says so is tested elsewhere")
    async with relayed(harness) as site:
        events = await site.run(asked, kill_after=5)
        assert len(site.workers) == 1, "the stream was over before its worker could be killed"
    straight = await harness.run(asked)
    _compare(harness, case, asked, straight, _collect(asked, events))


def _needs_state(asked: GenerateRequest) -> bool:
    sampling = asked.sampling
    return asked.grammar is not None or bool(sampling.presence_penalty or sampling.frequency_penalty)


def _collect(asked: GenerateRequest, events: Sequence[Event]) -> Result:
    result = empty(asked)
    for event in events:
        take(result, event, asked)
    for choice in result.choices.values():
        assert choice.completion is not None, "every choice ends with one Completion"
    return result


def _compare(harness: Harness, case: Case, asked: GenerateRequest, straight: Result, through: Result) -> None:
    assert set(straight.choices) == set(through.choices)
    drawn = case.draws and asked.sampling.seed is None
    for index, right in straight.choices.items():
        found = through.choices[index]
        assert found.tokens == len(found.token_ids) or not harness.supports(Feature.TOKEN_IDS)
        assert found.prompt_tokens == right.prompt_tokens
        if drawn:
            assert found.tokens == TOKENS or found.completion is not None
            continue
        assert found.text == right.text
        assert found.token_ids == right.token_ids
        assert found.finish is right.finish
    if case.grammar and through.first.finish.value == "stop":
        json.loads(through.text)
