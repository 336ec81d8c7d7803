"""Calls that are no JSON objects, with the outputs and values of vLLM's own tests of these formats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat_grpc.core import Tool
from fastchat_grpc.openai.tools.parser import ToolCallParser
from fastchat_grpc.openai.tools.pieces import CallArguments, CallStart, Content


def tool(name: str, **properties: Any) -> Tool:
    return Tool(name=name, parameters_json=json.dumps({"type": "object", "properties": properties}))


STRING = {"type": "string"}
NULLABLE = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
TOOLS = (
    tool("get_current_weather", city=STRING, state=STRING, unit={"type": "string", "enum": ["fahrenheit", "celsius"]}),
    tool("calculate_area", shape=STRING, dimensions={"type": "object"}, precision={"type": "integer"}),
    tool(
        "test_types",
        int_param={"type": "integer"},
        float_param={"type": "float"},
        bool_param={"type": "boolean"},
        str_param=STRING,
        obj_param={"type": "object"},
        any_param={},
    ),
    tool(
        "test_anyof",
        anyof_int=NULLABLE,
        anyof_str={"anyOf": [STRING, {"type": "null"}]},
        anyof_array={"anyOf": [{"type": "array", "items": STRING}, {"type": "null"}]},
        type_as_array={"type": ["integer", "null"]},
        multi_non_null={"anyOf": [STRING, {"type": "integer"}, {"type": "null"}]},
    ),
    *map(tool, ("get_weather", "register_user", "do_something_cool", "foo", "bar")),
)
NAMES = tuple(item.name for item in TOOLS)


def parse(pieces: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """Content, and name and arguments of each call."""
    parser = ToolCallParser(NAMES, tools=TOOLS)
    content, calls = "", []
    for piece in [item for text in pieces for item in parser.feed(text)] + parser.close():
        match piece:
            case Content(text):
                content += text
            case CallStart(index, name):
                assert index == len(calls)
                calls.append([name, ""])
            case CallArguments(index, text):
                calls[index][1] += text
    return content, [(name, arguments) for name, arguments in calls]


def xml(name: str, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<function={name}>\n{parameters}</function>"


def block(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


DALLAS = xml("get_current_weather", city="Dallas", state="TX", unit="fahrenheit")
DALLAS_CALL = ("get_current_weather", {"city": "Dallas", "state": "TX", "unit": "fahrenheit"})
AREA = xml("calculate_area", shape="circle", dimensions='{"radius": 15.5}', precision="3")
AREA_CALL = ("calculate_area", {"shape": "circle", "dimensions": {"radius": 15.5}, "precision": 3})
TYPES = {"int_param": "42", "float_param": "3.14", "bool_param": "true", "str_param": "hello world"}
CODE = "def f(a):\n    return a < 1 and \"<b>\" or '\\n' # é"
QWEN = [
    (block(DALLAS), "", [DALLAS_CALL]),
    (
        f"Sure! Let me check the weather for you.{block(DALLAS)}",
        "Sure! Let me check the weather for you.",
        [DALLAS_CALL],
    ),
    (f"{block(DALLAS)}\n{block(AREA)}", "", [DALLAS_CALL, AREA_CALL]),
    (DALLAS, "", [DALLAS_CALL]),
    (f"{DALLAS}\n</tool_call>", "", [DALLAS_CALL]),
    (block("<function=foo>\n</function>"), "", [("foo", {})]),
    (
        block(xml("test_types", **TYPES, obj_param='{"key": "value"}')),
        "",
        [
            (
                "test_types",
                {
                    "int_param": 42,
                    "float_param": 3.14,
                    "bool_param": True,
                    "str_param": "hello world",
                    "obj_param": {"key": "value"},
                },
            )
        ],
    ),
    (
        block(
            xml(
                "test_anyof",
                anyof_int="5",
                anyof_str="hello",
                anyof_array='["a", "b"]',
                type_as_array="42",
                multi_non_null="some text",
            )
        ),
        "",
        [
            (
                "test_anyof",
                {
                    "anyof_int": 5,
                    "anyof_str": "hello",
                    "anyof_array": ["a", "b"],
                    "type_as_array": 42,
                    "multi_non_null": "some text",
                },
            )
        ],
    ),
    (
        block(xml("test_anyof", anyof_int="null", anyof_str="null")),
        "",
        [("test_anyof", {"anyof_int": None, "anyof_str": None})],
    ),
    # What is not of its type stays as it is written; Python's spelling of a value is read.
    (
        block(
            xml(
                "test_types",
                int_param="many",
                bool_param="False",
                str_param="null",
                obj_param="{'a': None}",
                any_param="[1]",
                other="5",
            )
        ),
        "",
        [
            (
                "test_types",
                {
                    "int_param": "many",
                    "bool_param": False,
                    "str_param": "null",
                    "obj_param": {"a": None},
                    "any_param": [1],
                    "other": "5",
                },
            )
        ],
    ),
    (
        block(xml("get_current_weather", city=CODE, state="\n two lines \n")),
        "",
        [("get_current_weather", {"city": CODE, "state": "\n two lines \n"})],
    ),
    # The end of a parameter is forgotten, or that of the function.
    (block(DALLAS.replace("Dallas\n</parameter>", "Dallas")), "", [DALLAS_CALL]),
    (block(DALLAS.replace("</function>", "")), "", [DALLAS_CALL]),
    (f"<think>\n{block(AREA)}</think>{block(DALLAS)}", f"<think>\n{block(AREA)}</think>", [DALLAS_CALL]),
]
SIMPLE = "get_weather(city='San Francisco', metric='celsius')"
SIMPLE_CALL = ("get_weather", {"city": "San Francisco", "metric": "celsius"})
MORE = (
    "register_user(name='John Doe', age=37, address={'city': 'San Francisco', 'state': 'CA'}, role=None, "
    "passed_test=True, aliases=['John', 'Johnny'])"
)
MORE_CALL = (
    "register_user",
    {
        "name": "John Doe",
        "age": 37,
        "address": {"city": "San Francisco", "state": "CA"},
        "role": None,
        "passed_test": True,
        "aliases": ["John", "Johnny"],
    },
)
ESCAPED = r"get_weather(city='Martha\'s Vineyard', metric='\"cool units\"')"
PYTHONIC = [
    (f"[{SIMPLE}]", "", [SIMPLE_CALL]),
    (f"[{MORE}]", "", [MORE_CALL]),
    ("[get_weather()]", "", [("get_weather", {})]),
    ("[do_something_cool(additional_data={})]", "", [("do_something_cool", {"additional_data": {}})]),
    ("[do_something_cool(steps=[])]", "", [("do_something_cool", {"steps": []})]),
    (f"[{ESCAPED}]", "", [("get_weather", {"city": "Martha's Vineyard", "metric": '"cool units"'})]),
    (f"[{SIMPLE}, {MORE}]", "", [SIMPLE_CALL, MORE_CALL]),
    ("[foo(a='),](=', b=-1.5,)]", "", [("foo", {"a": "),](=", "b": -1.5})]),
    (f"<|python_start|>[{SIMPLE}]<|python_end|>", "", [SIMPLE_CALL]),
    (f"<|python_start|>[{SIMPLE},foo()]", "", [SIMPLE_CALL, ("foo", {})]),
    (f"Let me see.<|python_start|>[{SIMPLE}]<|python_end|>", "Let me see.", [SIMPLE_CALL]),
]
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def v3(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


def v31(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


VARIOUS = (
    '{"string_field": "hello", "int_field": 42, "null_field": null, "array_field": ["a", "b"], '
    '"object_field": {"nested": "value"}, "text": "He said \\"hello\\"", "path": "C:\\\\Users\\\\file"}'
)
DEEPSEEK = [
    (f"{BEGIN}{v3('get_weather', VARIOUS)}{END}", "", [("get_weather", json.loads(VARIOUS))]),
    (
        f"{BEGIN}{v3('get_weather', '{}')}{v3('foo', VARIOUS)}{END}",
        "",
        [("get_weather", {}), ("foo", json.loads(VARIOUS))],
    ),
    (f"{BEGIN}{v3('foo', '{}')}\n{v3('bar', '{}')}{END}", "", [("foo", {}), ("bar", {})]),
    (f"Let me check.{BEGIN}{v3('get_weather', VARIOUS)}{END}", "Let me check.", [("get_weather", json.loads(VARIOUS))]),
    (f"normal text{BEGIN}{v31('foo', VARIOUS)}{END}", "normal text", [("foo", json.loads(VARIOUS))]),
    (f"{BEGIN}{v31('foo', VARIOUS)}{v31('bar', '{}')}{END}", "", [("foo", json.loads(VARIOUS)), ("bar", {})]),
    (f"{BEGIN}{v31('foo', '{}')}", "", [("foo", {})]),
]
FORMATS = QWEN + PYTHONIC + DEEPSEEK


def known(found: tuple[str, list[tuple[str, str]]]) -> tuple[str, list[tuple[str, Any]]]:
    content, calls = found
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize(("text", "content", "calls"), FORMATS, ids=lambda value: str(value)[:30])
def test_a_call_is_found_whole_and_character_by_character(
    text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    assert known(parse([text])) == (content, calls)
    assert parse(list(text)) == parse([text])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_a_call_is_found_however_its_text_is_cut(example: tuple[str, str, list[Any]], data: st.DataObject) -> None:
    text, content, calls = example
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    assert known(parse([text[a:b] for a, b in pairwise([0, *cuts, len(text)])])) == (content, calls)


NO_CALLS = [
    "<tool_call>\n<function=",
    "<tool_call>\n<function=foo> bar",
    "<tool_call><function=foo bar></function></tool_call>",
    "<tool_call><functions></tool_call>",
    "use <function=name> and <function>",
    '<function=foo>{"a": 1}</function>',
    "<function=foo></tool_call>",
    "<function=" + "x" * 200,
    "[foo",
    "[foo]",
    "[see (there)](http://x)",
    "[unknown(a=1)]",
    "[foo(1)]",
    "[foo(a=b'z')]",
    "[foo(a=1e999)]",
    "[foo(a=open('x'))]",
    "[foo(a={1: {2}})]",
    "[foo(a=" + "[" * 300 + "]" * 300 + ")]",
    "foo(a=1)",
    "And [foo(a=1)]",
    "<|python_start|>print(1)<|python_end|>",
    "Let me look that up.<｜tool▁calls▁begin｜>get_weather",
    '<｜tool▁calls▁begin｜>foo<｜tool▁sep｜>{"x":1}<｜tool▁calls▁end｜>',
    '<｜tool▁calls▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Tokyo"}\n```<｜tool▁calls▁end｜>',
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>foo\n```python\n{}\n```",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>a b<｜tool▁sep｜>{}",
]


@pytest.mark.parametrize("text", NO_CALLS, ids=lambda text: text[:40])
def test_what_is_no_call_comes_back_as_it_was(text: str) -> None:
    assert parse([text]) == (text, [])
    assert parse(list(text)) == (text, [])


FRAGMENTS = ["<tool_call>", "</tool_call>", "<function=", "foo", ">", "</function>", "<parameter=", "a", "</parameter>"]
FRAGMENTS += [
    "\n",
    "[",
    "]",
    "(",
    ")",
    "=",
    "1",
    ",",
    "'",
    '"',
    "\\",
    "{",
    "}",
    " ",
    "<|python_start|>",
    "<|python_end|>",
]
FRAGMENTS += [
    BEGIN,
    END,
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "function",
    "```json",
    "```",
    "<",
]
STARTS = ["", "[foo(", "<tool_call><function=foo><parameter=a>", "<|python_start|>[foo(a=", BEGIN, v31("foo", "{}")]


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(STARTS), st.lists(st.sampled_from(FRAGMENTS), max_size=20))
def test_any_text_is_parsed_alike_whole_and_in_pieces(start: str, fragments: list[str]) -> None:
    text = start + "".join(fragments)
    whole, pieces = parse([text]), parse(list(text))
    assert whole == pieces
    if not whole[1]:
        assert whole[0] == text


def test_a_long_string_comes_as_it_is_written_and_other_arguments_one_by_one() -> None:
    parser = ToolCallParser(NAMES, tools=TOOLS)
    parser.feed("<tool_call>\n<function=get_current_weather>\n<parameter=city>\nDal")
    assert parser.feed("las, a \n") == [CallArguments(0, "las, a ")]
    assert parser.feed("</param") == []
    assert parser.feed("s") == [CallArguments(0, "\\n</params")]
    parser = ToolCallParser(NAMES, tools=TOOLS)
    assert parser.feed("[foo(a=1") == []
    assert parser.feed(", b") == [CallStart(0, "foo"), CallArguments(0, '{"a": 1')]
    assert parser.feed("=2)") == [CallArguments(0, ', "b": 2}')]


def test_a_call_that_is_cut_short_keeps_what_it_has() -> None:
    assert parse(["<tool_call><function=get_current_weather><parameter=city>\nDal"]) == (
        "",
        [("get_current_weather", '{"city": "Dal')],
    )
