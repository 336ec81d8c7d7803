"""What the backends over foreign engines share: the model as served, its tokenizer, and the checks of requests.

Such an engine takes and gives token ids. Prompts become tokens here, by the same tokenizer code for all of
them, so counting, truncation, chat templates and refusals do not depend on the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

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
from fastchat_grpc.models.generation_config import default_sampling, generation_config
from fastchat_grpc.models.overrides import CHAT_TEMPLATES, override_for
from fastchat_grpc.models.resolve import read_json, resolve
from fastchat_grpc.text import prompt as prompts
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
    traits: Traits | None = None
    """Where it can do more or less, as configured, than its backend declares."""
    default_sampling: SamplingDefaults = NO_DEFAULTS
    """The model's own (`ModelFolder.default_sampling`), which workers put where a request leaves a field unset."""

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
        return await driver.prepare(self.tokenizer, request, self.context_length)

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
        truncate = truncate_default if request.truncate is None else request.truncate
        inputs = []
        for i, item in enumerate(request.inputs):
            token_ids = self.tokenizer.encode(item) if isinstance(item, str) else list(item)
            prompts.check_token_ids(f"inputs[{i}]", token_ids, self.tokenizer.vocabulary_size)
            if not token_ids:
                raise InvalidArgument(f"inputs[{i}]", "has no tokens")
            if len(token_ids) > self.context_length and not truncate:
                raise PromptTooLong(f"inputs[{i}]", len(token_ids), self.context_length)
            inputs.append(token_ids[: self.context_length])
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

    def _job(self, request: GenerateRequest, prompt_ids: Sequence[int], arrival: float) -> driver.Job:
        tokenizer = self._served.tokenizer
        return driver.Job(
            request,
            prompt_ids,
            tokenizer,
            context_length=self._served.context_length,
            stream_interval=self._config.stream_interval,
            arrival=arrival,
            reasoning=marks_of(self._config.model.reasoning_parser, tokenizer.chat_template),
        )

    async def _embed_inputs(self, request: EmbedRequest) -> list[list[int]]:
        size = sum(map(len, request.inputs))
        return await lanes.run(size, self._served.embed_inputs, request, self._config.model.embed_truncate)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """What the configuration files of a Hugging Face folder say, read without transformers or torch."""

    path: Path
    config: Mapping[str, Any]
    context_length: int | None
    """By the configuration; None where it says nothing."""

    @classmethod
    def find(cls, settings: ModelConfig, backend: str) -> ModelFolder:
        """Resolve the model path. Raises ModelLoadError, also for a GGUF file."""
        path = resolve(settings.path, settings.revision)
        if path.is_file():
            raise ModelLoadError(f"the {backend} backend reads model folders, not GGUF files: {path}")
        config = read_json(path / "config.json")
        return cls(path=path, config=config, context_length=stated_context(config.get("text_config") or config))

    def tokenizer(self, settings: ModelConfig, vocabulary_size: int | None = None) -> Tokenizer:
        """The folder's tokenizer, with its family's and the user's template and ends of output."""
        from fastchat_grpc.models.tokenizer import load_tokenizer

        override = override_for(str(self.config.get("model_type", "")), settings.path)
        return load_tokenizer(
            self.path,
            chat_template=chat_template_text(settings.chat_template),
            default_chat_template=override.chat_template,
            stop_tokens=override.stop_tokens,
            eos_token_ids=self._eos_token_ids(),
            vocabulary_size=vocabulary_size or self._stated_vocabulary_size(),
            trust_remote_code=settings.trust_remote_code,
        )

    def context(self, settings: ModelConfig) -> int:
        """The context length to serve: the model's, or less if asked. Raises ModelLoadError."""
        return limited_context(self.context_length or 2048, settings.context_length)

    @property
    def default_sampling(self) -> SamplingDefaults:
        """What the model's makers want where a request chooses nothing; give it to `Served`."""
        return default_sampling(generation_config(self.path))

    def _stated_vocabulary_size(self) -> int | None:
        size = (self.config.get("text_config") or self.config).get("vocab_size")
        return int(size) if size else None

    def _eos_token_ids(self) -> tuple[int, ...]:
        stated = generation_config(self.path).get("eos_token_id")
        if stated is None:
            stated = (self.config.get("text_config") or self.config).get("eos_token_id")
        if stated is None:
            return ()
        return tuple(stated) if isinstance(stated, list) else (int(stated),)


_STRETCHED = ("linear", "dynamic", "yarn")


def stated_context(config: Mapping[str, Any]) -> int | None:
    """The context length by a model's configuration, as far as its scaling of positions stretches it; else None."""
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    if not limit:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        return int(limit)  # one scaling per kind of layer: the configuration's own number counts
    if (rope.get("rope_type") or rope.get("type")) not in _STRETCHED:
        return int(limit)
    original = int(rope.get("original_max_position_embeddings") or limit)
    return max(int(limit), int(original * float(rope.get("factor") or 1)))


def limited_context(own: int, wanted: int | None) -> int:
    """The model's own context length, shortened if asked. Raises ModelLoadError where more is asked than it has."""
    if wanted is not None and wanted > own:
        raise ModelLoadError(f"--context-length {wanted} exceeds the model's {own}")
    return wanted or own


def chat_template_text(wanted: str | None) -> str | None:
    """The template that the user set by --conv-template: Jinja text, a known name, or a file. Raises ModelLoadError."""
    if wanted is None or "{{" in wanted or "{%" in wanted:
        return wanted
    if wanted in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[wanted]
    try:
        return Path(wanted).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        known = ", ".join(CHAT_TEMPLATES)
        raise ModelLoadError(
            f"--conv-template {wanted} is no Jinja text, no readable file, and none of {known}"
        ) from error


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


def whole_number(config: BackendConfig, option: str, default: int, low: int = 1) -> int:
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
