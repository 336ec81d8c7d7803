"""What the names of architectures in a config.json say. Read without transformers or torch."""

from __future__ import annotations

from collections.abc import Sequence

_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_GIVES_VECTORS = ("Model", "ForMaskedLM", "ForPreTraining", "Encoder")
"""Ends of the names of models whose hidden states are what they were trained for, or close to it."""
_SCORES = ("Reward", "Rank", "Classification")


def generates(architectures: Sequence[str]) -> bool:
    """Whether any of them makes text."""
    return any(name.endswith(_GENERATING) for name in architectures)


def other_task(architectures: Sequence[str]) -> str | None:
    """The architecture of a model that was trained for something else than text or embeddings, else None.

    A reranker or classifier has the layers of an embedding model, loads as one, and gives vectors that mean nothing.
    """
    for name in architectures:
        if generates((name,)):
            return None
        if any(word in name for word in _SCORES) or not name.endswith(_GIVES_VECTORS):
            return name
    return None
