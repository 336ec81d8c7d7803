"""A Hugging Face tokenizer behind the interface of `fastchat_grpc.text.tokenizer`. Needs no torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fastchat_grpc.core import ChatPrompt
from fastchat_grpc.errors import InvalidArgument, ModelLoadError
from fastchat_grpc.models.chat_template import ChatTemplate
from fastchat_grpc.models.token_bytes import TokenBytes

LONG = 20_000
"""Characters, or tokens, from which on the Rust core is called in the way that lets other threads run meanwhile."""


def load_tokenizer(
    source: Path,
    *,
    chat_template: str | None = None,
    default_chat_template: str | None = None,
    eos_token_ids: Sequence[int] = (),
    stop_tokens: Sequence[str] = (),
    vocabulary_size: int | None = None,
    trust_remote_code: bool = False,
) -> HuggingFaceTokenizer:
    """Load the tokenizer of a model folder or of a GGUF file.

    Args:
        source: folder with tokenizer files, or a GGUF file that carries its tokenizer.
        chat_template: replaces the tokenizer's own (Jinja text).
        default_chat_template: for a tokenizer that has none.
        eos_token_ids: ends of output that the model's configuration adds to the tokenizer's own.
        stop_tokens: further ends by name; those that the vocabulary lacks are skipped.
        vocabulary_size: rows of the model's embedding; None: the tokenizer's size.

    Raises:
        ModelLoadError: the files are broken or of an unknown kind.
    """
    from transformers import AutoTokenizer

    folder, gguf_file = (source.parent, source.name) if source.is_file() else (source, None)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, **extra)
    except Exception as error:  # transformers raises anything from KeyError to ImportError here
        reason = str(error).strip().splitlines()
        raise ModelLoadError(
            f"the tokenizer of {source} cannot be loaded: {reason[0] if reason else type(error).__name__}"
        ) from error
    vocabulary = tokenizer.get_vocab() if stop_tokens else {}
    if chat_template is None and not tokenizer.chat_template:
        chat_template = default_chat_template
    return HuggingFaceTokenizer(
        tokenizer,
        chat_template=chat_template,
        eos_token_ids=[*eos_token_ids, *(vocabulary[token] for token in stop_tokens if token in vocabulary)],
        vocabulary_size=vocabulary_size,
    )


class HuggingFaceTokenizer:
    """Implements `fastchat_grpc.text.tokenizer.Tokenizer`. Thread-safe.

    A fast tokenizer is called through its Rust core, never through transformers' wrapper, which
    changes truncation and padding of the shared core on each call and so must not run in two threads.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        eos_token_ids: Sequence[int] = (),
        vocabulary_size: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._core: Any = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        if self._core is not None:
            self._core.no_truncation()
            self._core.no_padding()
        self._lock = threading.Lock()
        self._size = _id_limit(tokenizer)
        self._vocabulary_size = self._size if vocabulary_size is None else vocabulary_size
        own_eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._eos_token_ids = frozenset(int(i) for i in (*own_eos, *eos_token_ids))
        added = tokenizer.added_tokens_decoder
        special = {int(i) for i, token in added.items() if token.special}
        self._special_token_ids = frozenset(special | {int(i) for i in tokenizer.all_special_ids})
        self._bytes = TokenBytes(tokenizer, frozenset(int(i) for i in added), self._special_token_ids)
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and self.encode("a")[:1] == [bos]
        self._template = ChatTemplate(tokenizer, chat_template, adds_bos=adds_bos)

    @property
    def vocabulary_size(self) -> int:
        return self._vocabulary_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos_token_ids

    @property
    def special_token_ids(self) -> frozenset[int]:
        return self._special_token_ids

    @property
    def decodes_bytes(self) -> bool:
        return self._bytes.exact

    @cached_property
    def longest_token(self) -> int | None:
        if self._core is None or not self._bytes.exact:
            return None  # sentencepiece and WordPiece may drop blanks
        longest = max(map(len, self._core.get_vocab()))
        # Unicode normalization makes one character of up to 4.
        return longest if self._core.normalizer is None else 4 * longest

    @property
    def chat_template(self) -> str:
        return self._template.source

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if not text.isascii():
            # Half of a character of two halves, as escapes of JSON in a conversation can hold, is no text.
            text = text.encode("utf-8", "replace").decode()
        token_ids: list[int]
        if self._core is not None:
            token_ids = self._encode(text, add_special_tokens)
        else:
            with self._lock:
                token_ids = list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        if self._size > self._vocabulary_size and token_ids and max(token_ids) >= self._vocabulary_size:
            raise InvalidArgument(
                "input", f"the text names a token that the model of {self._vocabulary_size} tokens does not have"
            )
        return token_ids

    def render_chat(self, chat: ChatPrompt) -> str:
        return self._template.render(chat)

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        if self._bytes.exact:
            return self._joined(token_ids, keep_special_tokens)
        known = [i for i in token_ids if i < self._size]
        if self._core is not None:
            return self._decode(known, keep_special_tokens)
        if self._bytes.starts_with_space:
            # transformers' Python tokenizers leave byte tokens as <0x..>; the bytes say what they mean.
            return self._joined(known, keep_special_tokens).removeprefix(" ")
        with self._lock:
            return self._decode_slow(known, keep_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]

    # The core's calls for one text keep the interpreter to themselves until they return, those for several do not.

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG:
            return list(self._core.encode(text, add_special_tokens=add_special_tokens).ids)
        return list(self._core.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def _decode(self, token_ids: list[int], keep_special_tokens: bool) -> str:
        if len(token_ids) < LONG:
            return str(self._core.decode(token_ids, skip_special_tokens=not keep_special_tokens))
        return str(self._core.decode_batch([token_ids], skip_special_tokens=not keep_special_tokens)[0])

    def _joined(self, token_ids: Sequence[int], keep_special_tokens: bool) -> str:
        hidden = frozenset() if keep_special_tokens else self._special_token_ids
        table = self._bytes
        return b"".join([table[i] for i in token_ids if i not in hidden]).decode("utf-8", "replace")

    def _decode_slow(self, token_ids: list[int], keep_special_tokens: bool) -> str:
        text = self._tokenizer.decode(
            token_ids,
            skip_special_tokens=not keep_special_tokens,
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=False,
        )
        return str(text)


def _id_limit(tokenizer: Any) -> int:
    """All token ids are below this; ids of added tokens may leave gaps, so counting is not enough."""
    highest = max((int(i) for i in tokenizer.added_tokens_decoder), default=-1)
    return max(len(tokenizer), highest + 1)
