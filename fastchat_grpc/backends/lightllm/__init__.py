"""A LightLLM server, which is started here and asked over HTTP. Begin with `backend`."""

from __future__ import annotations

from fastchat_grpc.backends.lightllm.backend import create

__all__ = ["create"]
