"""Calls as Python writes them (Llama 3.2 and 4): `name(city='Oslo', days=[1, 2])`, each value a literal."""

from __future__ import annotations

import json
import re

from fastchat_grpc.openai.tools.reader import MAX_NAME, Malformed, MemberReader
from fastchat_grpc.openai.tools.xml import literal

_NAME = re.compile(r"[^\W\d][\w.]*")
_KEY = re.compile(r"[^\W\d]\w*")
_DULL = re.compile(r"[^\"'()\[\]{},]*")
_DULL_IN_STRING = re.compile(r"[^\"'\\]*")
_MAX_DEPTH = 100


class PythonicReader(MemberReader):
    """Reads one call; each argument comes when its value is whole. See Reader.

    Args:
        names: functions there are; None: any.
    """

    def __init__(self, names: frozenset[str] | None) -> None:
        super().__init__()
        self._names = names
        self._key: str | None = None
        """Of the argument whose value is being read."""
        self._at = 0
        """Characters of the value that were looked at."""
        self._quote = ""
        self._escaped = False
        self._depth = 0

    def _step(self) -> bool:
        if self._key is not None:
            return self._value(self._key)
        return self._next() if self._called else self._head()

    def _head(self) -> bool:
        name = self._upto("(", _NAME)
        if name is None:
            return False
        if self._names is not None and name not in self._names:
            raise Malformed
        self._set_name(name)
        return True

    def _upto(self, end: str, pattern: re.Pattern[str]) -> str | None:
        """The word before a character, and both are taken off the text; None while it is not whole."""
        word, found, rest = self._text.partition(end)
        if pattern.fullmatch(word.rstrip()) is None or len(word) > MAX_NAME:
            raise Malformed
        if not found:
            return None
        self._text = rest
        return word.rstrip()

    def _next(self) -> bool:
        self._text = self._text.lstrip(" \t\r\n")
        if not self._text:
            return False
        if self._text[0] == ")":
            self._text = self._text[1:]
            self._end()
            return True
        self._key = self._upto("=", _KEY)
        self._at = 0
        return self._key is not None

    def _value(self, key: str) -> bool:
        while self._at < len(self._text):
            if self._quote:
                self._string()
                continue
            self._at = _DULL.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at == len(self._text):
                break
            character = self._text[self._at]
            if not self._depth and character in ",)":
                self._take(key, character)
                return True
            self._plain(character)
        return False

    def _string(self) -> None:
        if self._escaped:
            self._escaped = False
            self._at += 1
            return
        self._at = _DULL_IN_STRING.match(self._text, self._at).end()  # type: ignore[union-attr]
        if self._at < len(self._text):
            if self._text[self._at] == "\\":
                self._escaped = True
            elif self._text[self._at] == self._quote:
                self._quote = ""
            self._at += 1

    def _plain(self, character: str) -> None:
        if character in "\"'":
            self._quote = character
        elif character in "([{":
            self._depth += 1
        elif character in ")]}":
            self._depth -= 1
        if not 0 <= self._depth <= _MAX_DEPTH:
            raise Malformed
        self._at += 1

    def _take(self, key: str, end: str) -> None:
        try:
            value = json.dumps(literal(self._text[: self._at].strip()), allow_nan=False)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise Malformed from None
        self._text = self._text[self._at + (end == ",") :]
        self._member(json.dumps(key))
        self._say(value)
        self._key = None
