"""Grammars of forced calls, judged by a grammar engine of others: which texts they take."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastchat_grpc.core import Grammar, ModelInfo
from fastchat_grpc.errors import InvalidArgument, UnsupportedField
from fastchat_grpc.openai.chat_request import parse_chat
from tests.unit.openai.fakes import chat

MODEL = ModelInfo(name="m", context_length=100)
ITEM = {"type": "object", "properties": {"i": {"$ref": "#/$defs/Item"}}, "required": ["i"]}
SCHEMAS: dict[str, dict[str, Any]] = {
    "draft7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "definitions": {"P": {"type": "string"}},
        "properties": {"p": {"$ref": "#/definitions/P"}},
        "required": ["p"],
    },
    "recursive": {"type": "object", "properties": {"child": {"$ref": "#"}}},
    "at_the_root": {
        "$ref": "#/$defs/Args",
        "$defs": {"Args": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
    },
    "whole": {**ITEM, "$defs": {"Item": {"type": "integer"}}},
    "text": {**ITEM, "$defs": {"Item": {"type": "string"}}},
    "sibling": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"$ref": "#/properties/a"}},
        "required": ["b"],
    },
    "odd_names": {
        "type": "object",
        "properties": {"$ref": {"const": "#/x"}, "p": {"$ref": "#/$defs/a~1b"}},
        "$defs": {"a/b": {"enum": [{"$ref": "#/y"}]}},
        "required": ["$ref", "p"],
    },
}
TAKEN: list[tuple[str, Any, bool]] = [
    ("draft7", {"p": "x"}, True),
    ("draft7", {"p": 1}, False),
    ("recursive", {"child": {"child": {}}}, True),
    ("recursive", {"child": []}, False),
    ("at_the_root", {"x": 1}, True),
    ("at_the_root", {}, False),
    ("whole", {"i": 1}, True),
    ("whole", {"i": "s"}, False),
    ("text", {"i": "s"}, True),
    ("text", {"i": 1}, False),
    ("sibling", {"b": True}, True),
    ("sibling", {"b": 1}, False),
    ("odd_names", {"$ref": "#/x", "p": {"$ref": "#/y"}}, True),
]


def takes(grammar: Grammar, value: Any) -> bool:
    """Whether a grammar takes a text whole."""
    llguidance = pytest.importorskip("llguidance")
    text = json.dumps(value).encode()
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(grammar.source))
    assert not matcher.get_error()
    return matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting()


def grammar_of(**values: Any) -> Grammar:
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
    grammar = parse_chat(chat(**{"tools": tools, **values}), [MODEL]).generations[0].grammar
    assert grammar is not None
    return grammar


@pytest.mark.parametrize(("name", "arguments", "taken"), TAKEN, ids=str)
def test_a_forced_call_takes_what_its_tools_schema_takes(name: str, arguments: Any, taken: bool) -> None:
    named = grammar_of(tool_choice={"type": "function", "function": {"name": name}})
    assert takes(named, arguments) is taken
    required = grammar_of(tool_choice="required")
    assert takes(required, [{"name": name, "parameters": arguments}]) is taken


def test_calls_may_follow_each_other_unless_they_must_not() -> None:
    two = [{"name": "whole", "parameters": {"i": 1}}, {"name": "text", "parameters": {"i": "s"}}]
    assert takes(grammar_of(tool_choice="required"), two)
    assert not takes(grammar_of(tool_choice="required", parallel_tool_calls=False), two)
    assert not takes(grammar_of(tool_choice="required"), [])


@pytest.mark.parametrize("kind", ["response_format", "structured_outputs"])
def test_an_answer_with_a_schema_leaves_room_for_calls(kind: str) -> None:
    schema = {"type": "object", "properties": {"next": {"$ref": "#"}, "n": {"type": "integer"}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    values = {"response_format": wanted} if kind == "response_format" else {"structured_outputs": {"json": schema}}
    grammar = grammar_of(**values)
    assert takes(grammar, {"next": {"n": 1}, "n": 2})
    assert not takes(grammar, {"next": [], "n": 2})
    assert takes(grammar, [{"name": "text", "parameters": {"i": "s"}}])
    assert not takes(grammar, [{"name": "text", "parameters": {"i": 1}}])


def test_json_mode_leaves_room_for_calls_and_none_does_not() -> None:
    call = [{"name": "text", "parameters": {"i": "s"}}]
    assert takes(grammar_of(response_format={"type": "json_object"}), call)
    assert takes(grammar_of(response_format={"type": "json_object"}), {"any": ["thing"]})
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    assert not takes(grammar_of(response_format=schema, tool_choice="none"), call)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a"}, "tool_choice": "required"}, "structured_outputs.regex"),
        ({"guided_json": {}, "tool_choice": "required"}, "guided_json"),
        ({"guided_choice": ["a"]}, "guided_choice"),
    ],
    ids=str,
)
def test_grammars_that_keep_calls_out_are_refused_by_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedField) as caught:
        grammar_of(**values)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("#/$defs/Missing", InvalidArgument),
        ("#/required/9", InvalidArgument),
        ("other.json#/a", UnsupportedField),
        ("http://127.0.0.1/a.json", UnsupportedField),
        ("#anchor", UnsupportedField),
    ],
)
def test_a_reference_that_leads_nowhere_is_named(reference: str, kind: type[InvalidArgument]) -> None:
    bad = {"type": "object", "properties": {"p": {"$ref": reference}}, "required": ["p"]}
    tools = [{"type": "function", "function": {"name": name, "parameters": bad}} for name in ("a", "b")]
    for choice, field in (("required", "tools[0]"), ({"type": "function", "function": {"name": "b"}}, "tools[1]")):
        with pytest.raises(kind) as caught:
            grammar_of(tools=tools, tool_choice=choice)
        assert caught.value.field == f"{field}.function.parameters"
