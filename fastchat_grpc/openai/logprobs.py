"""Log probabilities in the two formats of the OpenAI API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastchat_grpc.core import TokenLogprob, TopLogprob
from fastchat_grpc.text.offsets import Placed

LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot say (vLLM's value)."""


def chat_logprobs(entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    """Logprobs of a chat choice: one object per token."""
    return {
        "content": [
            {
                "token": entry.token,
                "logprob": _finite(entry.logprob),
                "bytes": list(entry.token_bytes),
                "top_logprobs": [_token(top) for top in entry.top],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def _token(entry: TopLogprob) -> dict[str, Any]:
    return {"token": entry.token, "logprob": _finite(entry.logprob), "bytes": list(entry.token_bytes)}


def completion_logprobs(entries: Iterable[Placed]) -> dict[str, Any]:
    """Logprobs of a text choice: parallel lists."""
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for entry, offset in entries:
        tokens.append(entry.token)
        offsets.append(offset)
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
