"""Tool calls in model output: every format, however the text is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat_grpc.openai.tools.parser import ToolCallParser
from fastchat_grpc.openai.tools.pieces import CallArguments, CallStart, Content

NAMES = ("weather", "time")
ARGUMENTS = '{"city": "Oslo {}[]\\" </tool_call>", "deep": {"a": [1, 2, {"b": null}]}}'


def parse(pieces: Sequence[str], *, parallel: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """Content, and name and arguments of each call. Checks that starts precede arguments."""
    parser = ToolCallParser(NAMES, parallel=parallel)
    content, calls = "", []
    for piece in [item for text in pieces for item in parser.feed(text)] + parser.close():
        match piece:
            case Content(text):
                content += text
            case CallStart(index, name):
                assert index == len(calls)
                calls.append([name, ""])
            case CallArguments(index, text):
                assert index == len(calls) - 1
                calls[index][1] += text
    assert parser.called is bool(calls)
    return content, [(name, arguments) for name, arguments in calls]


ONE = [("weather", ARGUMENTS)]
ONE_BLOCK = '<tool_call>{"name": "time", "arguments": {}}'
TWO = [("weather", ARGUMENTS), ("time", "{}")]
FORMATS = [
    (f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>', "", ONE),
    (f'<tool_call>{{"arguments": {ARGUMENTS}, "name": "weather"}}</tool_call>', "", ONE),
    (f'Sure.\n\n<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}}}</tool_call>', "Sure.", ONE),
    (
        f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}}}</tool_call>\n'
        '<tool_call>{"name": "time", "arguments": {}}</tool_call>\n',
        "",
        TWO,
    ),
    (f'<tool_call>{{"name": "weather", "arguments": {json.dumps(ARGUMENTS)}}}</tool_call>', "", ONE),
    ('<tool_call>{"name": "time"}</tool_call>', "", [("time", "{}")]),
    (f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}}}', "", ONE),
    (f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}}}]', "", ONE),
    (
        f'[TOOL_CALLS][{{"name": "weather", "arguments": {ARGUMENTS}, "id": "a"}}, '
        '{"name": "time", "arguments": {}}]',
        "",
        TWO,
    ),
    (f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}", "", ONE),
    (f"[TOOL_CALLS]weather{ARGUMENTS}[TOOL_CALLS]time[ARGS]{{}}", "", TWO),
    (f"[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{ARGUMENTS}", "", ONE),
    (
        '<think>maybe <tool_call>{"name": "time", "arguments": {}}</tool_call> no</think>\n'
        f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}}}</tool_call>',
        '<think>maybe <tool_call>{"name": "time", "arguments": {}}</tool_call> no</think>',
        ONE,
    ),
    (
        f'[THINK]{{"name": "time", "parameters": {{}}}}[/THINK]{{"name": "weather", "parameters": {ARGUMENTS}}}',
        '[THINK]{"name": "time", "parameters": {}}[/THINK]',
        ONE,
    ),
    ('<tool_call>{"name": "time", "arguments": ""}</tool_call>', "", [("time", "{}")]),
    ('<tool_call>{"name": "time", "arguments": null}</tool_call>', "", [("time", "{}")]),
    ('<tool_call>{"name": "time", "arguments": [1]}</tool_call>', "", [("time", "[1]")]),
    (f'<|python_tag|>{{"name": "weather", "parameters": {ARGUMENTS}}}', "", ONE),
    (
        f'<|python_tag|>{{"name": "weather", "parameters": {ARGUMENTS}}}; {{"name": "time", "parameters": {{}}}}',
        "",
        TWO,
    ),
    (f'{{"name": "weather", "parameters": {ARGUMENTS}}}', "", ONE),
    (f'\n{{"type": "function", "name": "weather", "parameters": {ARGUMENTS}}}', "", ONE),
    (f'[{{"name": "weather", "parameters": {ARGUMENTS}}}, {{"name": "time", "parameters": {{}}}}]', "", TWO),
]


@pytest.mark.parametrize(("text", "content", "calls"), FORMATS, ids=lambda value: str(value)[:30])
def test_a_call_is_found_whole_and_character_by_character(
    text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert parse([text]) == (content, calls)
    assert parse(list(text)) == (content, calls)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_a_call_is_found_however_its_text_is_cut(
    example: tuple[str, str, list[tuple[str, str]]], data: st.DataObject
) -> None:
    text, content, calls = example
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    assert parse([text[a:b] for a, b in pairwise(edges)]) == (content, calls)


NO_CALLS = [
    "just text",
    "a < b and [1, 2]",
    '{"answer": 42}',
    '{"name": "Bob", "age": 3}',
    '{"name": "weather"}',
    '{"name": "weather", "temperature": 3}',
    "[1, 2, 3]",
    "<tool_call>not json",
    '<tool_call>{"name": 5}',
    '<tool_call>{"arguments": {}}</tool_call>',
    "<|python_tag|>print(1)",
    "[TOOL_CALLS]",
    "<tool_",
    "{",
    "",
    "   ",
    "<tool_call>{} and more <b>text</b>",
    "use <tool_call> hmm",
    "a \n\t<tool_call> \n[TOOL_CALLS]  x <|python_tag|> y ",
    '<think>perhaps {"name": "weather", "parameters": {}}',
    '<think>\n[TOOL_CALLS]weather[ARGS]{"a": 1}</think> \n none',
    "<thin",
]


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_comes_back_as_it_was(text: str) -> None:
    assert parse([text]) == (text, [])
    assert parse(list(text)) == (text, [])


FRAGMENTS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "{", "}", '"name"', ":", " "]
FRAGMENTS += ["<think>", "</think>", "[CALL_ID]", "null"]
FRAGMENTS += ['"weather"', '"arguments"', "[", "]", ",", '"', "\\", "x", "1", "\n", "<", "weather"]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=25))
def test_any_text_is_parsed_alike_whole_and_in_pieces(fragments: list[str]) -> None:
    text = "".join(fragments)
    whole, pieces = parse([text]), parse(list(text))
    assert whole == pieces
    if not whole[1]:
        assert whole[0] == text


def test_only_the_first_call_is_kept_where_calls_must_not_be_parallel() -> None:
    text = '<tool_call>{"name": "time", "arguments": {}}</tool_call>' * 2
    assert parse([text], parallel=False) == ("", [("time", "{}")])


def test_a_call_that_is_cut_short_keeps_what_it_has() -> None:
    assert parse(['<tool_call>{"name": "time", "arguments": {"zone": "Eur']) == ("", [("time", '{"zone": "Eur')])


def test_text_before_a_call_is_not_held_back() -> None:
    parser = ToolCallParser(NAMES)
    assert parser.feed("Let me see") == [Content("Let me see")]
    assert parser.feed(". <tool") == [Content(".")]
    assert parser.feed("box>") == [Content(" <toolbox>")]


@pytest.mark.parametrize("text", ["a" + " " * 5000, "<tool_call>" + ", " * 2500, "[" * 5000, ONE_BLOCK + "\n" * 5000])
def test_what_a_model_writes_for_ever_is_not_looked_at_again_and_again(text: str) -> None:
    parser = ToolCallParser(NAMES)
    for character in text:
        parser.feed(character)
        assert len(parser._text) < 400


def test_white_space_before_a_call_is_not_told_unless_there_is_very_much() -> None:
    for blanks, told in ((0, 0), (10, 0), (1000, 1000 - 256)):
        text = "Sure." + "\n" * blanks + ONE_BLOCK
        assert parse([text]) == parse(list(text)) == ("Sure." + "\n" * told, [("time", "{}")])
