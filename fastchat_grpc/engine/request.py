"""What the engine knows of a request while it runs it."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Any

from fastchat_grpc.core import GenerateRequest, TokenLogprob
from fastchat_grpc.engine.kv_cache import BlockTable
from fastchat_grpc.text.batch import Running
from fastchat_grpc.text.grammar import GrammarState
from fastchat_grpc.text.stop import EndTokens


@dataclass(eq=False, slots=True, kw_only=True)
class Request:
    """One GenerateRequest, whose choices share what is known of the prompt."""

    spec: GenerateRequest
    prompt: Tokens[int]
    number: int = 0
    """Of its arrival: the order within a priority."""
    sequences: list[Sequence] = field(default_factory=list)
    """Choices that have not ended."""
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    """By position; filled during prefill where the request asks for them."""
    started: bool = False
    """Whether any of its tokens have been computed."""
    scored: bool = False
    """Whether the log probabilities of its prompt have been handed out."""
    ends: EndTokens | None = None

    @property
    def adapter(self) -> str:
        """LoRA adapter to run with, or empty. Keys and values depend on it, beside the tokens."""
        return self.spec.lora_adapter

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log probabilities of the prompt are still to be handed out."""
        return not self.scored and self.spec.output.prompt_logprobs is not None and self.spec.resume is None


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """One choice of a request: its tokens, and how far they have been computed."""

    request: Request
    index: int
    tokens: list[int]
    """Prompt and output so far."""
    seed: int
    running: Running | None = None
    """What the engine was given, and says its tokens by."""
    computed: int = 0
    """Tokens at the start whose keys and values are in the cache."""
    table: BlockTable = field(default_factory=BlockTable)
    followers: list[Sequence] = field(default_factory=list)
    """Choices of the same request that wait for this one's prefill to share it."""
    grammar: GrammarState | None = None
    sampling_state: Any = None
    """Owned by the sampler: token counts for penalties."""
    runner_state: Any = None
    """Owned by the model runner, where it keeps a cache per sequence."""
    finished: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def output_length(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def order(self) -> tuple[int, int, int]:
        """Place in the queue: lower runs earlier, and is preempted later."""
        return self.request.spec.priority, self.request.number, self.index


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence to compute in one step."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    """Whether they are all that was left, so that a new token follows."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: decodes (one token each) first, then prefill chunks."""

    chunks: tuple[Chunk, ...]
    forks: tuple[tuple[Sequence, Sequence], ...] = ()
    """(parent, child): after the step the child has the parent's cache, and samples from its logits."""

    @property
    def sampled(self) -> list[Sequence]:
        """Sequences that get a token in this step: those of the chunks in order, then forked ones."""
        return [c.sequence for c in self.chunks if c.samples] + [child for _, child in self.forks]

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences that the step touches."""
        return [c.sequence for c in self.chunks] + [child for _, child in self.forks]
