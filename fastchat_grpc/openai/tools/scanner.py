"""An incremental reader of JSON values in a stream of text."""

from __future__ import annotations

import json
import re
from enum import Enum, auto

from fastchat_grpc.openai.tools.reader import Malformed

_SPACE = " \t\r\n"
# Everything up to the next character that can change depth or quoting.
_DULL = re.compile(r'[^"{}\[\]]*')
_DULL_IN_STRING = re.compile(r'[^"\\]*')


class ValueScanner:
    """Finds the end of one JSON value. It tracks nesting and quoting, and does not check more."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._begun = False
        self._scalar = False
        self.done = False

    def feed(self, text: str, start: int) -> int:
        """Read on from `start`; returns the position after what belongs to the value."""
        position = start
        while position < len(text) and not self.done:
            read = self._string if self._in_string else self._plain
            position = read(text, position)
        return position

    def _string(self, text: str, position: int) -> int:
        if self._escaped:
            self._escaped = False
            return position + 1
        position = _DULL_IN_STRING.match(text, position).end()  # type: ignore[union-attr]
        if position < len(text):
            if text[position] == "\\":
                self._escaped = True
            else:
                self._in_string = False
                self.done = self._depth == 0
            position += 1
        return position

    def _plain(self, text: str, position: int) -> int:
        character = text[position]
        if not self._begun:
            self._begun = True
            self._scalar = character not in '{["'
        if self._scalar:
            # A number or a word ends where the enclosing value goes on; that character is not ours.
            if character in ",}]" or character in _SPACE:
                self.done = True
                return position
            return position + 1
        match character:
            case '"':
                self._in_string = True
            case "{" | "[":
                self._depth += 1
            case "}" | "]":
                self._depth -= 1
                self.done = self._depth == 0
            case _:
                return _DULL.match(text, position).end()  # type: ignore[union-attr]
        return position + 1


class _State(Enum):
    OPEN = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA = auto()
    DONE = auto()


class CallScanner:
    """Reads one object `{"name": ..., "arguments": {...}}`, members in any order.

    `name` is set as soon as it is read. `take_arguments` returns argument text as it comes, once the name is
    known. Raises Malformed for anything else, and with `strict` for members that a call does not have.
    """

    NAME = ("name", "function")
    ARGUMENTS = ("arguments", "parameters")
    OTHERS = ("id", "type")

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self.name: str | None = None
        self.has_arguments = False
        self._state = _State.OPEN
        self._key = ""
        self._value = ""
        self._scanner = ValueScanner()
        self._arguments = ""
        self._held = False

    @property
    def done(self) -> bool:
        return self._state is _State.DONE

    def take_arguments(self) -> str:
        """Argument text since the last call of this method; empty until the name is known."""
        if self.name is None:
            return ""
        text, self._arguments = self._arguments, ""
        return text

    def feed(self, text: str, start: int = 0) -> int:
        """Read on from `start`; returns the position after what belongs to the object."""
        position = start
        try:
            while position < len(text) and not self.done:
                if self._state in (_State.KEY, _State.VALUE) and (self._value or text[position] not in _SPACE):
                    position = self._read_value(text, position)
                    self._end_value()
                elif text[position] in _SPACE:
                    position += 1
                else:
                    self._punctuation(text[position])
                    position += 1
        except Malformed as failure:
            failure.rest = text[position:]
            raise
        return position

    def _punctuation(self, character: str) -> None:
        match self._state, character:
            case _State.OPEN, "{":
                self._state = _State.KEY
            case _State.COLON, ":":
                self._state = _State.VALUE
            case _State.COMMA, ",":
                self._state = _State.KEY
            case _State.COMMA, "}":
                if self.name is None:
                    raise Malformed
                self._state = _State.DONE
            case _:
                raise Malformed

    def _read_value(self, text: str, position: int) -> int:
        if self._state is _State.KEY and not self._value and text[position] != '"':
            raise Malformed
        end = self._scanner.feed(text, position)
        piece = text[position:end]
        streamed = self._state is _State.VALUE and self._key in self.ARGUMENTS
        if streamed:
            self._argument_text(piece)
        self._value += piece
        return end

    def _argument_text(self, piece: str) -> None:
        # Some models write the arguments as a string that holds JSON, or nothing there; that is read as a whole.
        self._held = not (self._value or piece).startswith("{")
        self.has_arguments = True
        if not self._held:
            self._arguments += piece

    def _end_value(self) -> None:
        if self._scanner.done:
            value, self._value, self._scanner = self._value, "", ValueScanner()
            self._take_value(value)

    def _take_value(self, value: str) -> None:
        if self._state is _State.KEY:
            self._key = _string(value)
            if self._strict and self._key not in (*self.NAME, *self.ARGUMENTS, *self.OTHERS):
                raise Malformed
            self._state = _State.COLON
            return
        self._state = _State.COMMA
        if self._key in self.NAME and self.name is None:
            self.name = _string(value)
        elif self._key in self.ARGUMENTS and self._held:
            text = _string(value) if value.startswith('"') else value
            self._arguments += "{}" if text.strip() in ("", "null") else text


def _string(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        raise Malformed from None
    if not isinstance(value, str):
        raise Malformed
    return value
