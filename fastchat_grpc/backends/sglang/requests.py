"""Between our requests and SGLang's: settings and parameters in, tokens and log probabilities out, refusals."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from fastchat_grpc.backends import driver
from fastchat_grpc.backends.driver import Piece
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import FinishReason, GenerateRequest, Grammar, GrammarKind, TokenLogprob
from fastchat_grpc.errors import ConfigError, FastChatError, InvalidArgument, UnsupportedField, WorkerUnavailable
from fastchat_grpc.models.facts import ModelFacts
from fastchat_grpc.models.resolve import resolve
from fastchat_grpc.text.job import Job
from fastchat_grpc.text.tokenizer import Tokenizer

MAX_REPETITION_PENALTY = 2.0
"""SGLang refuses more."""
_OURS = {
    "model_path": "--model-path",
    "tokenizer_path": "--model-path",
    "revision": "--revision",
    "served_model_name": "--model-names",
    "trust_remote_code": "--trust-remote-code",
    "dtype": "--dtype",
    "device": "--device",
    "quantization": "--quantization",
    "context_length": "--context-length",
    "max_running_requests": "--limit-worker-concurrency",
    "tp_size": "--num-gpus",
    "tensor_parallel_size": "--num-gpus",
    "random_seed": "--seed",
    "lora_paths": "--lora",
    "enable_lora": "--lora",
    "stream_interval": "--stream-interval",
}
"""Arguments that flags of the worker set."""
_REFUSED = {
    "log_requests": "it would write prompts into logs",
    "skip_tokenizer_init": "grammars and stop tokens need the tokenizer",
    "incremental_streaming_output": "the backend reads increments",
    "tokenizer_worker_num": "the backend is the only one to feed the engine",
    "host": "the engine does not listen; the worker does",
    "port": "the engine does not listen; the worker does",
}
_FINISH_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}
_BAD_REQUEST = 400


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"--backend-option: {message}")


def parse_options(config: BackendConfig) -> Mapping[str, Any]:
    """The options, as SGLang's own command line reads them. Raises ConfigError."""
    given = {name.replace("-", "_"): value for name, value in config.options.items()}
    for name in given:
        if name in _OURS:
            raise ConfigError(f"--backend-option {name} is set by {_OURS[name]}")
        if name in _REFUSED:
            raise ConfigError(f"--backend-option {name} is not supported: {_REFUSED[name]}")
    if not given:
        return {}
    from sglang.srt.server_args import ServerArgs

    parser = _Parser(add_help=False, allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    words = ["--model-path", config.model.path]
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if flag not in parser._option_string_actions:
            raise ConfigError(f"backend sglang has no option {name!r}; its options are SGLang's server arguments")
        words += _words(flag, value)
    parsed = parser.parse_args(words)
    return {name: getattr(parsed, name) for name in given}


def _words(flag: str, value: str) -> list[str]:
    """An option as words of a command line; switches have no value there."""
    if value.lower() == "true":
        return [flag]
    if value.lower() == "false":
        raise ConfigError(f"--backend-option {flag[2:]} is off unless it is true")
    return [f"{flag}={value}"]


def engine_settings(config: BackendConfig, facts: ModelFacts, max_running: int) -> dict[str, Any]:
    """Keyword arguments of SGLang's Engine that come from our settings."""
    model = config.model
    settings: dict[str, Any] = {
        "model_path": str(facts.source),
        "served_model_name": model.served_names[0],
        "trust_remote_code": model.trust_remote_code,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "context_length": model.context_length,
        "max_running_requests": max_running,
        "tp_size": max(model.num_gpus, len(model.gpus)),
        "random_seed": secrets.randbits(31) if model.seed is None else model.seed & 0x7FFFFFFF,
        "incremental_streaming_output": True,
        "log_level": "warning",
    }
    if model.device != "auto":
        settings["device"] = model.device
    if model.lora_adapters:
        settings["lora_paths"] = {name: str(resolve(path)) for name, path in model.lora_adapters.items()}
    return settings


def check_limits(request: GenerateRequest, seeded: bool) -> None:
    """Refuse what SGLang would refuse or ignore, under the names of our fields."""
    sampling = request.sampling
    if sampling.seed is not None and not sampling.greedy and not seeded:
        raise UnsupportedField(
            "sampling.seed", "SGLang heeds seeds only with --backend-option enable_deterministic_inference=true"
        )
    if sampling.repetition_penalty > MAX_REPETITION_PENALTY:
        raise UnsupportedField(
            "sampling.repetition_penalty",
            f"SGLang allows at most {MAX_REPETITION_PENALTY:g}, got {sampling.repetition_penalty:g}",
        )
    changed = (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.logit_bias
        or request.stopping.min_new_tokens
        or request.grammar is not None
    )
    if request.output.logprobs is not None and changed:
        raise UnsupportedField(
            "output.logprobs",
            "SGLang gives log probabilities after penalties, biases and grammars; ask for them without these",
        )


def sampling_parameters(job: Job, index: int, tokenizer: Tokenizer, seed: int | None) -> dict[str, Any]:
    """SGLang's sampling_params for one choice. SGLang ends it at stop tokens and its length; stop strings are ours."""
    sampling, stopping = job.request.sampling.plain(), job.request.stopping
    stops = set(stopping.stop_token_ids)
    if not stopping.ignore_eos:
        stops |= tokenizer.eos_token_ids
    parameters: dict[str, Any] = {
        "max_new_tokens": job.max_tokens(index),
        "min_new_tokens": job.min_tokens(index),
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": 1.0 if sampling.greedy else sampling.top_p,
        "top_k": sampling.top_k if sampling.top_k > 0 else -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop_token_ids": sorted(stops),
        "ignore_eos": stopping.ignore_eos,
        **_grammar(job.request.grammar),
    }
    if sampling.logit_bias:
        parameters["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    if seed is not None:
        parameters["sampling_seed"] = seed
    return parameters


def _grammar(grammar: Grammar | None) -> dict[str, str]:
    if grammar is None:
        return {}
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return {"json_schema": '{"type": "object"}'}
        case GrammarKind.JSON_SCHEMA:
            return {"json_schema": grammar.source}
        case GrammarKind.REGEX:
            return {"regex": grammar.source}
        case GrammarKind.LARK:
            raise UnsupportedField("structured_output.lark", "SGLang has no Lark grammars")


def piece(tokenizer: Tokenizer, request: GenerateRequest, output: Mapping[str, Any]) -> Piece:
    """What is new in an output of SGLang with incremental_streaming_output."""
    meta = output["meta_info"]
    token_ids = [int(token_id) for token_id in output["output_ids"]]
    logprobs: list[TokenLogprob] = []
    if request.output.logprobs is not None:
        count = request.output.logprobs
        tops = meta.get("output_top_logprobs") or [None] * len(token_ids)
        entries = list(zip(meta["output_token_logprobs"], tops, strict=False))[: len(token_ids)]
        logprobs = [_logprob(tokenizer, entry, top, count) for entry, top in entries]
    reason = meta.get("finish_reason")
    return Piece(token_ids, logprobs, None if reason is None else _FINISH_REASONS[reason["type"]])


def prompt_logprobs(tokenizer: Tokenizer, job: Job, meta: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    """Log probabilities of the prompt's tokens, from the first output of a request that asked for them."""
    count = job.request.output.prompt_logprobs or 0
    entries = meta["input_token_logprobs"][: len(job.prompt_ids)]
    tops = meta.get("input_top_logprobs") or [None] * len(entries)
    return tuple(_logprob(tokenizer, entry, top, count) for entry, top in zip(entries, tops, strict=False))


def _logprob(tokenizer: Tokenizer, entry: Sequence[Any], top: Sequence[Any] | None, count: int) -> TokenLogprob:
    """SGLang's (log probability, token id, text); `top` holds as many of the likeliest, likeliest first."""
    logprob, token_id = entry[0], int(entry[1])
    alternatives = [(int(other[1]), float(other[0])) for other in (top or ())[:count]]
    return driver.token_logprob(tokenizer, token_id, None if logprob is None else float(logprob), alternatives)


def refusal(meta: Mapping[str, Any], grammar: Grammar | None = None) -> FastChatError | None:
    """The error that an output's finish reason stands for, of a request with this grammar; or None."""
    reason = meta.get("finish_reason")
    if reason is None or reason["type"] != "abort":
        return None
    status = reason.get("status_code")
    if status is None:
        return None
    if int(status) == _BAD_REQUEST:
        return refused(str(reason.get("message") or "no reason given"), grammar)
    return WorkerUnavailable(f"SGLang gave the request up with status {int(status)}")


def refused(message: str, grammar: Grammar | None = None) -> InvalidArgument:
    """The error for a request that SGLang does not take, in its words; about the grammar where it is."""
    said = message.splitlines()[0][:200]
    if grammar is not None and "grammar" in message.lower():
        return InvalidArgument(f"structured_output.{grammar.kind.value}", f"cannot be compiled: {said}")
    return InvalidArgument("", f"SGLang refused the request: {said}")
