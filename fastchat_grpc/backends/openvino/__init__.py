"""Text models on OpenVINO GenAI, exported by Optimum. GenAI runs in a process of its own.

Begin with `backend`, which finds the model (`model`, `convert`, `gguf`) and starts `engine`, the near side of
`process`; the two speak `messages`.
"""

from __future__ import annotations

from fastchat_grpc.backends.openvino.backend import create

__all__ = ["create"]
