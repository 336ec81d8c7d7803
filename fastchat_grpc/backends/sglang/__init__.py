"""SGLang's engine in this process. Begin with `backend`; `requests` is what it is asked and what it answers."""

from __future__ import annotations

from fastchat_grpc.backends.sglang.backend import create

__all__ = ["create"]
