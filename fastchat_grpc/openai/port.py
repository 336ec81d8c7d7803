"""What the OpenAI surface asks of the place where it runs.

A worker answers over its admission and backend; a controller answers by relaying to the worker that it
picks. The servicer sees neither: it speaks JSON on one side and domain types on the other.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from fastchat_grpc.core import EmbedRequest, EmbedResult, Event, GenerateRequest, ModelInfo, Prompt


class GenerationPort(Protocol):
    """Generation as the OpenAI servicer needs it. Every failure is a domain error of `fastchat_grpc.errors`."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield the events of one generation, as `Backend.generate` does.

        Admission, relaying and resuming happen inside. All refusals come before the first event.
        Closing the generator stops the generation and frees its slot.
        """
        ...

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Embed each input. Raises NotSupported where the model has no embeddings."""
        ...

    async def tokenize(self, model: str, prompt: Prompt) -> Sequence[int]:
        """Token ids of a prompt exactly as `generate` would see it. Raises ModelNotFound."""
        ...

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included. Raises ModelNotFound."""
        ...

    def models(self) -> Sequence[ModelInfo]:
        """The models that can be asked for now. Reads local state only."""
        ...
