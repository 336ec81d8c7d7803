"""The backend interface: what a worker asks of an engine.

A backend validates what depends on its model (context length, vocabulary, capabilities) and raises
domain errors from `fastchat_grpc.errors` before the first event, so that a request can be retried
elsewhere. A field that it cannot honour it refuses with `UnsupportedField`; it never ignores one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastchat_grpc.core import Distribution, EmbedRequest, EmbedResult, Event, GenerateRequest, ModelInfo, Prompt

STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""As vLLM's iteration_tokens_total."""


@dataclass(slots=True)
class Steps:
    """What the steps of an engine were like, since start. Its thread counts; who reads gets figures of one moment."""

    seconds: Distribution = field(default_factory=lambda: Distribution(STEP_SECONDS))
    """How long each took."""
    sequences: Distribution = field(default_factory=lambda: Distribution(BATCH_SIZES))
    """How many sequences got something of each."""
    tokens: Distribution = field(default_factory=lambda: Distribution(STEP_TOKENS))
    """Tokens that each processed, those of prompts included. Empty where the engine cannot tell."""
    failures: int = 0
    """Steps that failed, with all their sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendLoad:
    """Load of an engine at one moment."""

    max_running: int
    """Requests that the engine can batch; the default of the worker's concurrency limit."""
    kv_cache_usage: float | None = None
    """Used part of the KV cache, 0 to 1; None: it has none, or cannot tell."""
    kv_free_tokens: int = 0
    """Tokens that the KV cache has room for; 0: none, or unknown."""
    processed_tokens: int = 0
    """Tokens processed since start, those of prompts included; grows while the engine makes progress."""
    kv_block_size: int = 0
    """Tokens of a block of the KV cache; 0: it has no blocks, or cannot tell."""
    kv_block_count: int = 0
    prefix_cache: bool = False
    """Whether requests share the beginnings of their prompts, and `Usage.cached_tokens` tells how much."""
    preemptions: int | None = None
    """Sequences that had to give up their place since start, to be computed again; None: it cannot tell."""
    steps: Steps | None = None
    """Steps of the engine since start; None: it cannot tell."""
    parts: tuple[tuple[str, BackendLoad], ...] = ()
    """Of a backend of several engines: the load of each, by the first of its models."""


class Backend(Protocol):
    """An engine with one or more models. All methods run on the event loop and must not block it."""

    async def start(self) -> Sequence[ModelInfo]:
        """Load everything and return the models served. Raises ModelLoadError."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield a PromptEcho if asked for, then Deltas, then one Completion per choice.

        Closing the generator aborts the request and frees what it holds.
        """
        ...

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Embed each input. Raises NotSupported where the model has no embeddings."""
        ...

    async def tokenize(self, model: str, prompt: Prompt) -> Sequence[int]:
        """Token ids of a prompt exactly as `generate` would see it."""
        ...

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        ...

    def chat_template(self, model: str) -> str:
        """The model's chat template (Jinja), or an empty string."""
        ...

    def load(self) -> BackendLoad:
        """Load now; cheap enough for every heartbeat."""
        ...

    async def close(self) -> None:
        """Abort what runs and free everything. Safe to call twice, and after a failed start."""
        ...
