"""Where tokens stand in a text, in characters."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from typing import TypeAlias

from fastchat_grpc.core import TokenLogprob

Placed: TypeAlias = tuple[TokenLogprob, int]
"""A token, and the character of the text that it begins at."""
_STRAY = " \ufffd"
"""What a text may have where its tokens have not, or the other way round: a space at its start, broken bytes."""
_MAX_STRAY = 8


class TextOffsets:
    """Offsets of a choice's tokens into its text, as both arrive.

    A character may be spread over several tokens, which then begin where it does. Special tokens are no text, and
    sentencepiece drops the space before a text's first word; and the text may lag behind its tokens, where a
    character is incomplete or a stop string may have begun. So a token waits until its text has come, or other text.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._at = 0
        """Characters of `_text` that tokens have been found for."""
        self._before = 0
        """Characters before `_text`."""
        self._waiting: deque[tuple[TokenLogprob, str]] = deque()
        self._even = True
        """Whether text and tokens so far are the same characters."""

    @property
    def settled(self) -> bool:
        """Whether every token has found its place, and all text its token."""
        return self._even

    def feed(self, entries: Sequence[TokenLogprob], text: str) -> list[Placed]:
        """The tokens whose place is known now, given the text that came with some."""
        if self._even and len(entries) == 1 and entries[0].token == text and "\ufffd" not in text:
            self._before += len(text)
            return [(entries[0], self._before - len(text))]
        return self._match(entries, text)

    def close(self) -> tuple[list[Placed], list[Placed]]:
        """The tokens that are left at the end: those that show at least in part, and those that do not."""
        left = [(entry, self._before + len(self._text)) for entry, _ in self._waiting]
        self._waiting.clear()
        if left and self._at < len(self._text):
            return [(left[0][0], self._before + self._at)], left[1:]
        return [], left

    def _match(self, entries: Sequence[TokenLogprob], text: str) -> list[Placed]:
        self._text += text
        self._waiting.extend((entry, self._decoder.decode(entry.token_bytes)) for entry in entries)
        placed: list[Placed] = []
        while self._waiting and not self._must_wait(self._waiting[0][1]):
            entry, piece = self._waiting.popleft()
            placed.append((entry, self._before + self._at))
            self._pass(piece)
        if self._at == len(self._text):
            self._text, self._at, self._before = "", 0, self._before + self._at
        self._even = not self._waiting and not self._text and not self._decoder.getstate()[0]
        return placed

    def _must_wait(self, piece: str) -> bool:
        return len(self._text) - self._at < len(piece) and piece.startswith(self._text[self._at :])

    def _pass(self, piece: str) -> None:
        """Go on behind a token's text, if it is there."""
        if self._text.startswith(piece, self._at):
            self._at += len(piece)
        elif core := piece.strip(_STRAY):
            found = self._text.find(core, self._at, self._at + len(core) + _MAX_STRAY)
            if found >= 0 and not self._text[self._at : found].strip(_STRAY):
                self._at = found + len(core)
