"""GGUF models on llama.cpp. Begin with `backend`; `engine` steps a batch in a thread, `sampler` picks its tokens."""

from __future__ import annotations

from fastchat_grpc.backends.llama_cpp.backend import create

__all__ = ["create"]
