"""Reading of JSON objects: every error names the field, and what nobody read is known by name.

A member that cannot change the answer is ignored: clients, editors and gateways attach data of their own. One that
would change it, and that this server does not have, is refused by name (`unsupported`). Members of the top level
that nobody knows are ignored, too, and told (`unknown`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from fastchat_grpc.core import INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN
from fastchat_grpc.errors import InvalidArgument, UnsupportedField
from fastchat_grpc.openai.jsonio import type_name

MAX_UNKNOWN = 16
"""Unknown members that are told by name."""


class Fields:
    """The members of one JSON object, read by name.

    A member that is absent or null reads as None: OpenAI's clients send null for "unset".
    """

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._prefix = f"{path}." if path else ""
        self._known: set[str] = set()

    @classmethod
    def of(cls, value: object, path: str) -> Fields:
        """The members of `value`, which must be an object."""
        if not isinstance(value, dict):
            raise InvalidArgument(path, f"must be an object, got {type_name(value)}")
        return cls(value, path)

    def path(self, name: str) -> str:
        """Path of a member, for error messages."""
        return self._prefix + name

    def wrong(self, name: str, description: str) -> InvalidArgument:
        """An error about a member."""
        return InvalidArgument(self.path(name), description)

    def raw(self, name: str) -> Any:
        """The member as it is."""
        self._known.add(name)
        return self._values.get(name)

    def peek(self, name: str) -> Any:
        """The member as it is; it does not count as read."""
        return self._values.get(name)

    def text(self, name: str) -> str | None:
        value = self.raw(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, f"must be a string, got {type_name(value)}")
        return value

    def flag(self, name: str) -> bool | None:
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, f"must be true or false, got {type_name(value)}")
        return value

    def integer(self, name: str, low: int = INT32_MIN, high: int = INT32_MAX) -> int | None:
        value = self.raw(name)
        return None if value is None else integer(value, self.path(name), low, high)

    def long(self, name: str) -> int | None:
        """A 64-bit integer."""
        return self.integer(name, INT64_MIN, INT64_MAX)

    def number(self, name: str) -> float | None:
        value = self.raw(name)
        return None if value is None else number(value, self.path(name))

    def items(self, name: str) -> list[Any] | None:
        value = self.raw(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, f"must be a list, got {type_name(value)}")
        return value

    def table(self, name: str) -> dict[str, Any] | None:
        """An object with names of its own choice."""
        value = self.raw(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, f"must be an object, got {type_name(value)}")
        return value

    def nested(self, name: str) -> Fields | None:
        """An object with fields of ours."""
        value = self.raw(name)
        return None if value is None else Fields.of(value, self.path(name))

    def required(self, name: str) -> str:
        """A string that must be there."""
        value = self.text(name)
        if value is None:
            raise self.wrong(name, "is required")
        return value

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str | None:
        value = self.text(name)
        if value is not None and value not in allowed:
            raise self.wrong(name, f"must be one of {', '.join(allowed)}, got {shorten(value)}")
        return value

    def ignore(self, *names: str) -> None:
        """Accept members without effect; each is documented as ignored."""
        self._known.update(names)

    def unsupported(self, name: str, *harmless: object, hint: str = "") -> None:
        """Refuse a member that the API has and this server has not, unless it says what happens anyway."""
        value = self.raw(name)
        # 1 and 1.0 are one number, but true is none.
        if value is not None and not any(
            value == item and isinstance(value, bool) == isinstance(item, bool) for item in harmless
        ):
            raise UnsupportedField(self.path(name), "is not supported" + (f"; {hint}" if hint else ""))

    def unknown(self) -> tuple[str, ...]:
        """Names of the members that were not read and say something, printable and short."""
        names = [name for name, value in self._values.items() if value is not None and name not in self._known]
        return tuple(shorten(name, quotes=False) or '""' for name in names[:MAX_UNKNOWN])

    def finish(self) -> None:
        """Refuse the first member that was not read and says something: where each one changes the answer."""
        for name, value in self._values.items():
            if value is not None and name not in self._known:
                close = difflib.get_close_matches(name[:64], self._known, n=1, cutoff=0.75)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise InvalidArgument(self.path(shorten(name, quotes=False) or '""'), f"unknown field{hint}")

    def rest(self, *, strict: bool) -> tuple[str, ...]:
        """Names of the members that nobody read; with `strict` the first is refused."""
        if strict:
            self.finish()
        return self.unknown()


def integer(value: object, path: str, low: int = INT32_MIN, high: int = INT32_MAX) -> int:
    """Check an integer; a boolean is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgument(path, f"must be an integer, got {type_name(value)}")
    # JSON has one type of number: 512.0 is an integer. The parser reads integers beyond 64 bits as floats, which are
    # out of every range.
    if isinstance(value, float) and not value.is_integer():
        raise InvalidArgument(path, f"must be an integer, got {value!r}")
    if not low <= value <= high or (isinstance(value, float) and abs(value) >= 2**53):
        raise InvalidArgument(path, f"must be from {low} to {high}, got {value}")
    return int(value)


def number(value: object, path: str) -> float:
    """Check a number; a boolean is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgument(path, f"must be a number, got {type_name(value)}")
    return float(value)


def integers(values: list[Any], path: str, low: int = 0) -> tuple[int, ...]:
    """Check a list of 32-bit integers, such as token ids."""
    return tuple(
        value if type(value) is int and low <= value <= INT32_MAX else integer(value, f"{path}[{i}]", low)
        for i, value in enumerate(values)
    )


def strings(values: list[Any], path: str) -> tuple[str, ...]:
    """Check a list of strings."""
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise InvalidArgument(f"{path}[{i}]", f"must be a string, got {type_name(value)}")
    return tuple(values)


def objects(values: list[Any] | None, path: str) -> Iterator[Fields]:
    """The objects of a list."""
    for i, value in enumerate(values or ()):
        yield Fields.of(value, f"{path}[{i}]")


def shorten(value: str, *, quotes: bool = True) -> str:
    """A value of the caller's for an error message: printable and short."""
    safe = "".join(c if c.isprintable() else "?" for c in value[:48]) + ("…" if len(value) > 48 else "")
    return f'"{safe}"' if quotes else safe
