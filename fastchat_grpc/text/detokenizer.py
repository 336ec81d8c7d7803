"""Text of a growing list of tokens, in time linear in their number."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import islice
from typing import Protocol

from fastchat_grpc.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_INCOMPLETE_TOKENS = 6
"""A character has at most 4 bytes, so at most 4 byte tokens; after a few more, U+FFFD is the text itself."""
PROMPT_TOKENS, MAX_PROMPT_TOKENS = 5, 16
"""Tokens of a prompt's end that are read before the output: five as in vLLM, more if they begin in a character."""


class Detokenizer(Protocol):
    """Turns tokens into text; what it has returned is never taken back."""

    def push(self, token_id: int) -> str:
        """Text that this token completes; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """The rest of the text; an incomplete character shows as U+FFFD."""
        ...


def make_detokenizer(tokenizer: Tokenizer, keep_special_tokens: bool, prompt_ids: Sequence[int] = ()) -> Detokenizer:
    """The cheapest detokenizer that is exact for this tokenizer.

    `prompt_ids` is what the tokens go on from, where their text goes on from its text: of it the last few are enough.
    """
    if tokenizer.decodes_bytes:
        return ByteDetokenizer(tokenizer, keep_special_tokens)
    return WindowDetokenizer(tokenizer, keep_special_tokens, prompt_ids)


class ByteDetokenizer:
    """For byte-level vocabularies, where text is the UTF-8 decoding of the tokens' joined bytes."""

    def __init__(self, tokenizer: Tokenizer, keep_special_tokens: bool) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._hidden = frozenset() if keep_special_tokens else tokenizer.special_token_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any other vocabulary: decodes a short window of tokens, and returns what it adds.

    The method of Hugging Face's text-generation-inference and vLLM: the tokens of the last two
    pieces of text are decoded with and without the new one, so that rules which look at neighbours
    (such as the space that sentencepiece drops at the start of a text) apply alike to both. So the first
    window is the end of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, keep_special_tokens: bool, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._keep_special_tokens = keep_special_tokens
        self._hidden = frozenset() if keep_special_tokens else tokenizer.special_token_ids
        self._window = self._end_of(prompt_ids)
        self._read = len(self._window)  # tokens of the window whose text was returned
        self._read_text = self._decode(self._window)  # their text

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.startswith(self._read_text):
            # A byte after a complete character, which decoders take for one run: what was returned stays, and
            # what is new is read by itself.
            self._window = self._window[self._read :]
            self._read, self._read_text = 0, ""
            text = self._decode(self._window)
        pending = len(self._window) - self._read
        if text.endswith(REPLACEMENT) and pending < MAX_INCOMPLETE_TOKENS:
            return ""
        new = text[len(self._read_text) :]
        if new:
            self._window = self._window[self._read :]
            self._read = len(self._window)
            self._read_text = self._decode(self._window)
        return new

    def flush(self) -> str:
        new = self._decode(self._window)[len(self._read_text) :]
        self._window, self._read, self._read_text = [], 0, ""
        return new

    def _end_of(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of a prompt that are text, from the start of a character on."""
        shown = [*islice((i for i in reversed(prompt_ids) if i not in self._hidden), MAX_PROMPT_TOKENS)][::-1]
        for count in range(min(PROMPT_TOKENS, len(shown)), len(shown)):
            if not self._decode(shown[-count:]).startswith(REPLACEMENT):
                return shown[-count:]
        return shown

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, keep_special_tokens=self._keep_special_tokens) if token_ids else ""
