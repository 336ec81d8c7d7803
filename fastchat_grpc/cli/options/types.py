"""Types of flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


class CommaList(click.ParamType[Any]):
    """Comma-separated values, as FastChat takes them."""

    name = "a,b,..."

    def __init__(self, item: Callable[[str], Any] = str) -> None:
        self._item = item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._item(part.strip()) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a comma-separated list of numbers", param, ctx)


class KeyValue(click.ParamType[Any]):
    """One key=value."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, rest = value.partition("=")
        if not equals or not key:
            self.fail(f"{value!r} must look like key=value", param, ctx)
        return key, rest
