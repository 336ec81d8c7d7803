"""Several models in one worker process, which share its concurrency limit.

`--backend multi --model-path models.toml`, where the file lists the models:

    [[models]]
    path = "smollm2-135m-instruct"
    backend = "openvino"            # default: auto
    names = ["small"]
    options = { weights = "int8" }  # the backend's own

    [[models]]
    path = "/models/qwen"
    lora_adapters = { support = "/adapters/support" }

Every field of `config.ModelConfig` may be set; what is not set is as the command line says. A request goes
to the backend that has its model. The worker admits as many requests in all as the largest of the backends
batches (or as --limit-worker-concurrency says), whichever models they ask for.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastchat_grpc.backends import registry
from fastchat_grpc.backends.base import Backend, BackendLoad
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import EmbedRequest, EmbedResult, Event, GenerateRequest, ModelInfo, Prompt
from fastchat_grpc.errors import ConfigError, ModelNotFound

logger = logging.getLogger(__name__)

_MODEL_FIELDS: Mapping[str, type | tuple[type, type]] = {
    "path": str,
    "names": (list, str),
    "revision": str,
    "device": str,
    "dtype": str,
    "gpus": (list, int),
    "num_gpus": int,
    "max_gpu_memory": str,
    "load_8bit": bool,
    "quantization": str,
    "cpu_offloading": bool,
    "lora_adapters": (dict, str),
    "context_length": int,
    "chat_template": str,
    "reasoning_parser": str,
    "trust_remote_code": bool,
    "embed_truncate": bool,
    "max_running": int,
    "seed": int,
}
"""Type of each field of ModelConfig; (list, item) and (dict, value) for collections."""
_OWN_FIELDS: Mapping[str, type | tuple[type, type]] = {"backend": str, "options": (dict, str), "stream_interval": int}


def create(config: BackendConfig) -> MultiBackend:
    """Make every backend that the file lists. Raises ConfigError."""
    config.refuse_unknown_options(frozenset())
    parts = read_models(config)
    return MultiBackend(config, [registry.create(part) for part in parts], parts)


def read_models(config: BackendConfig) -> list[BackendConfig]:
    """The configurations in the file that `config.model.path` names. Raises ConfigError."""
    file = Path(config.model.path).expanduser()
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"backend multi reads a list of models: {file} ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not a TOML file: {error}") from error
    entries = content.get("models")
    if not isinstance(entries, list) or not entries or set(content) != {"models"}:
        raise ConfigError(f"{file} must hold [[models]] tables, and nothing else")
    return [_read_model(entry, f"{file}: models[{i}]", config) for i, entry in enumerate(entries)]


def _read_model(entry: object, where: str, config: BackendConfig) -> BackendConfig:
    if not isinstance(entry, dict) or "path" not in entry:
        raise ConfigError(f"{where} needs a path")
    known = {**_MODEL_FIELDS, **_OWN_FIELDS}
    for key, value in entry.items():
        if key not in known:
            raise ConfigError(f"{where} has no field {key!r}; known: {', '.join(known)}")
        if not _has_type(value, known[key]):
            raise ConfigError(f"{where}.{key} must be {_type_name(known[key])}, got {value!r}")
    name = entry.get("backend", registry.AUTO)
    if name == "multi":
        raise ConfigError(f"{where}.backend: multi cannot hold another multi")
    fields: dict[str, Any] = {"names": (), "lora_adapters": {}}
    fields |= {key: tuple(v) if isinstance(v, list) else v for key, v in entry.items() if key in _MODEL_FIELDS}
    return replace(
        config,
        name=name,
        model=replace(config.model, **fields),
        options=entry.get("options", {}),
        stream_interval=entry.get("stream_interval", config.stream_interval),
    )


def _has_type(value: object, kind: type | tuple[type, type]) -> bool:
    if isinstance(kind, tuple):
        collection, item = kind
        if not isinstance(value, collection):
            return False
        return all(_has_type(member, item) for member in (value.values() if isinstance(value, dict) else value))  # type: ignore[attr-defined]
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def _type_name(kind: type | tuple[type, type]) -> str:
    if isinstance(kind, tuple):
        collection, item = kind
        return ("a list of " if collection is list else "a table of ") + _ITEM_NAMES[item]
    return _NAMES[kind]


_NAMES: Mapping[type, str] = {str: "a string", int: "a whole number", bool: "true or false"}
_ITEM_NAMES: Mapping[type, str] = {str: "strings", int: "whole numbers"}


class MultiBackend:
    """See the module's documentation."""

    def __init__(self, config: BackendConfig, parts: Sequence[Backend], configs: Sequence[BackendConfig]) -> None:
        self._config = config
        self._configs = configs
        self._parts = parts
        self._owners: dict[str, Backend] = {}

    async def start(self) -> Sequence[ModelInfo]:
        """Start the backends one after another, which bounds the memory that loading takes. Raises ModelLoadError."""
        found: list[ModelInfo] = []
        for part, config in zip(self._parts, self._configs, strict=True):
            for info in await registry.start(part, config):
                if info.name in self._owners:
                    raise ConfigError(f"two models are named {info.name}; set names in {self._config.model.path}")
                self._owners[info.name] = part
                found.append(info)
        return found

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """See Backend."""
        async with aclosing(self._owner(request.model).generate(request)) as events:
            async for event in events:
                yield event

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """See Backend."""
        return await self._owner(request.model).embed(request)

    async def tokenize(self, model: str, prompt: Prompt) -> Sequence[int]:
        """See Backend."""
        return await self._owner(model).tokenize(model, prompt)

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """See Backend."""
        return await self._owner(model).detokenize(model, token_ids)

    def chat_template(self, model: str) -> str:
        """See Backend."""
        return self._owner(model).chat_template(model)

    def load(self) -> BackendLoad:
        """The budget that all share, the fullest cache, and the tokens of all."""
        loads = [part.load() for part in self._parts]
        usages = [load.kv_cache_usage for load in loads if load.kv_cache_usage is not None]
        firsts = map(self._first, self._parts)
        return BackendLoad(
            max_running=self._config.model.max_running or max(load.max_running for load in loads),
            kv_cache_usage=max(usages, default=None),
            kv_free_tokens=min(load.kv_free_tokens for load in loads),
            processed_tokens=sum(load.processed_tokens for load in loads),
            parts=tuple((name, load) for names, load in zip(firsts, loads, strict=True) for name in names),
        )

    async def close(self) -> None:
        """See Backend. Closes every part, also after one has failed to close."""
        self._owners.clear()
        failures: list[Exception] = []
        for part in reversed(self._parts):
            try:
                await part.close()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _first(self, part: Backend) -> list[str]:
        """The first model of a part; none before it has started."""
        return [name for name, owner in self._owners.items() if owner is part][:1]

    def _owner(self, model: str) -> Backend:
        owner = self._owners.get(model)
        if owner is None:
            raise ModelNotFound(f"model {model[:128]!r} is not served here; served: {', '.join(self._owners)}")
        return owner
