"""Requests in the words of OpenVINO GenAI's GenerationConfig."""

from __future__ import annotations

from typing import Any

from fastchat_grpc.core import Grammar, GrammarKind, SamplingParams
from fastchat_grpc.text.job import Job
from fastchat_grpc.text.seeds import splitmix64
from fastchat_grpc.text.tokenizer import Tokenizer

JSON_OBJECT = r"""
root ::= object
value ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws (pair (ws "," ws pair)* ws)? "}"
pair ::= string ws ":" ws value
array ::= "[" ws (value (ws "," ws value)* ws)? "]"
string ::= "\"" ([^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\""
number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [+-]? [0-9]+)?
ws ::= ("\r"? "\n")? [ \t]{0,32}
"""
"""An object by RFC 8259, with white space that ends: the library's own grammar of JSON allows any amount."""


def generation_config(job: Job, index: int, seed: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Fields of the GenerationConfig of one choice."""
    stopping, output = job.request.stopping, job.request.output
    eos = tokenizer.eos_token_ids
    config: dict[str, Any] = {
        "max_new_tokens": job.max_tokens(index),
        "min_new_tokens": job.min_tokens(index),
        "ignore_eos": stopping.ignore_eos,
        "stop_token_ids": set(stopping.stop_token_ids) | (set() if stopping.ignore_eos else set(eos)),
        **_sampling(job.request.sampling, seed),
    }
    if eos and not stopping.ignore_eos:
        config["eos_token_id"] = min(eos)
    if output.logprobs is not None or echoes(job, index):
        config["logprobs"] = 1
    if echoes(job, index):
        config["echo"] = True
    return config


def echoes(job: Job, index: int) -> bool:
    """Whether a choice brings the prompt's log probabilities: the first does, where they are asked for."""
    wanted = job.request.output.prompt_logprobs is not None and job.request.resume is None
    return wanted and index == min(job.pending)


def grammar_field(grammar: Grammar | None) -> tuple[str, str] | None:
    """Field of StructuredOutputConfig, and its value."""
    if grammar is None:
        return None
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return "grammar", JSON_OBJECT
        case GrammarKind.JSON_SCHEMA:
            return "json_schema", grammar.source
        case GrammarKind.REGEX:
            return "regex", grammar.source
        case GrammarKind.LARK:
            raise AssertionError("refused before")


def _sampling(sampling: SamplingParams, seed: int) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if sampling.repetition_penalty != 1:
        config["repetition_penalty"] = sampling.repetition_penalty
    if sampling.presence_penalty:
        config["presence_penalty"] = sampling.presence_penalty
    if sampling.frequency_penalty:
        config["frequency_penalty"] = sampling.frequency_penalty
    # Only the likeliest token is as likely as the likeliest; the engine takes min_p below 1 alone.
    if sampling.greedy or sampling.min_p >= 1:
        return config | {"do_sample": False}
    config |= {"do_sample": True, "temperature": sampling.temperature, "rng_seed": _mix(seed)}
    if 0 < sampling.top_p < 1:
        config["top_p"] = sampling.top_p
    if sampling.top_k > 0:
        config["top_k"] = sampling.top_k
    if sampling.min_p > 0:
        config["min_p"] = sampling.min_p
    return config


def _mix(seed: int) -> int:
    """A 64-bit seed in 32 bits, as the engine reads no more: all bits count."""
    return splitmix64(seed, 0) & 0xFFFFFFFF
