"""What chat and text completions have in common: sampling, stopping, streaming, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastchat_grpc.core import (
    DEFAULT_MAX_NEW_TOKENS,
    INT32_MAX,
    MAX_REQUEST_ID_LENGTH,
    GenerateRequest,
    Grammar,
    ModelInfo,
    OutputOptions,
    Prompt,
    SamplingParams,
    StopConditions,
    UnsetInt,
)
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.openai.call import Reply
from fastchat_grpc.openai.elsewhere import refuse_elsewhere
from fastchat_grpc.openai.fields import Fields, integers, number, shorten, strings
from fastchat_grpc.openai.jsonio import type_name
from fastchat_grpc.openai.paths import renamed_errors

UNARY_STREAM_INTERVAL = 16
"""Tokens between events of a generation whose caller sees only its end."""
RENAMES = {
    "stopping.max_new_tokens": "max_tokens",
    "stopping.min_new_tokens": "min_tokens",
    "stopping.include_stop": "include_stop_str_in_output",
    "prompt_token_ids.ids": "prompt",
    "output.keep_special_tokens": "skip_special_tokens",
    "output.stream_interval": "stream",
    "lora_adapter": "model",
}


def find_model(models: Sequence[ModelInfo], name: str) -> ModelInfo | None:
    """The model of that name; the only one where the name is empty."""
    if not name:
        return models[0] if len(models) == 1 else None
    return next((model for model in models if model.name == name), None)


def model_name(fields: Fields) -> str:
    """The model asked for; empty for the only one."""
    return fields.text("model") or ""


def parse_reply(fields: Fields, model: ModelInfo | None, renames: Mapping[str, str]) -> Reply:
    """How to answer, as far as both kinds of completion share it."""
    stream = bool(fields.flag("stream"))
    include_usage = continuous = False
    options = fields.nested("stream_options")
    if options is not None:
        if not stream:
            raise fields.wrong("stream_options", "needs stream: true")
        include_usage = bool(options.flag("include_usage"))
        continuous = bool(options.flag("continuous_usage_stats"))
        # Padding against listeners: OpenAI's own servers add it, and a reader drops it.
        options.flag("include_obfuscation")
    return Reply(
        model=model_name(fields) or (model.name if model is not None else ""),
        fingerprint=model.fingerprint if model is not None else "",
        stream=stream,
        include_usage=include_usage,
        continuous_usage=include_usage and continuous,
        renames=renames,
    )


def parse_generation(
    fields: Fields,
    prompt: Prompt,
    reply: Reply,
    *,
    grammar: Grammar | None,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    keep_special: bool = False,
    request_id: str = "",
) -> GenerateRequest:
    """The domain request. Raises InvalidArgument that names the caller's field."""
    with renamed_errors(reply.renames):
        return GenerateRequest(
            prompt=prompt,
            model=model_name(fields),
            sampling=_sampling(fields),
            stopping=_stopping(fields, max_tokens),
            output=OutputOptions(
                n=_or(fields.integer("n"), 1),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                echo=reply.echo,
                stream_interval=None if reply.stream else UNARY_STREAM_INTERVAL,
                keep_special_tokens=fields.flag("skip_special_tokens") is False or keep_special,
            ),
            grammar=grammar,
            request_id=fields.text("request_id") or request_id[:MAX_REQUEST_ID_LENGTH],
            priority=_or(fields.integer("priority"), 0),
            session_key=fields.text("prompt_cache_key") or "",
            truncate_prompt_tokens=fields.integer("truncate_prompt_tokens", 1),
        )


def _sampling(fields: Fields) -> SamplingParams:
    given: dict[str, Any] = {
        name: value
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        if (value := fields.number(name)) is not None
    }
    if (top_k := fields.integer("top_k")) is not None:
        given["top_k"] = top_k
    seed = fields.long("seed")
    # No seed of one's own is -1 in vLLM and llama.cpp, and so their clients send it.
    return SamplingParams(seed=None if seed == -1 else seed, logit_bias=_logit_bias(fields), **given)


def _logit_bias(fields: Fields) -> Mapping[int, float]:
    biases: dict[int, float] = {}
    for key, value in (fields.table("logit_bias") or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) <= INT32_MAX):
            raise InvalidArgument(f"logit_bias[{shorten(key, quotes=False)}]", "must be keyed by token ids")
        biases[int(key)] = number(value, f"logit_bias[{key}]")
    return biases


def _stopping(fields: Fields, max_tokens: int) -> StopConditions:
    stop = fields.raw("stop")
    if isinstance(stop, str):
        stop = [stop]
    elif stop is not None and not isinstance(stop, list):
        raise fields.wrong("stop", f"must be a string or a list of strings, got {type_name(stop)}")
    return StopConditions(
        max_new_tokens=max_tokens,
        min_new_tokens=_or(fields.integer("min_tokens", 0), 0),
        # An empty field of a form means no stop; taken at its word it would stop at once.
        stop=tuple(item for item in strings(stop or [], "stop") if item),
        stop_token_ids=integers(fields.items("stop_token_ids") or [], "stop_token_ids"),
        ignore_eos=bool(fields.flag("ignore_eos")),
        include_stop=bool(fields.flag("include_stop_str_in_output")),
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def ignore_harmless(fields: Fields) -> None:
    """Members that are accepted and change nothing, whatever they hold: gateways put data of their own there."""
    fields.ignore("user", "safety_identifier", "prompt_cache_retention", "store", "service_tier", "metadata")


def limit(fields: Fields, name: str, low: int) -> tuple[int | None, bool]:
    """A number of tokens, and whether the caller asks for no limit, as -1 does in the APIs of several servers."""
    value = fields.integer(name, -1)
    if value == -1:
        return None, True
    if value is not None and value < low:
        raise fields.wrong(name, f"must be at least {low}, or -1 for no limit, got {value}")
    return value, False


def longest(model: ModelInfo | None) -> int:
    """Tokens up to the end of the context, where generation ends by itself.

    Where the context is not known here the number stays unset, and what is known where the model runs counts.
    """
    known = model is not None and model.context_length > 0
    return model.context_length if model is not None and known else UnsetInt(DEFAULT_MAX_NEW_TOKENS)


def refuse_rest(fields: Fields, choices: int, *, strict: bool) -> tuple[str, ...]:
    """Refuse, by name, what would change the answer and this server has not. Returns what is left and ignored.

    `choices`: how many are asked for of a prompt.
    """
    ignore_harmless(fields)
    fields.unsupported("best_of", choices)
    fields.unsupported("spaces_between_special_tokens", True)
    fields.unsupported("return_tokens_as_token_ids", False)
    fields.unsupported("return_token_ids", False)
    fields.unsupported("prompt_logprobs", hint="use echo and logprobs of a text completion")
    for name in ("logits_processors", "bad_words"):
        fields.unsupported(name, [])
    for name in ("allowed_token_ids", "kv_transfer_params", "vllm_xargs", "moderation"):
        fields.unsupported(name)
    refuse_elsewhere(fields)
    return fields.rest(strict=strict)
