"""OpenVINO GenAI: the continuous batching pipeline for Intel and AMD CPUs (and Intel GPUs). Needs no torch.

Tokens in, tokens out; text, stops and usage are the shared code's. The engine runs in a process of its
own (see `process.py`). What it cannot do is declared in `capabilities`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from fastchat_grpc.backends import driver
from fastchat_grpc.backends.base import BackendLoad
from fastchat_grpc.backends.capabilities import GRAMMARS, TRAITS, Feature, Traits
from fastchat_grpc.backends.openvino import lora, model
from fastchat_grpc.backends.openvino.engine import EngineRequest, OpenVinoEngine
from fastchat_grpc.backends.openvino.lora import LoraFile
from fastchat_grpc.backends.openvino.messages import Load
from fastchat_grpc.backends.openvino.model import OpenVinoModel
from fastchat_grpc.backends.served import (
    Served,
    ServedBackend,
    refuse_settings,
    switch,
    whole_number,
)
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import EmbedRequest, EmbedResult, Event, GenerateRequest, ModelInfo
from fastchat_grpc.errors import ConfigError, NotSupported
from fastchat_grpc.models.facts import DEFAULT_CONTEXT_LENGTH, chat_template_text, limited_context
from fastchat_grpc.models.generation_config import default_sampling, generation_config
from fastchat_grpc.models.machine import total_memory
from fastchat_grpc.models.tokenizer import load_tokenizer
from fastchat_grpc.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_MAX_RUNNING = 64
OPTIONS = frozenset({"weights", "export_python", "cache_gb", "prefix_cache", "threads", "device", "properties"})
_HINTS = {
    "--max-gpu-memory": "set --backend-option cache_gb instead",
    "--cpu-offloading": "it runs on the CPU anyway",
    "--gpus": "name a device such as GPU.0 with --backend-option device",
    "--num-gpus": "it runs on one device",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The backend's own options."""

    device: str = "CPU"
    """OpenVINO's name of the device: CPU, GPU, GPU.1, AUTO."""
    cache_gb: int = 0
    """Size of the KV cache of the model, and of each adapter. 0: together a quarter of the memory; at most 16."""
    prefix_cache: bool = True
    """Keep the keys and values of prompts for requests that begin alike."""
    threads: int | None = None
    """Threads of the CPU device; None: one per physical core."""
    properties: Mapping[str, Any] = field(default_factory=dict)
    """Further OpenVINO properties, such as {"KV_CACHE_PRECISION": "f16"}."""

    @classmethod
    def parse(cls, config: BackendConfig) -> Options:
        """The options of `--backend-option`. Raises ConfigError."""
        config.refuse_unknown_options(OPTIONS)
        given = config.options
        return cls(
            device=given.get("device", "CPU").upper(),
            cache_gb=whole_number(config, "cache_gb", 0),
            prefix_cache=switch(config, "prefix_cache", True),
            threads=whole_number(config, "threads", None),
            properties=_json_object(given.get("properties", "{}")),
        )


def create(config: BackendConfig) -> OpenVinoBackend:
    """Make an OpenVINO backend. Raises ConfigError; ModuleNotFoundError where OpenVINO GenAI is not installed."""
    options = Options.parse(config)
    refuse_settings(config, _HINTS)
    model.wanted_weights(config)
    if config.model.device not in ("auto", "cpu", "xpu"):
        raise ConfigError(f"--device must be auto, cpu or xpu for the openvino backend, got {config.model.device}")
    if config.model.device == "xpu" and options.device == "CPU":
        options = replace(options, device="GPU")
    if importlib.util.find_spec("openvino_genai") is None:
        raise ModuleNotFoundError("No module named 'openvino_genai'", name="openvino_genai")
    return OpenVinoBackend(config, options)


class OpenVinoBackend(ServedBackend):
    """See the module's documentation."""

    def __init__(self, config: BackendConfig, options: Options) -> None:
        super().__init__(config)
        self._options = options
        self._seeds = driver.Seeds(config.model.seed)
        self._engine: OpenVinoEngine | None = None

    async def start(self) -> Sequence[ModelInfo]:
        """Find or export the model, load it, and return what is served. Raises ModelLoadError or ConfigError."""
        load, served = await asyncio.to_thread(self._prepare)
        self._engine = OpenVinoEngine(load, served.tokenizer)
        await self._engine.start()
        self._served_model = served = replace(served, precision=self._engine.precision)
        return served.infos()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """See Backend."""
        arrival = monotonic()
        served, engine = self._served, self._running
        adapter = served.adapter(request)
        job = await self._job(request, arrival)
        running = EngineRequest(engine, adapter or "", self._seeds.request_seed(request))
        async with aclosing(driver.drive(job, running)) as events:
            async for event in events:
                yield event

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Raises NotSupported: the pipeline gives no hidden states."""
        raise NotSupported("the openvino backend makes no embeddings; serve an embedding model with transformers")

    def load(self) -> BackendLoad:
        """See Backend."""
        engine = self._engine
        return BackendLoad(
            max_running=self._config.model.max_running or DEFAULT_MAX_RUNNING,
            kv_cache_usage=engine.cache_usage if engine is not None else 0.0,
            processed_tokens=engine.processed_tokens if engine is not None else 0,
        )

    async def close(self) -> None:
        """See Backend."""
        engine, self._engine, self._served_model = self._engine, None, None
        if engine is not None:
            await engine.close()

    @property
    def _running(self) -> OpenVinoEngine:
        assert self._engine is not None
        return self._engine

    def _prepare(self) -> tuple[Load, Served]:
        """Files, tokenizer, context length and adapters. Blocks; may export."""
        settings = self._config.model
        adapters = tuple(lora.find(name, path) for name, path in settings.lora_adapters.items())
        found = model.find(self._config)
        if found.folder.is_file():
            own = found.context_length
            tokenizer: Tokenizer = load_tokenizer(
                found.folder, chat_template=chat_template_text(settings.chat_template)
            )
        else:
            told = model.folder_facts(found, settings)
            own, tokenizer = told.context_length, told.tokenizer(settings)
        traits = self._traits(found)
        served = Served(
            backend="openvino",
            names=settings.served_names,
            tokenizer=tokenizer,
            context_length=limited_context(own or DEFAULT_CONTEXT_LENGTH, settings.context_length),
            capabilities=traits.capabilities(chat=bool(tokenizer.chat_template)),
            adapters={name: name for name in settings.lora_adapters},
            traits=traits,
            default_sampling=default_sampling(generation_config(found.folder)),
            quantization=found.quantization,
        )
        return self._load(found, adapters, tokenizer.vocabulary_size), served

    def _traits(self, found: OpenVinoModel) -> Traits:
        """What the backend declares, and what these options and this model change of it."""
        traits = TRAITS["openvino"]
        if not self._options.prefix_cache:
            traits = traits.with_features(Feature.PROMPT_LOGPROBS)
        if not found.grammars:
            reason = f"the model's folder has no {model.TOKENIZER_FILE}, which grammars need"
            traits = replace(traits, refuses={**dict.fromkeys(GRAMMARS.values(), reason), **traits.refuses})
        return traits

    def _load(self, found: OpenVinoModel, adapters: tuple[LoraFile, ...], vocabulary_size: int) -> Load:
        settings, options = self._config.model, self._options
        properties = dict(options.properties)
        if options.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = options.threads
        if settings.dtype == "float32":
            properties.setdefault("INFERENCE_PRECISION_HINT", "f32")
        return Load(
            model=str(found.model),
            vocabulary=str(found.vocabulary) if found.grammars else "",
            device=options.device,
            scheduler={
                "max_num_seqs": settings.max_running or DEFAULT_MAX_RUNNING,
                "cache_size": options.cache_gb or _default_cache_gb(pipelines=1 + len(adapters)),
                "enable_prefix_caching": options.prefix_cache,
            },
            properties=properties,
            adapters=adapters,
            vocabulary_size=vocabulary_size,
        )


def _default_cache_gb(pipelines: int) -> int:
    return max(1, min(16, int(total_memory() / 2**30 / 4 / pipelines)))


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"--backend-option properties must be a JSON object, got {text[:100]}")
    return value
