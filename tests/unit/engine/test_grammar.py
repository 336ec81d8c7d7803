"""Structured output by llguidance."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

pytest.importorskip("llguidance")

from fastchat_grpc.backends.echo import EOS, EchoTokenizer
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
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.text.grammar import KEPT_GRAMMARS, GrammarCompiler
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
        sampling=SamplingParams(seed=seed, logit_bias=more.pop("logit_bias", {ord(c): -100.0 for c in " \t\r\n"})),
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
    assert re.fullmatch("(yes|no)[0-9]{3}", sink.text())
    assert sink.error is None
    assert sink.completions()[0].finish_reason is FinishReason.STOP
    assert sink.completions()[0].usage.completion_tokens == len(sink.text()) + 1


EMPTY = [
    Grammar(GrammarKind.REGEX, "[a&&b]"),
    Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "#"}'),
    Grammar(GrammarKind.JSON_SCHEMA, '{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}'),
    Grammar(GrammarKind.JSON_SCHEMA, '{"allOf": [{"type": "string"}, {"type": "integer"}]}'),
]


@pytest.mark.parametrize("grammar", EMPTY, ids=str)
def test_a_grammar_that_nothing_follows_is_refused_before_anything_runs(compiler, grammar):
    with pytest.raises(InvalidArgument) as caught:
        compiler.compile(grammar)
    assert caught.value.field == f"structured_output.{grammar.kind.value}"


def test_a_grammar_that_fails_on_the_way_fails_its_request_alone(harness, compiler):
    grammar = GRAMMARS["regex"]
    broken = compiler.compile(grammar)

    class Fragile:
        ended = False
        steps = 0

        def mask(self, logits):
            self.steps += 1
            if self.steps == 3:
                raise InvalidArgument("structured_output.regex", "too large")

        def accept(self, token):
            pass

    class Begins:
        def begin(self, output):
            return Fragile()

    others = [harness.submit(request(None, seed)) for seed in range(3)]
    failing = harness.submit(request(grammar, 9), Begins())
    bound = harness.submit(request(grammar, 9), broken)
    assert isinstance(failing.wait().error, InvalidArgument)
    assert len(failing.tokens()) == 2
    assert re.fullmatch("(yes|no)[0-9]{3}", bound.wait().text())
    assert [sink.wait().error for sink in others] == [None] * 3


def test_json_holds_a_line_break_and_an_indent_between_its_parts_and_no_more(harness, compiler):
    """A model that loves blanks must get on with it: what it may say is bounded."""
    grammar = GRAMMARS["schema"]
    love = {ord(c): 90.0 for c in " \t\r\n"}
    generation = request(grammar, logit_bias=love)
    generation = replace(generation, stopping=StopConditions(max_new_tokens=500))
    sink = harness.submit(generation, compiler.compile(grammar)).wait()
    assert sink.completions()[0].finish_reason is FinishReason.STOP
    assert set(json.loads(sink.text())) == {"a", "b"}
    assert max(map(len, re.findall(r"\s+", sink.text()))) <= 34


@pytest.mark.parametrize("indent", [None, 2, 8])
def test_pretty_printed_json_is_allowed(compiler, indent):
    text = json.dumps({"a": [1, {"b": {"c": []}}], "d": "x y"}, indent=indent)
    state = compiler.compile(Grammar(GrammarKind.JSON_OBJECT)).begin(text.encode())
    assert state.allowed()[EOS]


def test_the_same_grammar_is_compiled_once(compiler, monkeypatch):
    grammar = Grammar(GrammarKind.REGEX, "once+")
    compiled = []
    compile_ = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda g: compiled.append(g) or compile_(g))
    for _ in range(3):
        compiler.compile(grammar)
    assert compiled == [grammar]
    for i in range(KEPT_GRAMMARS):
        compiler.compile(Grammar(GrammarKind.REGEX, f"x{i}"))
    assert len(compiler._compiled) == KEPT_GRAMMARS
    compiler.compile(grammar)
    assert compiled[-1] == grammar


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


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (Grammar(GrammarKind.REGEX, "("), "unclosed group"),
        (Grammar(GrammarKind.REGEX, "(?=a)b"), "look-ahead"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "string", "pattern": "^(?!a).*$"}'), "look-ahead"),
        (Grammar(GrammarKind.LARK, "start: foo"), "unknown name"),
    ],
)
def test_a_wrong_grammar_is_refused_with_the_reason_in_one_line(compiler, grammar, why):
    with pytest.raises(InvalidArgument) as caught:
        compiler.compile(grammar)
    assert why in caught.value.description
    assert "\n" not in caught.value.description
