"""Requests, and what they ask for."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from fastchat_grpc.core.checks import require, require_int32, require_token_ids, within
from fastchat_grpc.core.limits import (
    DEFAULT_MAX_NEW_TOKENS,
    INT32_MAX,
    INT32_MIN,
    MAX_CHOICES,
    MAX_EMBED_INPUTS,
    MAX_LOGPROBS,
    MAX_REQUEST_ID_LENGTH,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
)
from fastchat_grpc.core.prompts import Prompt
from fastchat_grpc.core.sampling import SamplingParams, UnsetInt
from fastchat_grpc.errors import InvalidArgument


@dataclass(frozen=True, slots=True, kw_only=True)
class StopConditions:
    """When a generation ends."""

    max_new_tokens: int = UnsetInt(DEFAULT_MAX_NEW_TOKENS)
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False

    def __post_init__(self) -> None:
        require_int32("stopping.max_new_tokens", self.max_new_tokens, 1)
        require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "stopping.min_new_tokens",
            self.min_new_tokens,
            f"from 0 to max_new_tokens ({self.max_new_tokens})",
        )
        require(
            len(self.stop) <= MAX_STOP_STRINGS,
            "stopping.stop",
            f"{len(self.stop)} strings",
            f"at most {MAX_STOP_STRINGS} strings",
        )
        for i, stop in enumerate(self.stop):
            require(
                1 <= len(stop) <= MAX_STOP_LENGTH,
                f"stopping.stop[{i}]",
                f"{len(stop)} characters",
                f"1 to {MAX_STOP_LENGTH} characters long",
            )
        require_token_ids(self.stop_token_ids, "stopping.stop_token_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """What a generation returns, and how often. `stream_interval` None: the worker's default."""

    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    stream_interval: int | None = None
    cumulative_text: bool = False
    keep_special_tokens: bool = False

    def __post_init__(self) -> None:
        within("output.n", self.n, 1, MAX_CHOICES)
        if self.logprobs is not None:
            within("output.logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            within("output.prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.stream_interval is not None:
            require_int32("output.stream_interval", self.stream_interval, 1)


class GrammarKind(enum.Enum):
    """Kinds of grammar that an output may follow."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar for the output; `source` is its text, empty for JSON_OBJECT."""

    kind: GrammarKind
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumedChoice:
    """A choice that another worker began: the tokens and the characters of reasoning and text that the caller has."""

    index: int
    output_token_ids: tuple[int, ...] = ()
    text_length: int = 0
    finished: bool = False

    def __post_init__(self) -> None:
        require_int32("resume.choices.index", self.index, 0)
        require_token_ids(self.output_token_ids, "resume.choices.output_token_ids")
        require_int32("resume.choices.text_length", self.text_length, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One request for one or more continuations of one prompt."""

    prompt: Prompt
    model: str = ""
    sampling: SamplingParams = SamplingParams()  # noqa: RUF009  # it is frozen
    stopping: StopConditions = StopConditions()
    output: OutputOptions = OutputOptions()
    grammar: Grammar | None = None
    request_id: str = ""
    priority: int = 0
    lora_adapter: str = ""
    session_key: str = ""
    truncate_prompt_tokens: int | None = None
    resume: tuple[ResumedChoice, ...] | None = None
    """None for a new generation. A resumed one sends no prompt event again, even when empty."""
    resume_fingerprint: str = ""
    """`ModelInfo.fingerprint` of the model that began a resumed generation; empty: unknown."""
    resume_backend: str = ""
    """`ModelInfo.backend` of it; empty: unknown."""

    def __post_init__(self) -> None:
        require(
            len(self.request_id) <= MAX_REQUEST_ID_LENGTH,
            "request_id",
            f"{len(self.request_id)} characters",
            f"at most {MAX_REQUEST_ID_LENGTH} characters long",
        )
        require(INT32_MIN <= self.priority <= INT32_MAX, "priority", self.priority, f"from {INT32_MIN} to {INT32_MAX}")
        if self.truncate_prompt_tokens is not None:
            require_int32("truncate_prompt_tokens", self.truncate_prompt_tokens, 1)
        for choice in self.resume or ():
            require(
                choice.index < self.output.n, "resume.choices.index", choice.index, f"below output.n ({self.output.n})"
            )

    def resumed_choice(self, index: int) -> ResumedChoice:
        """What the caller has of choice `index` already."""
        for choice in self.resume or ():
            if choice.index == index:
                return choice
        return ResumedChoice(index=index)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """Inputs to embed: each a text or token ids. `truncate` None: the worker's default."""

    inputs: tuple[str | tuple[int, ...], ...]
    model: str = ""
    truncate: bool | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        count = len(self.inputs)
        require(1 <= count <= MAX_EMBED_INPUTS, "inputs", f"{count} inputs", f"1 to {MAX_EMBED_INPUTS} inputs")
        for i, item in enumerate(self.inputs):
            if not item:
                raise InvalidArgument(f"inputs[{i}]", "must not be empty")
            if not isinstance(item, str):
                require_token_ids(item, f"inputs[{i}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedResult:
    """One vector per input, and the tokens of all inputs."""

    embeddings: Sequence[Sequence[float]]
    prompt_tokens: int
