"""Calls of DeepSeek, each between marks of its own.

- V3 and R1: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, the arguments as a block of JSON (```json), and an end
- V3.1: `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>`
"""

from __future__ import annotations

from fastchat_grpc.openai.tools.reader import MAX_NAME, NAME, Malformed
from fastchat_grpc.openai.tools.scanner import ValueScanner

CALL = "<｜tool▁call▁begin｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_END = "<｜tool▁call▁end｜>"
_TYPE = "function"
_FENCE = "```json"
_ENDS = ("```" + _END, _END)


class DeepSeekReader:
    """Reads one call. See Reader."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.has_arguments = False
        self.done = False
        self._text = ""
        self._value = ValueScanner()
        self._arguments = ""

    def feed(self, text: str) -> int:
        """See Reader."""
        self._text += text
        try:
            if self.name is None:
                self._head()
            if self.name is not None:
                self._body()
        except Malformed as failure:
            failure.rest = self._text
            raise
        return len(text) - len(self._text) if self.done else len(text)

    def take_arguments(self) -> str:
        """See Reader."""
        text, self._arguments = self._arguments, ""
        return text

    def _head(self) -> None:
        """All that comes before the arguments, which are an object."""
        head, brace, _ = self._text.partition("{")
        if not self._text.startswith(CALL[: len(self._text)]) or len(head) > len(CALL + _SEPARATOR) + 2 * MAX_NAME:
            raise Malformed
        if not brace:
            return
        kind, separator, name = head.removeprefix(CALL).partition(_SEPARATOR)
        if kind.strip() == _TYPE and name.strip():
            name, fence, rest = name.partition("\n")
            if not fence or rest.strip() != _FENCE:
                raise Malformed
        elif not name.strip():
            name = kind
        if not separator or NAME.fullmatch(name.strip()) is None:
            raise Malformed
        self.name, self.has_arguments = name.strip(), True
        self._text = self._text[len(head) :]

    def _body(self) -> None:
        if not self._value.done:
            end = self._value.feed(self._text, 0)
            self._arguments += self._text[:end]
            self._text = self._text[end:]
        if not self._value.done:
            return
        self._text = self._text.lstrip()
        ended = next((mark for mark in _ENDS if self._text.startswith(mark)), None)
        if ended is not None:
            self._text, self.done = self._text[len(ended) :], True
        elif not any(mark.startswith(self._text) for mark in _ENDS):
            raise Malformed
