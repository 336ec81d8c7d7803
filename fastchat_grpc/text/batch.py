"""What a thread that steps a batch of sequences gives to its engine, and gets: tokens in, tokens out, no text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastchat_grpc.core import FinishReason, TokenLogprob
from fastchat_grpc.text.job import Job


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """One choice of a job, as the engine runs it. Compared by identity."""

    job: Job
    index: int
    token_ids: Sequence[int]
    """The prompt, and the output that another worker has made of it."""
    max_tokens: int
    min_tokens: int
    seed: int
    scores_prompt: bool = False
    """Whether the prompt's log probabilities are wanted of this choice."""

    @property
    def prompt_length(self) -> int:
        """Tokens of `token_ids` that are the prompt's."""
        return len(self.job.prompt_ids)


@dataclass(frozen=True, slots=True)
class Output:
    """What a step made for one sequence."""

    sequence: Running
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    """The engine has ended the sequence itself, and forgotten it."""
    started_at: float | None = None
    """When the engine began with the sequence, of the monotonic clock; said once."""
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    error: Exception | None = None
    """The sequence has failed, and the engine has forgotten it."""


class BatchEngine(Protocol):
    """An engine as its thread sees it. Every method runs in that thread."""

    shares_prompts: bool
    """Whether choices of one job that are added together share one pass over their prompt. The prompt's log
    probabilities must then come before, or with, the first token of any of them."""

    def add(self, sequence: Running) -> None:
        """Begin a sequence at a later step. An error raised here is that sequence's."""
        ...

    def remove(self, sequence: Running) -> None:
        """Forget a sequence; nothing is wrong with one that has ended."""
        ...

    def step(self) -> Iterable[Output]:
        """Make the next tokens, which may be those of an earlier step. An error here is every running sequence's."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        ...

    @property
    def kv_cache_usage(self) -> float:
        """Used part of the KV cache, 0 to 1. Read from any thread, as the next two."""
        ...

    @property
    def kv_free_tokens(self) -> int:
        """Tokens that the KV cache has room for; 0: none, or unknown."""
        ...

    @property
    def processed_tokens(self) -> int:
        """Tokens computed since start, those of prompts included."""
        ...

    def reset(self) -> None:
        """Forget every sequence, after a step has failed."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...
