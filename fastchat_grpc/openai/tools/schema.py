"""JSON Schemas of outputs that are calls, put together from the schemas of tools.

A tool's schema refers to parts of itself from its own root: "#", "#/definitions/X", "#/properties/x". Where it becomes
a part of another schema, the whole of it gets a place of its own there and its references are turned to that place;
so equal names in two tools never meet.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from fastchat_grpc.core import Grammar, GrammarKind, Tool, ToolChoice
from fastchat_grpc.errors import InvalidArgument, UnsupportedField
from fastchat_grpc.openai.fields import shorten

_ROOT = "$defs"
_NAMED = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
"""Members whose members are schemas under names of the author's choice."""
_DATA = frozenset({"const", "enum", "default", "example", "examples"})
_IDENTITY = frozenset({"$id", "$schema"})
"""They would turn references away from the document that the schema is a part of."""


def forced_call(tools: Sequence[Tool], choice: ToolChoice | str, *, parallel: bool) -> Grammar:
    """The grammar of an output that must be a call: the arguments of the named tool, or a list of calls.

    The list is `[{"name": ..., "parameters": {...}}, ...]`, as vLLM asks for it.

    Raises:
        InvalidArgument: a reference of a schema leads nowhere.
        UnsupportedField: a reference leads to another document.
    """
    for i, tool in enumerate(tools):
        if tool.name == choice:
            return _grammar(_moved(_arguments(tool), "#", _path(i)))
    hosted: dict[str, Any] = {}
    calls = _calls(tools, hosted, parallel=parallel)
    return _grammar({**calls, _ROOT: hosted} if hosted else calls)


def call_or_answer(tools: Sequence[Tool], answer: Grammar, *, parallel: bool) -> Grammar | None:
    """The grammar of an output that is a list of calls, as above, or what `answer` allows. None: it can't be said.

    Raises as `forced_call`.
    """
    if answer.kind not in (GrammarKind.JSON_OBJECT, GrammarKind.JSON_SCHEMA):
        return None
    schema = json.loads(answer.source) if answer.kind is GrammarKind.JSON_SCHEMA else {"type": "object"}
    hosted: dict[str, Any] = {"answer": _moved(schema, f"#/{_ROOT}/answer", "response_format")}
    calls = _calls(tools, hosted, parallel=parallel)
    return _grammar({"anyOf": [{"$ref": f"#/{_ROOT}/answer"}, calls], _ROOT: hosted})


def _calls(tools: Sequence[Tool], hosted: dict[str, Any], *, parallel: bool) -> dict[str, Any]:
    """The schema of a list of calls; the tools' own go to `hosted`."""
    calls = []
    for i, tool in enumerate(tools):
        place = f"#/{_ROOT}/tool_{i}"
        arguments = _moved(_arguments(tool), place, _path(i))
        if '"$ref"' in tool.parameters_json:
            hosted[f"tool_{i}"], arguments = arguments, {"$ref": place}
        members = {"name": {"enum": [tool.name]}, "parameters": arguments}
        calls.append(
            {
                "type": "object",
                "properties": members,
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    return schema


def _path(index: int) -> str:
    return f"tools[{index}].function.parameters"


def _grammar(schema: dict[str, Any]) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def _arguments(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object."""
    schema = tool.parameters() or {"properties": {}}
    return schema if "$ref" in schema else {"type": "object", **schema}


def _moved(root: Any, place: str, path: str) -> Any:
    """A schema as a part of another document, at `place` ("#/..."). `path` is the caller's field, for errors."""

    def schema(value: Any) -> Any:
        if isinstance(value, list):
            return [schema(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {key: member(key, item) for key, item in value.items() if key not in _IDENTITY or not _text(item)}

    def member(key: str, value: Any) -> Any:
        if key in _DATA:
            return value
        if key in _NAMED and isinstance(value, dict):
            return {name: schema(item) for name, item in value.items()}
        if key == "$ref" and isinstance(value, str):
            return place + _own(root, value, path)
        return schema(value)

    return schema(root)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _own(root: Any, reference: str, path: str) -> str:
    """What follows the "#" of a reference into its own document."""
    pointer = reference.removeprefix("#")
    if pointer == reference or pointer[:1] not in ("", "/"):
        raise UnsupportedField(path, f"{shorten(reference)} refers to another document or to an anchor")
    value = root
    for step in unquote(pointer).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and len(name) < 7 and int(name) < len(value):
            value = value[int(name)]
        else:
            raise InvalidArgument(path, f"{shorten(reference)} refers to nothing")
    return pointer
