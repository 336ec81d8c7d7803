"""Models on Apple's MLX, by mlx-lm. Begin with `backend`; `engine` steps a batch in a thread."""

from __future__ import annotations

from fastchat_grpc.backends.mlx.backend import create

__all__ = ["create"]
