"""Backends by name. Each module is imported only when its backend is made, with the libraries it needs."""

from __future__ import annotations

import importlib
import platform
from dataclasses import replace
from pathlib import Path
from typing import cast

from fastchat_grpc.backends.base import Backend
from fastchat_grpc.backends.capabilities import TRAITS
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.errors import ConfigError

AUTO = "auto"
"""Takes OpenVINO for an x86 CPU where it is installed, else transformers."""


def names() -> tuple[str, ...]:
    """What may be asked for by name."""
    return (AUTO, *TRAITS)


def create(config: BackendConfig) -> Backend:
    """Make the backend that `config` names. Raises ConfigError for an unknown name or a missing library."""
    if config.name == AUTO:
        config = replace(config, name=best(config))
    if ":" in config.name:
        return _create_own(config)
    if config.name not in TRAITS:
        raise ConfigError(f"--backend must be one of {', '.join(names())}, or module:factory, got {config.name}")
    try:
        module = importlib.import_module(f"fastchat_grpc.backends.{config.name}")
        return cast(Backend, module.create(config))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fastchat_grpc"):
            raise
        raise ConfigError(
            f"backend {config.name} needs {error.name}, which is not installed; "
            f"run: pip install 'fastchat-grpc[{TRAITS[config.name].extra}]'"
        ) from error


def _create_own(config: BackendConfig) -> Backend:
    """Make a backend that is not of this package: `module:factory`, where factory takes a BackendConfig."""
    module, _, factory = config.name.partition(":")
    try:
        return cast(Backend, getattr(importlib.import_module(module), factory)(config))
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--backend {config.name} cannot be imported: {error}") from error


def best(config: BackendConfig) -> str:
    """The backend that serves this model best on this machine, without loading anything."""
    if _wants_openvino(config):
        from fastchat_grpc.backends import openvino_model

        if openvino_model.can_load(config):
            return "openvino"
    return "transformers"


def _wants_openvino(config: BackendConfig) -> bool:
    model = config.model
    on_cpu = model.device == "cpu" or (model.device == "auto" and not _has_gpu())
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return on_cpu and x86 and TRAITS["openvino"].installed


def _has_gpu() -> bool:
    """Whether there is an NVIDIA or AMD GPU, by its driver's device, so that no library need be loaded."""
    return any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/kfd"))
