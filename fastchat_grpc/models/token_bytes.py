"""The bytes that each token of a vocabulary stands for inside a text.

A tokenizer's decoder says how its tokens are spelled:

    byte-level BPE (GPT-2, Llama 3, Qwen)    each character is a byte, by GPT-2's table
    sentencepiece (Llama 2, Gemma, T5)       U+2581 is a space, <0xE4> is a byte
    WordPiece (BERT)                         ## continues a word, anything else follows a space
    BPE with end of word (CLIP)              </w> is a space
"""

from __future__ import annotations

import enum
import json
import re
from functools import cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


class Spelling(enum.Enum):
    """How a vocabulary spells its tokens."""

    BYTE_LEVEL = enum.auto()
    SENTENCEPIECE = enum.auto()
    WORDPIECE = enum.auto()
    END_OF_WORD = enum.auto()
    SPACED = enum.auto()
    """Whole words, joined by spaces."""
    BYTE_CHARACTERS = enum.auto()
    """One character per byte (ByT5)."""
    PLAIN = enum.auto()


class TokenBytes:
    """`table[token_id]`: the token's bytes; unknown ids are empty. Filled as tokens are seen; thread-safe."""

    def __init__(self, tokenizer: Any, added_ids: frozenset[int], special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._added = added_ids
        self._special = special_ids
        self._spelling, self._mark = _spelling(tokenizer)
        self._known: dict[int, bytes] = {}

    @property
    def exact(self) -> bool:
        """Whether decoding is nothing but joining these bytes: true of byte-level vocabularies."""
        return self._spelling is Spelling.BYTE_LEVEL

    @property
    def starts_with_space(self) -> bool:
        """Whether texts are encoded with a space before them, which decoding takes off again."""
        return self._spelling is Spelling.SENTENCEPIECE

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._compute(token_id)
        return known

    def _compute(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if isinstance(token, bytes):  # tokenizers over tiktoken, as Qwen's first
            return token
        if self._spelling is Spelling.BYTE_LEVEL:
            return _byte_level(token)  # the decoder treats added tokens alike
        if token_id in self._added or token_id in self._special:
            return str(token).encode()
        return _spelled(token, self._spelling, self._mark)


def _spelled(token: str, spelling: Spelling, mark: str) -> bytes:
    match spelling:
        case Spelling.SENTENCEPIECE:
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(mark, " ").encode()
        case Spelling.WORDPIECE:
            return token.removeprefix(mark).encode() if token.startswith(mark) else b" " + token.encode()
        case Spelling.END_OF_WORD:
            return token.replace(mark, " ").encode()
        case Spelling.SPACED:
            return b" " + token.encode()
        case Spelling.BYTE_CHARACTERS:
            return bytes(ord(char) & 0xFF for char in token)
        case _:
            return token.encode()


def _byte_level(token: str) -> bytes:
    """Bytes of a byte-level token; one with a character outside the table is taken as text, as the decoder does."""
    table = byte_level_alphabet()
    try:
        return bytes([table[char] for char in token])
    except KeyError:
        return token.encode()


@cache
def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table of 256 printable characters: printable Latin-1 stands for itself, the rest for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _spelling(tokenizer: Any) -> tuple[Spelling, str]:
    """How the tokenizer spells tokens, and the mark that goes with it."""
    core = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
    if core is not None:
        if core.decoder is None:
            return Spelling.SPACED, ""
        return _decoder_spelling(json.loads(core.decoder.__getstate__()))
    if hasattr(tokenizer, "byte_decoder"):
        return Spelling.BYTE_LEVEL, ""
    if type(tokenizer).__name__ in ("ByT5Tokenizer", "PerceiverTokenizer"):
        return Spelling.BYTE_CHARACTERS, ""
    if hasattr(tokenizer, "wordpiece_tokenizer"):
        return Spelling.WORDPIECE, "##"
    if hasattr(tokenizer, "sp_model"):
        return Spelling.SENTENCEPIECE, _SPACE
    return Spelling.PLAIN, ""


def _decoder_spelling(decoder: dict[str, Any]) -> tuple[Spelling, str]:
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"]: step for step in steps}
    if set(kinds) == {"ByteLevel"}:
        return Spelling.BYTE_LEVEL, ""
    if "WordPiece" in kinds:
        return Spelling.WORDPIECE, str(kinds["WordPiece"]["prefix"])
    if "BPEDecoder" in kinds:
        return Spelling.END_OF_WORD, str(kinds["BPEDecoder"]["suffix"])
    if "Metaspace" in kinds:
        return Spelling.SENTENCEPIECE, str(kinds["Metaspace"]["replacement"])
    for step in steps:
        if step["type"] == "Replace" and step.get("content") == " " and "String" in step.get("pattern", {}):
            return Spelling.SENTENCEPIECE, str(step["pattern"]["String"])
    if "ByteFallback" in kinds:
        return Spelling.SENTENCEPIECE, _SPACE
    return Spelling.PLAIN, ""
