"""What all replies have in common: their first members, and how their choices end."""

from __future__ import annotations

from typing import Any

from fastchat_grpc.core import Completion, FinishReason
from fastchat_grpc.errors import BackendFailed
from fastchat_grpc.openai.call import Reply


def base_of(reply: Reply, reply_id: str, kind: str, created: int) -> dict[str, Any]:
    """The members of a reply that say nothing about its choices. `created` is seconds since the epoch."""
    return {
        "id": reply_id,
        "object": kind,
        "created": created,
        "model": reply.model,
        "system_fingerprint": reply.fingerprint or None,
    }


def final_reason(end: Completion | None) -> str:
    """OpenAI's name of why a choice ended.

    OpenAI has none for an answer that broke off, and typed clients fail on others: that is an error.

    Raises:
        BackendFailed: the choice was broken off.
    """
    if end is None or end.finish_reason is FinishReason.ABORT:
        raise BackendFailed("the generation was broken off")
    reason: str = end.finish_reason.value
    return reason
