"""Backends by name. Each module is imported only when its backend is made, with the libraries it needs."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from fastchat_grpc.backends.base import Backend
from fastchat_grpc.backends.capabilities import TRAITS
from fastchat_grpc.backends.identity import identified
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import ModelInfo
from fastchat_grpc.errors import ConfigError
from fastchat_grpc.models.quantization_plan import FASTEST

logger = logging.getLogger(__name__)

AUTO = "auto"
"""Takes the fastest that refuses nothing; see `choose`."""
_GPU_ENGINES = ("vllm", "sglang")
"""Faster than our own engine on an NVIDIA GPU, the fastest first."""


def names() -> tuple[str, ...]:
    """What may be asked for by name."""
    return (AUTO, *TRAITS)


def create(config: BackendConfig) -> Backend:
    """Make the backend that `config` names. Raises ConfigError for an unknown name or a missing library."""
    if config.name == AUTO:
        chosen = choose(config)
        logger.info("backend %s: %s; --backend NAME takes another (fastchat-grpc backends)", chosen.name, chosen.reason)
        config = chosen.applied(config)
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


async def start(backend: Backend, config: BackendConfig) -> Sequence[ModelInfo]:
    """Start a backend: its models, with fingerprints where their files tell them. Raises ModelLoadError."""
    return await identified(await backend.start(), config, backend.chat_template)


def _create_own(config: BackendConfig) -> Backend:
    """Make a backend that is not of this package: `module:factory`, where factory takes a BackendConfig."""
    module, _, factory = config.name.partition(":")
    try:
        return cast(Backend, getattr(importlib.import_module(module), factory)(config))
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--backend {config.name} cannot be imported: {error}") from error


@dataclass(frozen=True, slots=True)
class Chosen:
    """A backend, and why it."""

    name: str
    reason: str

    def applied(self, config: BackendConfig) -> BackendConfig:
        """The configuration with it. Our own engine may choose the precision too, where nobody has."""
        model = config.model
        if self.name == "transformers" and model.quantization is None and not model.load_8bit:
            model = replace(model, quantization=FASTEST)
        return replace(config, name=self.name, model=model)


def choose(config: BackendConfig) -> Chosen:
    """The backend that serves this model best on this machine, without loading or fetching anything.

    On a CPU: our own engine, the fastest there of those that honour every field of a request. With an NVIDIA GPU:
    vLLM, then SGLang, where they are installed and can do what is asked of them. OpenVINO refuses logit biases,
    alternatives' log probabilities and embeddings, so it serves only what nothing else reads.
    """
    path = Path(config.model.path).expanduser()
    if (path / "openvino_model.xml").is_file():
        return Chosen("openvino", "the folder holds a model in OpenVINO's own format")
    if config.model.device in ("auto", "cuda") and _has_nvidia_gpu():
        return _choose_for_gpu(config)
    if path.suffix == ".gguf" and TRAITS["llama_cpp"].installed and not TRAITS["transformers"].installed:
        return Chosen("llama_cpp", "it reads GGUF files")
    if not TRAITS["transformers"].installed and TRAITS["openvino"].installed and config.model.device in ("auto", "cpu"):
        return Chosen("openvino", "the engine that is installed here; fastchat-grpc[transformers] refuses nothing")
    return Chosen("transformers", "our own engine, which refuses no field")


def _choose_for_gpu(config: BackendConfig) -> Chosen:
    for name in _GPU_ENGINES:
        if TRAITS[name].installed and _suits_gpu_engine(config):
            return Chosen(name, "the fastest engine installed here for an NVIDIA GPU")
    hint = "fastchat-grpc[vllm] would be faster on this GPU" if _suits_gpu_engine(config) else "others lack a setting"
    return Chosen("transformers", f"our own engine, which refuses no field; {hint}")


def _suits_gpu_engine(config: BackendConfig) -> bool:
    """Whether vLLM and SGLang read such a model, and have such settings. Options are an engine's own."""
    model = config.model
    own = model.load_8bit or model.cpu_offloading or model.max_gpu_memory is not None or bool(config.options)
    own = own or model.quantization in ("int8", "bnb-8bit", "bnb-4bit", "none")
    return not own and Path(model.path).suffix != ".gguf"


def _has_nvidia_gpu() -> bool:
    """By the driver's device, so that no library need be loaded."""
    return Path("/dev/nvidia0").exists()
