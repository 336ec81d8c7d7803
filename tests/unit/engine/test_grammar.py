"""Structured output by llguidance."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("llguidance")

from fastchat_grpc.backends.echo import EchoTokenizer
from fastchat_grpc.core import (
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    ResumedChoice,
    SamplingParams,
    StopConditions,
    TokenPrompt,
)
from fastchat_grpc.engine.grammar import GrammarCompiler
from fastchat_grpc.errors import InvalidArgument
from tests.unit.engine.tiny import Harness, tiny

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)
GRAMMARS = {
    "schema": Grammar(GrammarKind.JSON_SCHEMA, SCHEMA),
    "regex": Grammar(GrammarKind.REGEX, "(yes|no)[0-9]{3}"),
    "lark": Grammar(GrammarKind.LARK, 'start: "<" /[a-c]{2}/ ">"'),
}


@pytest.fixture(scope="module")
def harness():
    with Harness(tiny("llama")) as running:
        yield running


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(EchoTokenizer())


def request(grammar, seed=0, **more):
    return GenerateRequest(
        prompt=TokenPrompt((1, 2, 3)),
        # JSON allows any amount of space between its parts, and a random model loves it.
        sampling=SamplingParams(seed=seed, logit_bias={ord(c): -100.0 for c in " \t\r\n"}),
        stopping=StopConditions(max_new_tokens=60, min_new_tokens=more.pop("minimum", 0)),
        grammar=grammar,
        **more,
    )


@pytest.mark.parametrize("kind", GRAMMARS)
def test_a_random_model_follows_the_grammar_and_ends(harness, compiler, kind):
    sinks = [harness.submit(request(GRAMMARS[kind], seed), compiler.compile(GRAMMARS[kind])) for seed in range(4)]
    for sink in sinks:
        text = sink.wait().text()
        assert sink.error is None
        assert sink.completions()[0].finish_reason is FinishReason.STOP
        match kind:
            case "schema":
                value = json.loads(text)
                assert isinstance(value["a"], bool)
                assert value["b"] in ("x", "y")
                assert set(value) == {"a", "b"}
            case "regex":
                assert re.fullmatch("(yes|no)[0-9]{3}", text)
            case "lark":
                assert re.fullmatch("<[a-c]{2}>", text)


def test_any_json_object_begins_as_one(harness, compiler):
    grammar = Grammar(GrammarKind.JSON_OBJECT)
    sink = harness.submit(request(grammar, 3), compiler.compile(grammar)).wait()
    assert sink.text().lstrip().startswith("{")


def test_constrained_and_free_requests_run_in_one_batch(harness, compiler):
    grammar = GRAMMARS["regex"]
    free = [harness.submit(request(None, seed)) for seed in range(3)]
    bound = harness.submit(request(grammar, 9), compiler.compile(grammar))
    assert re.fullmatch("(yes|no)[0-9]{3}", bound.wait().text())
    alone = harness.submit(request(None, 1)).wait()
    assert free[1].wait().tokens() == alone.tokens()


def test_the_end_is_allowed_before_min_new_tokens_where_the_grammar_allows_nothing_else(harness, compiler):
    grammar = GRAMMARS["regex"]
    sink = harness.submit(request(grammar, minimum=20), compiler.compile(grammar)).wait()
    assert sink.text().startswith(("yes", "no"))
    assert sink.error is None


def test_a_resumed_output_goes_on_within_its_grammar(harness, compiler):
    grammar = GRAMMARS["regex"]
    whole = harness.submit(request(grammar, 5), compiler.compile(grammar)).wait()
    resume = (ResumedChoice(index=0, output_token_ids=tuple(whole.tokens()[:3]), text_length=3),)
    rest = harness.submit(request(grammar, 5, resume=resume), compiler.compile(grammar)).wait()
    assert whole.text()[:3] + rest.text() == whole.text()


@pytest.mark.parametrize(
    ("grammar", "field"),
    [
        (Grammar(GrammarKind.JSON_SCHEMA, "{"), "structured_output.json_schema"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "nothing"}'), "structured_output.json_schema"),
        (Grammar(GrammarKind.REGEX, "("), "structured_output.regex"),
        (Grammar(GrammarKind.LARK, "start: nothing"), "structured_output.lark"),
    ],
)
def test_a_wrong_grammar_is_refused_by_its_field(compiler, grammar, field):
    with pytest.raises(InvalidArgument) as caught:
        compiler.compile(grammar)
    assert caught.value.field == field
