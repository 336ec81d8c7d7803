"""Calls of Qwen3-Coder: `<function=NAME>`, any number of `<parameter=NAME>` value `</parameter>`, `</function>`.

A value is text as it stands, between two line breaks; the tool's schema tells whether it means more than a string.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from fastchat_grpc.openai.tools.reader import MAX_NAME, Malformed, MemberReader, held_back

FUNCTION, FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_BLOCK_END = "</tool_call>"
_VALUE_END = re.compile(rf"\n?{_PARAMETER_END}|\n(?={_PARAMETER}|{FUNCTION_END}|{_BLOCK_END})")
"""Models now and then forget the end of a parameter."""
_VALUE_ENDS = (_PARAMETER_END, *(f"\n{mark}" for mark in (_PARAMETER_END, _PARAMETER, FUNCTION_END, _BLOCK_END)))
_LONGEST_END = max(map(len, _VALUE_ENDS))
_ALIASES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object", "list": "array"}
_CLASSES: dict[str, type | tuple[type, ...]] = {
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "object": dict,
    "array": list,
    "null": type(None),
}

Kinds: TypeAlias = frozenset[str]
"""JSON types that a value may have; empty: not said."""


class FunctionReader(MemberReader):
    """Reads one function; values of strings come as they are written. See Reader.

    Args:
        kinds: the types of a function's parameters, by its name.
    """

    def __init__(self, kinds: Callable[[str], Mapping[str, Kinds]]) -> None:
        super().__init__()
        self._find_kinds = kinds
        self._kinds: Mapping[str, Kinds] = {}
        self._kind: Kinds | None = None
        """Of the parameter whose value is being read; None between two."""
        self._streamed = False
        self._begun = False
        self._scanned = 0

    def _step(self) -> bool:
        if self._kind is not None:
            return self._value(self._kind)
        return self._between() if self._called else self._head()

    def _head(self) -> bool:
        name = self._mark(FUNCTION)
        if name is None:
            return False
        self._set_name(name)
        self._kinds = self._find_kinds(name)
        return True

    def _mark(self, mark: str) -> str | None:
        """The name in a mark at the head of the text; None while it is not whole."""
        if not self._text.startswith(mark):
            if mark.startswith(self._text):
                return None
            raise Malformed
        end = self._text.find(">")
        if end < 0:
            if len(self._text) > len(mark) + MAX_NAME:
                raise Malformed
            return None
        name, self._text = self._text[len(mark) : end], self._text[end + 1 :]
        return name

    def _between(self) -> bool:
        self._text = self._text.lstrip()
        if self._text.startswith(FUNCTION_END):
            self._text = self._text[len(FUNCTION_END) :]
            self._end()
        elif self._text.startswith(_BLOCK_END) and self._members:  # the end of the function is forgotten
            self._text = self._text[len(_BLOCK_END) :]
            self._end()
        elif any(mark.startswith(self._text) for mark in (FUNCTION_END, _BLOCK_END)):
            return False
        else:
            name = self._mark(_PARAMETER)
            if name is None:
                return False
            # What no schema knows is a string, as in vLLM.
            self._kind = self._kinds.get(name, frozenset({"string"}))
            self._streamed = self._kind == {"string"}
            self._begun, self._scanned = False, 0
            self._member(json.dumps(name))
            self._say('"' if self._streamed else "")
        return True

    def _value(self, kind: Kinds) -> bool:
        if not self._begun:
            self._begun, self._text = True, self._text.removeprefix("\n")
        found = _VALUE_END.search(self._text, self._scanned)
        if found is None:
            cut = len(self._text) - held_back(self._text, _VALUE_ENDS)
            if self._streamed:
                self._say(_escaped(self._text[:cut]))
                self._text = self._text[cut:]
            else:
                self._scanned = max(0, len(self._text) - _LONGEST_END)
            return False
        value, self._text = self._text[: found.start()], self._text[found.end() :]
        self._say(_escaped(value) + '"' if self._streamed else to_json(value, kind))
        self._kind = None
        return True


def _escaped(text: str) -> str:
    return json.dumps(text)[1:-1]


def kinds_of(schema: Mapping[str, Any] | None) -> dict[str, Kinds]:
    """The types of each property of a tool's schema."""
    properties = (schema or {}).get("properties")
    return {name: _kinds(value) for name, value in properties.items()} if isinstance(properties, dict) else {}


def _kinds(schema: Any) -> Kinds:
    if not isinstance(schema, dict):
        return frozenset()
    stated = schema.get("type")
    names = stated if isinstance(stated, list) else [stated]
    found = {_ALIASES.get(name, name) for name in names if isinstance(name, str)}
    for choice in ("anyOf", "oneOf"):
        for item in schema.get(choice) or () if isinstance(schema.get(choice), list) else ():
            found |= _kinds(item)
    if not found and isinstance(schema.get("enum"), list):
        found = {name for name, kind in _CLASSES.items() for value in schema["enum"] if isinstance(value, kind)}
        found |= {"string"} if any(isinstance(value, str) for value in schema["enum"]) else set()
    return frozenset(found)


def to_json(text: str, kinds: Kinds) -> str:
    """A value as JSON: of one of these types if it can be read so, else a string."""
    plain = text.strip()
    if plain.lower() == "null" and (not kinds or "null" in kinds or "string" not in kinds):
        return "null"
    if "string" in kinds:
        return json.dumps(text)
    for value in _readings(plain):
        wanted = kinds or {"object", "array"}
        if any(_is(value, kind) for kind in wanted):
            try:
                return json.dumps(value, allow_nan=False)
            except (TypeError, ValueError, RecursionError):
                break
    return json.dumps(text)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return kind in _CLASSES and isinstance(value, _CLASSES[kind])


def _readings(text: str) -> list[Any]:
    """What a text may mean: as JSON, or as Python, which models write now and then."""
    if text.lower() in ("true", "false"):
        return [text.lower() == "true"]
    found = []
    for read in (json.loads, literal):
        try:
            found.append(read(text))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return found


def literal(text: str) -> Any:
    """The value of a Python literal. Raises ValueError, SyntaxError, TypeError, RecursionError or MemoryError."""
    with warnings.catch_warnings():  # of escapes that Python does not know; they would quote the text
        warnings.simplefilter("ignore")
        return ast.literal_eval(text)
