"""Counting tokens over HTTP: vLLM's /tokenize and /detokenize, FastChat's /api/v1/token_check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastchat_grpc.core import ModelInfo, Prompt, TextPrompt
from fastchat_grpc.errors import InvalidArgument, ModelNotFound
from fastchat_grpc.openai.chat_request import parse_conversation
from fastchat_grpc.openai.fields import Fields, integers, objects
from fastchat_grpc.openai.jsonio import dumps
from fastchat_grpc.openai.settings import find_model, model_name

MAX_CHECKS = 1024
TOKENIZE_RENAMES = {"chat.messages": "messages", "chat": "messages", "chat.tools": "tools"}


def parse_tokenize(values: Mapping[str, Any], *, strict: bool = False) -> tuple[str, Prompt, tuple[str, ...]]:
    """Model and prompt of a /tokenize request (`prompt`, or `messages` as in a chat), and what is ignored."""
    fields = Fields(values)
    name = model_name(fields)
    text = fields.text("prompt")
    prompt: Prompt
    if fields.raw("messages") is not None:
        if text is not None:
            raise fields.wrong("prompt", "cannot be combined with messages")
        prompt, _ = parse_conversation(fields)
        fields.unsupported("add_special_tokens", False)
    else:
        if not text:
            raise fields.wrong("prompt", "is required" if text is None else "must not be empty")
        prompt = TextPrompt(text)
        fields.unsupported("add_special_tokens", True)
    fields.unsupported("return_token_strs", False)
    return name, prompt, fields.rest(strict=strict)


def render_tokenize(token_ids: Sequence[int], model: ModelInfo | None) -> bytes:
    """vLLM's answer: the tokens, their count, and the context length of the model."""
    length = model.context_length if model is not None else 0
    return dumps({"count": len(token_ids), "max_model_len": length, "tokens": list(token_ids), "token_strs": None})


def parse_detokenize(
    values: Mapping[str, Any], *, strict: bool = False
) -> tuple[str, tuple[int, ...], tuple[str, ...]]:
    """Model and token ids of a /detokenize request, and what is ignored."""
    fields = Fields(values)
    name = model_name(fields)
    tokens = fields.items("tokens")
    if tokens is None:
        raise fields.wrong("tokens", "is required")
    ids = integers(tokens, "tokens")
    return name, ids, fields.rest(strict=strict)


def render_detokenize(text: str) -> bytes:
    """vLLM's answer."""
    return dumps({"prompt": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One prompt of a token check."""

    model: ModelInfo
    prompt: TextPrompt
    max_tokens: int

    def render(self, token_count: int) -> dict[str, Any]:
        """Whether the prompt and the wished output fit the context."""
        fits = token_count + self.max_tokens <= self.model.context_length
        return {"fits": fits, "tokenCount": token_count, "contextLength": self.model.context_length}


def parse_token_check(values: Mapping[str, Any], models: Sequence[ModelInfo]) -> list[Check]:
    """The prompts of FastChat's token check. Raises ModelNotFound for one that names no live model."""
    fields = Fields(values)
    prompts = fields.items("prompts")
    if not prompts or len(prompts) > MAX_CHECKS:
        raise InvalidArgument("prompts", f"must hold 1 to {MAX_CHECKS} prompts, got {len(prompts or ())}")
    return [_check(item, models) for item in objects(prompts, "prompts")]


def _check(fields: Fields, models: Sequence[ModelInfo]) -> Check:
    name, text = fields.required("model"), fields.required("prompt")
    if not text:
        raise fields.wrong("prompt", "must not be empty")
    model = find_model(models, name)
    if model is None:
        raise ModelNotFound(f"{fields.path('model')}: no such model is served; see /v1/models")
    return Check(model=model, prompt=TextPrompt(text), max_tokens=fields.integer("max_tokens", 0) or 0)


def render_token_check(checks: Sequence[Check], token_counts: Sequence[int]) -> bytes:
    """FastChat's answer."""
    return dumps({"prompts": [check.render(count) for check, count in zip(checks, token_counts, strict=True)]})
