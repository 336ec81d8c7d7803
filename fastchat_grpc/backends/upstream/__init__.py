"""A server with an OpenAI API. Begin with `backend`; `request` is what it is sent, `answer` what comes back."""

from __future__ import annotations

from fastchat_grpc.backends.upstream.backend import create

__all__ = ["create"]
