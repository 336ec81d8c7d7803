"""vLLM's asynchronous engine in this process. Begin with `backend`; `arguments` starts it, `requests` asks it."""

from __future__ import annotations

from fastchat_grpc.backends.vllm.backend import create

__all__ = ["create"]
