"""What the shared text code asks of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastchat_grpc.core import ChatPrompt


class Tokenizer(Protocol):
    """A model's tokenizer. Thread-safe: engines call it off the event loop."""

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this, added tokens included."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end the model's output."""
        ...

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that are not text."""
        ...

    @property
    def decodes_bytes(self) -> bool:
        """Whether `decode` is always the UTF-8 decoding of the joined `token_bytes` (byte-level BPE)."""
        ...

    @property
    def longest_token(self) -> int | None:
        """Most characters of a text that one token can stand for; None: no limit, as where blanks are dropped."""
        ...

    @property
    def chat_template(self) -> str:
        """The chat template (Jinja), or an empty string."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def render_chat(self, chat: ChatPrompt) -> str:
        """Text of a conversation, ready to be continued. Raises InvalidArgument if the template refuses it."""
        ...

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """Text of token ids, without clean-up of spaces; incomplete UTF-8 shows as U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that the token stands for inside a text; special tokens by their name."""
        ...
