"""Models of a backend with what tells them from others of their name: the same for every backend that has files."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import ModelInfo

_ELSEWHERE = frozenset({"multi", "upstream"})
"""Backends whose model path is no model: a list of backends, which identify their own, or a server's name for it."""


async def identified(models: Sequence[ModelInfo], config: BackendConfig) -> Sequence[ModelInfo]:
    """The models with fingerprints where their files tell them; those that the backend knows better stay."""
    if config.name in _ELSEWHERE or all(model.fingerprint for model in models):
        return models
    return await asyncio.to_thread(_identified, models, config)


def _identified(models: Sequence[ModelInfo], config: BackendConfig) -> Sequence[ModelInfo]:
    from fastchat_grpc.models.fingerprint import UNKNOWN, identify, identify_adapter

    base = identify(config.model, config.options.get("weights", ""))
    adapters = config.model.lora_adapters
    result = []
    for model in models:
        found = base
        if model.base_model:
            found = identify_adapter(adapters[model.name], base) if model.name in adapters else UNKNOWN
        if not model.fingerprint:
            model = replace(
                model,
                fingerprint=found.fingerprint,
                tokenizer_fingerprint=model.tokenizer_fingerprint or found.tokenizer,
                revision=model.revision or found.revision,
                quantization=model.quantization or found.quantization,
            )
        result.append(model)
    return result
