"""Log probabilities in the two formats of the OpenAI API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastchat_grpc.core import TokenLogprob, TopLogprob
from fastchat_grpc.text.offsets import TextOffsets

LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot say (vLLM's value)."""


def chat_logprobs(entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    """Logprobs of a chat choice: one object per token."""
    return {
        "content": [{**_token(entry), "top_logprobs": [_token(top) for top in entry.top]} for entry in entries],
        "refusal": None,
    }


def _token(entry: TokenLogprob | TopLogprob) -> dict[str, Any]:
    return {"token": entry.token, "logprob": _finite(entry.logprob), "bytes": list(entry.token_bytes)}


def completion_logprobs(entries: Sequence[TokenLogprob], text: str, places: TextOffsets) -> dict[str, Any]:
    """Logprobs of a text choice: parallel lists.

    Args:
        text: what came with them of the choice's text.
        places: the choice's, which has seen all before.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets = places.feed(entries, text)
    for entry in entries:
        tokens.append(entry.token)
        if entry.logprob is None:  # nothing comes before a prompt's first token
            values.append(None)
            tops.append(None)
            continue
        values.append(_finite(entry.logprob))
        top = {item.token: _finite(item.logprob) for item in entry.top}
        top.setdefault(entry.token, _finite(entry.logprob))
        tops.append(top)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _finite(value: float | None) -> float:
    return LEAST if value is None or not value > LEAST else value
