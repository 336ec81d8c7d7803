"""Structured output: OpenAI's response_format and vLLM's structured_outputs."""

from __future__ import annotations

import json
import re
from typing import Any

from fastchat_grpc.core import Grammar, GrammarKind
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.openai.fields import Fields, strings
from fastchat_grpc.openai.jsonio import type_name

GUIDED = {
    "json": "guided_json",
    "regex": "guided_regex",
    "choice": "guided_choice",
    "grammar": "guided_grammar",
}
"""vLLM's structured_outputs members and the names that they had before."""
# Python's re.escape also escapes spaces and the like, which other regex dialects refuse.
_METACHARACTER, _ESCAPED = re.compile(r"([\\.+*?()|\[\]{}^$])"), r"\\\1"


def parse_grammar(fields: Fields) -> tuple[Grammar | None, str]:
    """The grammar of a request and the path of the field that asked for it. Raises InvalidArgument for two."""
    found = [item for item in (_response_format(fields), *_structured(fields), *_guided(fields)) if item is not None]
    if len(found) > 1:
        raise InvalidArgument(found[1][1], f"cannot be combined with {found[0][1]}")
    return found[0] if found else (None, "response_format")


def _response_format(fields: Fields) -> tuple[Grammar, str] | None:
    wanted = fields.nested("response_format")
    if wanted is None:
        return None
    path = fields.path("response_format")
    match wanted.required("type"):
        case "text":
            result = None
        case "json_object":
            # Several servers take a schema here, which is json_schema under another name.
            schema = wanted.table("schema")
            result = (Grammar(GrammarKind.JSON_OBJECT), path) if schema is None else _schema(wanted, schema)
        case "json_schema":
            result = _json_schema(wanted)
        case _:
            raise wanted.wrong("type", "must be one of text, json_object, json_schema")
    return result


def _json_schema(wanted: Fields) -> tuple[Grammar, str]:
    named = wanted.nested("json_schema")
    if named is None:
        raise wanted.wrong("json_schema", "is required with type json_schema")
    named.text("name")
    named.text("description")
    named.flag("strict")
    schema = named.table("schema")
    if schema is None:
        raise named.wrong("schema", "is required")
    return _schema(named, schema)


def _schema(fields: Fields, schema: dict[str, Any]) -> tuple[Grammar, str]:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)), fields.path("schema")


def _structured(fields: Fields) -> list[tuple[Grammar, str]]:
    wanted = fields.nested("structured_outputs")
    if wanted is None:
        return []
    found = [item for kind in GUIDED if (item := _member(wanted, kind, kind)) is not None]
    if wanted.flag("json_object"):
        found.append((Grammar(GrammarKind.JSON_OBJECT), wanted.path("json_object")))
    for name in ("disable_fallback", "disable_any_whitespace", "disable_additional_properties"):
        wanted.unsupported(name, False)
    for name in ("whitespace_pattern", "structural_tag"):
        wanted.unsupported(name)
    wanted.finish()
    return found


def _guided(fields: Fields) -> list[tuple[Grammar, str]]:
    for name in ("guided_decoding_backend", "guided_whitespace_pattern", "structural_tag"):
        fields.unsupported(name)
    return [item for kind, name in GUIDED.items() if (item := _member(fields, kind, name)) is not None]


def _member(fields: Fields, kind: str, name: str) -> tuple[Grammar, str] | None:
    value, path = fields.raw(name), fields.path(name)
    if value is None:
        return None
    match kind:
        case "json":
            if isinstance(value, str):
                value = _parse_schema(value, path)
            if not isinstance(value, dict):
                raise InvalidArgument(path, f"must be a JSON Schema object, got {type_name(value)}")
            return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(value)), path
        case "choice":
            choices = strings(value, path) if isinstance(value, list) else ()
            if not choices or "" in choices:
                raise InvalidArgument(path, "must be a list of at least one string, none of them empty")
            return Grammar(
                GrammarKind.REGEX, "|".join(f"({_METACHARACTER.sub(_ESCAPED, choice)})" for choice in choices)
            ), path
        case _:
            if not isinstance(value, str) or not value:
                raise InvalidArgument(path, "must be a string and not empty")
            return Grammar(GrammarKind.REGEX if kind == "regex" else GrammarKind.LARK, value), path


def _parse_schema(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidArgument(path, "is not valid JSON") from None
