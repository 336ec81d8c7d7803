"""Models of a backend with what tells them from others of their name: the same for every backend that has files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import ModelInfo
from fastchat_grpc.text.reasoning import AUTO, marks_of

_ELSEWHERE = frozenset({"multi", "upstream"})
"""Backends whose model path is no model: a list of backends, which identify their own, or a server's name for it."""
_PLAIN = frozenset({"float32", "float16", "bfloat16"})


async def identified(
    models: Sequence[ModelInfo], config: BackendConfig, chat_template: Callable[[str], str]
) -> Sequence[ModelInfo]:
    """The models with fingerprints where their files tell them; those that the backend knows better stay.

    Args:
        chat_template: of the model of a name.
    """
    return [_as_it_thinks(model, config, chat_template) for model in await _by_files(models, config)]


def _as_it_thinks(model: ModelInfo, config: BackendConfig, chat_template: Callable[[str], str]) -> ModelInfo:
    """With what a --reasoning-parser changes in the answers. What a template tells by itself its files tell, too."""
    parser = config.model.reasoning_parser
    if parser == AUTO or config.name in _ELSEWHERE or not model.fingerprint:
        return model
    template = chat_template(model.name)
    marks = marks_of(parser, template)
    if marks == marks_of(AUTO, template):
        return model
    from fastchat_grpc.models.fingerprint import thinking

    return replace(model, fingerprint=thinking(model.fingerprint, marks))


def number_format(model: ModelInfo) -> str:
    """What a loaded model's numbers are like, in words that differ where results do; empty where its backend is silent.

    What a worker was asked for does not tell it: "auto" is 8 bits on one processor and float32 on another. Plain
    numbers are the same in every engine; a quantization is its engine's own, whatever its name.
    """
    if not model.quantization or model.quantization in _PLAIN:
        return "/".join(filter(None, (model.quantization, model.precision)))
    return "/".join(filter(None, (model.backend, model.quantization, model.precision)))


async def _by_files(models: Sequence[ModelInfo], config: BackendConfig) -> Sequence[ModelInfo]:
    if config.name in _ELSEWHERE or all(model.fingerprint for model in models):
        return models
    return await asyncio.to_thread(_identified, models, config)


def _identified(models: Sequence[ModelInfo], config: BackendConfig) -> Sequence[ModelInfo]:
    from fastchat_grpc.models.fingerprint import UNKNOWN, identify, identify_adapter

    base = UNKNOWN if not models else identify(config.model, number_format(models[0]))
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
