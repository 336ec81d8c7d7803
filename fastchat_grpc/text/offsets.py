"""Where tokens stand in a text, in characters."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from fastchat_grpc.core import TokenLogprob


class TextOffsets:
    """Offsets of a choice's tokens into its text, as both arrive.

    A character may be spread over several tokens, which then begin where it does. Special tokens are no text, and
    sentencepiece drops the space before a text's first word; and the text may lag behind its tokens, where a
    character is incomplete or a stop string may have begun. So each token is looked for where the text has come to.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._place = 0
        self._ahead = ""  # text from the place on
        self._owed = ""  # text of tokens before the place that has not come

    def feed(self, entries: Iterable[TokenLogprob], text: str) -> list[int]:
        """The offset of each token, given the text that came with them."""
        self._take(text)
        offsets = []
        for entry in entries:
            offsets.append(self._place)
            self._pass(self._decoder.decode(entry.token_bytes))
        return offsets

    def _take(self, text: str) -> None:
        if not text.startswith(self._owed) and not self._owed.startswith(text):
            self._place -= len(self._owed)  # those tokens were no text
            self._owed = ""
        known = min(len(self._owed), len(text))
        self._owed = self._owed[known:]
        self._ahead += text[known:]

    def _pass(self, piece: str) -> None:
        shown = next((form for form in (piece, piece.lstrip(" ")) if self._ahead.startswith(form)), None)
        if shown is not None:
            self._ahead = self._ahead[len(shown) :]
        elif piece.startswith(self._ahead):
            shown, self._owed, self._ahead = piece, self._owed + piece[len(self._ahead) :], ""
        else:
            return
        self._place += len(shown)
