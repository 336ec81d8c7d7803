"""POST /v1/completions: from JSON to domain requests, one per prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastchat_grpc.core import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_REQUEST_ID_LENGTH,
    GenerateRequest,
    ModelInfo,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.openai.call import Call
from fastchat_grpc.openai.fields import Fields, integers
from fastchat_grpc.openai.grammar import parse_grammar
from fastchat_grpc.openai.jsonio import type_name
from fastchat_grpc.openai.paths import GRAMMAR
from fastchat_grpc.openai.settings import (
    RENAMES,
    find_model,
    limit,
    longest,
    model_name,
    parse_generation,
    parse_reply,
    refuse_rest,
)

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for text completions, and vLLM's."""
_RENAMES = {**RENAMES, "prompt_token_ids": "prompt", "input": "prompt", "output.prompt_logprobs": "logprobs"}


def parse_completion(
    values: Mapping[str, Any], models: Sequence[ModelInfo], request_id: str = "", *, strict: bool = False
) -> Call:
    """Check and convert a text completion. Raises InvalidArgument, which names the field.

    Args:
        strict: members that nobody knows are refused, too.
    """
    fields = Fields(values)
    model = find_model(models, model_name(fields))
    prompts = parse_prompts(fields.raw("prompt"), "prompt")
    grammar, grammar_path = parse_grammar(fields)
    echo = bool(fields.flag("echo"))
    max_tokens, unlimited = limit(fields, "max_tokens", 0)
    if unlimited:
        max_tokens = longest(model)
    if max_tokens == 0 and not echo:
        raise fields.wrong("max_tokens", "must be at least 1, or 0 with echo to score a prompt, got 0")
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    reply = replace(
        parse_reply(fields, model, {**_RENAMES, GRAMMAR: grammar_path}),
        logprobs=logprobs is not None,
        echo=echo,
        without_output=max_tokens == 0,
    )
    generation = parse_generation(
        fields,
        prompts[0],
        reply,
        grammar=grammar,
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max(max_tokens, 1),
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
        request_id=request_id,
    )
    n = generation.output.n
    if len(prompts) * n > MAX_CHOICES:
        raise fields.wrong("prompt", f"prompts times n must be at most {MAX_CHOICES}, got {len(prompts)} times {n}")
    ignored = _refuse_rest(fields, n, strict=strict)
    return Call(generations=tuple(_per_prompt(generation, prompts)), reply=reply, ignored=ignored)


def parse_prompts(value: object, path: str) -> tuple[Prompt, ...]:
    """A string, token ids, or a list of either. Raises InvalidArgument."""
    if isinstance(value, str):
        return (_prompt(value, path),)
    if value is None:
        raise InvalidArgument(path, "is required")
    if not isinstance(value, list):
        raise InvalidArgument(path, f"must be a string, token ids, or a list of either, got {type_name(value)}")
    if value and isinstance(value[0], (int, float)):
        return (_prompt(value, path),)
    if not 1 <= len(value) <= MAX_CHOICES:
        raise InvalidArgument(path, f"must hold 1 to {MAX_CHOICES} prompts, got {len(value)}")
    return tuple(_prompt(item, f"{path}[{i}]") for i, item in enumerate(value))


def _prompt(value: object, path: str) -> Prompt:
    if not isinstance(value, (str, list)):
        raise InvalidArgument(path, f"must be a string or token ids, got {type_name(value)}")
    if not value:
        raise InvalidArgument(path, "must not be empty")
    return TextPrompt(value) if isinstance(value, str) else TokenPrompt(integers(value, path))


def _per_prompt(generation: GenerateRequest, prompts: Sequence[Prompt]) -> Iterator[GenerateRequest]:
    if len(prompts) == 1:
        yield generation
        return
    for i, prompt in enumerate(prompts):
        suffix = f"-{i}"
        name = generation.request_id
        name = name and name[: MAX_REQUEST_ID_LENGTH - len(suffix)] + suffix
        yield replace(generation, prompt=prompt, request_id=name)


def _refuse_rest(fields: Fields, n: int, *, strict: bool) -> tuple[str, ...]:
    fields.unsupported("suffix", "")
    fields.unsupported("add_special_tokens", True)
    fields.unsupported("prompt_embeds")
    for name in ("messages", "tools"):
        fields.unsupported(name, [], hint="use /v1/chat/completions")
    return refuse_rest(fields, n, strict=strict)
