"""The backend interface: what a worker asks of an engine.

A backend validates what depends on its model (context length, vocabulary, capabilities) and raises
domain errors from `fastchat_grpc.errors` before the first event, so that a request can be retried
elsewhere. A field that it cannot honour it refuses with `UnsupportedField`; it never ignores one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastchat_grpc.core import EmbedRequest, EmbedResult, Event, GenerateRequest, ModelInfo, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendLoad:
    """Load of an engine at one moment."""

    max_running: int
    """Requests that the engine can batch; the default of the worker's concurrency limit."""
    kv_cache_usage: float = 0.0
    """Used part of the KV cache, 0 to 1."""
    kv_free_tokens: int = 0
    """Tokens that the KV cache has room for; 0: none, or unknown."""
    processed_tokens: int = 0
    """Tokens processed since start, those of prompts included; grows while the engine makes progress."""


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
