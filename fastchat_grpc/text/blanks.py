"""White space between the parts of JSON: a model that is kept to JSON may write nothing else for ever."""

from __future__ import annotations

MAX_BLANKS = 128
"""More than any line break and indent. Grammars of some engines allow any number, up to the limit of the output."""
_BLANKS = frozenset(" \t\r\n")


class BlankRun:
    """White space at the end of a JSON text, outside of its strings, as the text grows."""

    def __init__(self) -> None:
        self._length = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int:
        """The longest run that ends in this text, in characters."""
        longest = self._length
        for char in text:
            if self._in_string:
                if self._escaped or char == "\\":
                    self._escaped = not self._escaped
                else:
                    self._in_string = char != '"'
                continue
            self._length = self._length + 1 if char in _BLANKS else 0
            self._in_string = char == '"'
            longest = max(longest, self._length)
        return longest
