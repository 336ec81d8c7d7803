"""The tokenizer and chat template that a GGUF file carries, through llama.cpp. Needs neither transformers nor torch."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from fastchat_grpc.core import ChatPrompt
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.models.chat_template import ChatTemplate

_BPE = 2  # llama_vocab_type: byte-level BPE
_NULL_TOKEN = -1


class LlamaTokenizer:
    """Implements `fastchat_grpc.text.tokenizer.Tokenizer`. Thread-safe: a vocabulary never changes."""

    def __init__(self, llama: Any, model: Any, chat_template: str | None, default_chat_template: str | None) -> None:
        self._llama = llama
        self._vocab = llama.llama_model_get_vocab(model)
        self._size = int(llama.llama_vocab_n_tokens(self._vocab))
        ids = range(self._size)
        self._eos = frozenset(i for i in ids if llama.llama_vocab_is_eog(self._vocab, i))
        self._special = self._eos | {i for i in ids if llama.llama_vocab_is_control(self._vocab, i)}
        self._bytes = [self._piece(i) for i in ids]
        self._exact = int(llama.llama_vocab_type(self._vocab)) == _BPE
        own = llama.llama_model_chat_template(model, None)
        templates = GgufTemplates((own or b"").decode("utf-8", "replace") or default_chat_template or "", self._names())
        adds_bos = bool(llama.llama_vocab_get_add_bos(self._vocab))
        self._template = ChatTemplate(templates, chat_template, adds_bos=adds_bos)

    @property
    def vocabulary_size(self) -> int:
        return self._size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos

    @property
    def special_token_ids(self) -> frozenset[int]:
        return self._special

    @property
    def decodes_bytes(self) -> bool:
        return self._exact

    @property
    def longest_token(self) -> int | None:
        return max(map(len, self._bytes)) if self._exact else None

    @property
    def chat_template(self) -> str:
        return self._template.source

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        while True:
            tokens = (self._llama.llama_token * room)()
            count = self._llama.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special_tokens, True)
            if count >= 0:
                return list(tokens[:count])
            if -count <= room:
                raise InvalidArgument("input", "the text is too long to be tokenized")
            room = -count

    def render_chat(self, chat: ChatPrompt) -> str:
        return self._template.render(chat)

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        hidden = frozenset() if keep_special_tokens else self._special
        if self._exact:
            return b"".join([self._bytes[i] for i in token_ids if i not in hidden]).decode("utf-8", "replace")
        # Vocabularies of sentencepiece: the space before the first word is not text.
        ids = [i for i in token_ids if i not in hidden]
        tokens = (self._llama.llama_token * len(ids))(*ids)
        room = 16 + sum(len(self._bytes[i]) for i in ids)
        buffer = ctypes.create_string_buffer(room)
        count = self._llama.llama_detokenize(self._vocab, tokens, len(ids), buffer, room, False, keep_special_tokens)
        return buffer.raw[: max(count, 0)].decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]

    def _piece(self, token_id: int) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = int(self._llama.llama_token_to_piece(self._vocab, token_id, buffer, room, 0, True))
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def _names(self) -> dict[str, str]:
        """Special tokens by the names that templates use."""
        found = {
            "bos_token": self._llama.llama_vocab_bos(self._vocab),
            "eos_token": self._llama.llama_vocab_eos(self._vocab),
            "pad_token": self._llama.llama_vocab_pad(self._vocab),
        }
        return {
            name: "" if token_id == _NULL_TOKEN else self._bytes[token_id].decode("utf-8", "replace")
            for name, token_id in found.items()
        }


class GgufTemplates:
    """What `ChatTemplate` asks of a transformers tokenizer: its template, and running it as transformers does."""

    def __init__(self, chat_template: str, names: dict[str, str]) -> None:
        self.chat_template = chat_template
        self._names = names

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **variables: Any,
    ) -> str:
        """Render a conversation. Raises whatever the template raises."""
        template = _environment().from_string(chat_template or self.chat_template)
        text: object = template.render(
            messages=messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **{**self._names, **variables},
        )
        return str(text)


def _environment() -> Any:
    """Jinja as chat templates expect it (transformers.utils.chat_template_utils): a sandbox that changes nothing."""
    from jinja2 import Environment
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment: Environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
