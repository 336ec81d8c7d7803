"""Any Hugging Face model, through the project's own engine (`fastchat_grpc.engine`). Begin with `backend`."""

from __future__ import annotations

from fastchat_grpc.backends.transformers.backend import create

__all__ = ["create"]
