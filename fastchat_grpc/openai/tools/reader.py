"""Readers of calls: what they have in common."""

from __future__ import annotations

import re
from typing import Protocol

MAX_NAME = 160
NAME = re.compile(r"[\w.-]+")


class Malformed(Exception):
    """The text is not the call that was expected. `rest` is what follows the part that was."""

    rest = ""


class Reader(Protocol):
    """Reads one call, as its text comes. `feed` raises Malformed for anything else."""

    name: str | None
    """Set once it is certain that this is a call."""
    has_arguments: bool

    @property
    def done(self) -> bool:
        """Whether the call is whole."""
        ...

    def feed(self, text: str) -> int:
        """Read on; returns the position after what belongs to the call, which is the end of `text` until it is done."""
        ...

    def take_arguments(self) -> str:
        """Argument text since the last call of this method, as JSON."""
        ...


class MemberReader:
    """Of formats that give arguments one by one: puts them together as a JSON object. Subclasses implement `_step`.

    Attributes:
        _text: what is read and not decided.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.has_arguments = False
        self.done = False
        self._text = ""
        self._called = ""
        """The name, before it is certain that this is a call."""
        self._members = 0
        self._arguments = ""

    def feed(self, text: str) -> int:
        """See Reader."""
        self._text += text
        try:
            while self._text and not self.done and self._step():
                pass
        except Malformed as failure:
            failure.rest = self._text
            raise
        return len(text) - len(self._text) if self.done else len(text)

    def take_arguments(self) -> str:
        """See Reader."""
        text, self._arguments = self._arguments, ""
        return text

    def _step(self) -> bool:
        """Look at the head of `_text`; whether it got any further. Raises Malformed."""
        raise NotImplementedError

    def _set_name(self, name: str) -> None:
        if len(name) > MAX_NAME or NAME.fullmatch(name) is None:
            raise Malformed
        self._called = name

    def _member(self, quoted_key: str) -> None:
        """The next argument begins: its value follows, by `_say`."""
        self.name, self.has_arguments = self._called, True
        self._say(("{" if not self._members else ", ") + quoted_key + ": ")
        self._members += 1

    def _say(self, text: str) -> None:
        self._arguments += text

    def _end(self) -> None:
        self.name, self.has_arguments, self.done = self._called, True, True
        self._say("}" if self._members else "{}")


def held_back(text: str, marks: tuple[str, ...]) -> int:
    """Length of the end of `text` that may be the start of one of the marks."""
    longest = min(len(text), max(map(len, marks)) - 1)
    return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)
