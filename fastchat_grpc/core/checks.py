"""Checks of values, which name the field."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from fastchat_grpc.core.limits import INT32_MAX
from fastchat_grpc.errors import InvalidArgument


def require(ok: bool, path: str, value: object, limit: str) -> None:
    if not ok:
        raise InvalidArgument(path, f"must be {limit}, got {value}")


def require_int32(path: str, value: int, low: int) -> None:
    """Raise for a number below `low`, and for one that no message can carry."""
    require(value >= low, path, value, f"at least {low}")
    require(value <= INT32_MAX, path, value, f"at most {INT32_MAX}")


def require_token_ids(token_ids: Sequence[int], path: str) -> None:
    """Raise for the first that is no id. A prompt has up to millions of them: no text is made while all is well."""
    if token_ids and (min(token_ids) < 0 or max(token_ids) > INT32_MAX):
        for i, token_id in enumerate(token_ids):
            require_int32(f"{path}[{i}]", token_id, 0)


def within(path: str, value: float, low: float, high: float) -> None:
    require(math.isfinite(value) and low <= value <= high, path, value, f"from {low:g} to {high:g}")


def json_object(text: str, path: str) -> dict[str, Any]:
    """The JSON object that a field holds as text; empty text is an empty object. Order and integers are kept.

    Raises:
        InvalidArgument: it is no JSON object, with the field's path.
    """
    if not text:
        return {}
    try:
        value = json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        place = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidArgument(path, f"is not valid JSON{place}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(path, "must be a JSON object")
    return value


def no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
