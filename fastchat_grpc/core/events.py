"""What comes of a generation."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeAlias


class FinishReason(enum.Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    CONTENT_FILTER = "content_filter"


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative at a token's place."""

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability (natural) of one token; None for a prompt's first token."""

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one choice."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    """Those of the completion that are reasoning."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds since the request's arrival at the worker."""

    queued_s: float = 0.0
    time_to_first_token_s: float = 0.0
    total_s: float = 0.0
    prepared_s: float = 0.0
    """When the prompt was tokenized and the engine got it; known on the worker alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEcho:
    """The prompt as the model sees it; sent first, and only when asked for."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """Output of one choice since its last Delta. `reasoning` is what the model thinks before it says the text."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    cumulative_text: str = ""
    reasoning: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Who answered which request: names, and the model's fingerprint. Empty where unknown."""

    model: str = ""
    worker_id: str = ""
    request_id: str = ""
    model_fingerprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The end of one choice. `matched` is the stop string or the request's stop token that ended it."""

    index: int
    finish_reason: FinishReason
    usage: Usage
    matched: str | int | None = None
    timings: Timings = Timings()
    origin: Origin | None = None
    """Who answered; set where the answer leaves a worker."""


Event: TypeAlias = PromptEcho | Delta | Completion
