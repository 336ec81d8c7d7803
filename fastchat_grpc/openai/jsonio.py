"""JSON bodies: strict and bounded on the way in, fast on the way out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from fastchat_grpc.config import MAX_MESSAGE_BYTES
from fastchat_grpc.errors import InvalidArgument

MAX_BODY_BYTES = MAX_MESSAGE_BYTES
"""Bytes of a request body: what a message may have. A gateway may allow less (--max-body-bytes)."""
MAX_CONTAINERS = 100_000
"""Lists and objects of a request body. Millions of empty ones would fit it, take seconds to make, and a hundred
times its size."""
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)  # each byte is looked at once
MAX_DEPTH = 64
"""Nested objects and lists of a request body."""


def parse_object(body: bytes, max_bytes: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """Parse a JSON object. Raises InvalidArgument that says where the text is wrong, and never quotes it."""
    if len(body) > max_bytes:
        raise InvalidArgument("body", f"must have at most {max_bytes} bytes, got {len(body)}")
    if not body.strip():
        raise InvalidArgument("body", "must be a JSON object, got nothing")
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        bare = _STRING.sub(b"", body)  # brackets of a text are none
        if bare.count(b"[") + bare.count(b"{") > MAX_CONTAINERS:
            raise InvalidArgument("body", f"must have at most {MAX_CONTAINERS} lists and objects")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(
            "body", f"is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
    if not isinstance(value, dict):
        raise InvalidArgument("body", f"must be a JSON object, got {type_name(value)}")
    # Fewer brackets than levels allowed: nothing to measure, as in nearly all requests.
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        check_depth(value, MAX_DEPTH, "body")
    return value


def check_depth(value: object, limit: int, path: str) -> None:
    """Raise InvalidArgument if lists and objects are nested deeper than `limit` levels."""
    level: list[object] = [value]
    for _ in range(limit + 1):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level = [item for item in inner if isinstance(item, (dict, list))]
        if not level:
            return
    raise InvalidArgument(path, f"must nest lists and objects at most {limit} deep")


def type_name(value: object) -> str:
    """What JSON calls the type of a value."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def dumps(value: Mapping[str, Any] | list[Any]) -> bytes:
    """Render JSON. Text that is not valid Unicode has its broken characters replaced."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return orjson.dumps(_repair(value))


def quote(text: str) -> bytes:
    """Render a string as JSON, quotes included."""
    try:
        return orjson.dumps(text)
    except TypeError:
        return orjson.dumps(_repair(text))


def dumps_scalar(value: str | int | None) -> bytes:
    """A string, a number or null."""
    match value:
        case str():
            return quote(value)
        case None:
            return b"null"
        case _:
            return b"%d" % value


def _repair(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "replace").decode()
        case dict():
            return {_repair(key): _repair(item) for key, item in value.items()}
        case list() | tuple():
            return [_repair(item) for item in value]
        case _:
            return value
