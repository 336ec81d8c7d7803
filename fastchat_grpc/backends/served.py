"""What the backends over token engines share: the model as served, its tokenizer, and the checks of requests.

Such an engine takes and gives token ids. Prompts become tokens here, by the same tokenizer code for all of
them, so counting, truncation, chat templates and refusals do not depend on the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from fastchat_grpc.backends import driver, lanes
from fastchat_grpc.backends.capabilities import (
    TRAITS,
    Traits,
    adapter_not_found,
    refuse_unsupported,
    supported_defaults,
)
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import (
    NO_DEFAULTS,
    Capability,
    ChatPrompt,
    EmbedRequest,
    GenerateRequest,
    ModelInfo,
    Prompt,
    SamplingDefaults,
)
from fastchat_grpc.errors import (
    ConfigError,
    InvalidArgument,
    ModelLoadError,
    NotSupported,
    PromptTooLong,
    WorkerUnavailable,
)
from fastchat_grpc.models.facts import ModelFacts, read_facts
from fastchat_grpc.models.resolve import resolve
from fastchat_grpc.text import prompt as prompts
from fastchat_grpc.text.job import Job
from fastchat_grpc.text.reasoning import marks_of
from fastchat_grpc.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A loaded model and how it is offered."""

    backend: str
    names: tuple[str, ...]
    tokenizer: Tokenizer
    context_length: int
    capabilities: frozenset[Capability]
    adapters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """LoRA adapters by name, each as its engine wants it."""
    embedding_size: int = 0
    embed_length: int | None = None
    """Most tokens of an input to embed; None: the context length."""
    output_apart: bool = False
    """The output has a context of its own, as in an encoder-decoder."""
    traits: Traits | None = None
    """Where it can do more or less, as configured, than its backend declares."""
    default_sampling: SamplingDefaults = NO_DEFAULTS
    """The model's own (`ModelFacts.default_sampling`), which workers put where a request leaves a field unset."""
    quantization: str = ""
    """Number format of the weights as the engine has loaded them; empty: as it is told to, and no other."""
    precision: str = ""
    """Number format of the arithmetic, as far as the weights' does not tell it."""

    def infos(self) -> tuple[ModelInfo, ...]:
        """The model under each of its names, and each adapter as a model of its own."""
        bases = [(name, "") for name in self.names]
        adapters = [(name, self.names[0]) for name in self.adapters]
        return tuple(
            ModelInfo(
                name=name,
                base_model=base,
                context_length=self.context_length,
                capabilities=self.capabilities,
                backend=self.backend,
                embedding_size=self.embedding_size if Capability.EMBED in self.capabilities else 0,
                vocabulary_size=self.tokenizer.vocabulary_size,
                default_sampling=supported_defaults(self.default_sampling, self.traits or TRAITS[self.backend]),
                quantization=self.quantization,
                precision=self.precision,
            )
            for name, base in (*bases, *adapters)
        )

    async def prepare(self, request: GenerateRequest) -> list[int]:
        """Token ids of the prompt, after every check that needs no engine."""
        refuse_unsupported(request, self.traits or TRAITS[self.backend])
        if Capability.GENERATE not in self.capabilities:
            raise NotSupported(f"model {self.names[0]} makes embeddings only")
        if isinstance(request.prompt, ChatPrompt) and not self.tokenizer.chat_template:
            raise InvalidArgument("chat", "the model has no chat template; send a prompt, or set --conv-template")
        return await driver.prepare(self.tokenizer, request, self.context_length, output_apart=self.output_apart)

    def adapter(self, request: GenerateRequest) -> Any:
        """The adapter that a request asks for, by its field or as a model; None for the base. AdapterNotFound."""
        if request.lora_adapter:
            if request.lora_adapter not in self.adapters:
                raise adapter_not_found(request.lora_adapter, self.adapters)
            return self.adapters[request.lora_adapter]
        return self.adapters.get(request.model)

    def embed_inputs(self, request: EmbedRequest, truncate_default: bool) -> list[list[int]]:
        """Token ids of each input. Raises NotSupported, InvalidArgument or PromptTooLong."""
        if Capability.EMBED not in self.capabilities:
            raise NotSupported(f"model {request.model or self.names[0]} has no embeddings here")
        limit = self.embed_length or self.context_length
        truncate = truncate_default if request.truncate is None else request.truncate
        inputs = []
        for i, item in enumerate(request.inputs):
            token_ids = self.tokenizer.encode(item) if isinstance(item, str) else list(item)
            prompts.check_token_ids(f"inputs[{i}]", token_ids, self.tokenizer.vocabulary_size)
            if not token_ids:
                raise InvalidArgument(f"inputs[{i}]", "has no tokens")
            if len(token_ids) > limit and not truncate:
                raise PromptTooLong(f"inputs[{i}]", len(token_ids), limit)
            inputs.append(token_ids[:limit])
        return inputs


class ServedBackend:
    """The part of `Backend` that is the same over every such engine. Set `_served` once the model is loaded."""

    def __init__(self, config: BackendConfig) -> None:
        self._config = config
        self._served_model: Served | None = None

    @property
    def _served(self) -> Served:
        if self._served_model is None:
            raise WorkerUnavailable("the model is not loaded, or was unloaded")
        return self._served_model

    async def tokenize(self, model: str, prompt: Prompt) -> Sequence[int]:
        """Token ids of a prompt exactly as `generate` would see it."""
        return await driver.tokenize(self._served.tokenizer, prompt)

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return await driver.detokenize(self._served.tokenizer, token_ids)

    def chat_template(self, model: str) -> str:
        """The model's chat template (Jinja), or an empty string."""
        return self._served.tokenizer.chat_template

    async def _job(self, request: GenerateRequest, arrival: float) -> Job:
        """The request with its prompt as tokens, after every check that needs no engine."""
        served = self._served
        prompt_ids = await served.prepare(request)
        make = partial(
            Job,
            request,
            prompt_ids,
            served.tokenizer,
            context_length=served.context_length,
            stream_interval=self._config.stream_interval,
            arrival=arrival,
            reasoning=marks_of(self._config.model.reasoning_parser, served.tokenizer.chat_template),
            output_apart=served.output_apart,
        )
        replayed = sum(len(choice.output_token_ids) for choice in request.resume or ())
        return await lanes.run(replayed * lanes.CHARACTERS_PER_TOKEN, make)

    async def _embed_inputs(self, request: EmbedRequest) -> list[list[int]]:
        size = sum(map(len, request.inputs))
        return await lanes.run(size, self._served.embed_inputs, request, self._config.model.embed_truncate)


def find_model(settings: ModelConfig, backend: str) -> ModelFacts:
    """What the model folder says that the settings name, fetched first if need be.

    Raises:
        ModelLoadError: there is none, or it is a GGUF file.
    """
    path = resolve(settings.path, settings.revision)
    if path.is_file():
        raise ModelLoadError(f"the {backend} backend reads model folders, not GGUF files: {path}")
    return read_facts(path, settings)


def refuse_settings(config: BackendConfig, hints: Mapping[str, str]) -> None:
    """Raise ConfigError for a model setting that this backend cannot honour; `hints` maps flags to what to do."""
    model = config.model
    given = {
        "--max-gpu-memory": model.max_gpu_memory is not None,
        "--load-8bit": model.load_8bit,
        "--quantization": model.quantization is not None,
        "--cpu-offloading": model.cpu_offloading,
        "--lora": bool(model.lora_adapters),
        "--dtype": model.dtype != "auto",
        "--num-gpus": model.num_gpus > 1,
        "--gpus": bool(model.gpus),
        "--device": model.device != "auto",
        "--trust-remote-code": model.trust_remote_code,
        "--reasoning-parser": model.reasoning_parser != "auto",
    }
    for flag, hint in hints.items():
        if given[flag]:
            raise ConfigError(f"{flag} is not supported by the {config.name} backend: {hint}")


D = TypeVar("D", int, None)


def whole_number(config: BackendConfig, option: str, default: D, low: int = 1) -> int | D:
    """An option that is a whole number. Raises ConfigError."""
    text = config.options.get(option)
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise ConfigError(f"--backend-option {option} must be a whole number of at least {low}, got {text}")
    return value


def switch(config: BackendConfig, option: str, default: bool) -> bool:
    """An option that is on or off. Raises ConfigError."""
    text = config.options.get(option)
    if text is None:
        return default
    if text not in ("on", "off"):
        raise ConfigError(f"--backend-option {option} must be on or off, got {text}")
    return text == "on"
