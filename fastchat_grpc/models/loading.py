"""Loading of any Hugging Face model for the engine: detection, device, dtype, weights, adapters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastchat_grpc.config import ModelConfig
from fastchat_grpc.core import NO_DEFAULTS, Capability, SamplingDefaults
from fastchat_grpc.errors import ModelLoadError
from fastchat_grpc.models.adapters import LoraAdapters, load_adapters
from fastchat_grpc.models.detect import Detected, ModelKind, Pooling, detect, first_line
from fastchat_grpc.models.devices import (
    Placement,
    check_memory,
    choose_dtype,
    place,
    placement_arguments,
)
from fastchat_grpc.models.progress import loading_bars
from fastchat_grpc.models.quantization_plan import (
    FASTEST,
    INT8,
    NONE,
    QuantizationPlan,
    compile_meanwhile,
    fast_instructions,
    plan_quantization,
)
from fastchat_grpc.models.resolve import read_json, resolve
from fastchat_grpc.models.tokenizer import HuggingFaceTokenizer

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run, and what an engine must know of it. The engine's thread owns `model`."""

    model: Any
    """transformers.PreTrainedModel, or the peft.PeftModel around it; in eval mode, without gradients."""
    tokenizer: HuggingFaceTokenizer
    kind: ModelKind
    context_length: int
    """Tokens of prompt and output together (of either, in an encoder-decoder)."""
    vocabulary_size: int
    """Columns of the logits; rows of the embedding."""
    hidden_size: int
    device: torch.device
    """Where inputs go."""
    dtype: torch.dtype
    """Of activations, and so of the KV cache."""
    adapters: LoraAdapters
    pooling: Pooling = Pooling.MEAN
    """How embeddings are made of the last hidden states."""
    quantization: str = ""
    """How weights are stored, such as "int8"; empty: as `dtype`."""
    default_sampling: SamplingDefaults = NO_DEFAULTS

    @property
    def base(self) -> Any:
        """The model without the wrapper of its adapters."""
        return self.model.get_base_model() if self.adapters.names else self.model

    @property
    def precision(self) -> str:
        """Number format of the arithmetic; with our 8-bit kernels, which differ by processor, also what they make of
        weights."""
        native = None
        if self.quantization == INT8:
            from fastchat_grpc.native.kernels import kernels

            native = kernels()
        return _name(self.dtype) + (f", weights of {native.weight_bits} bits" if native is not None else "")

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the model can do, with any engine that runs it fully."""
        if self.kind is ModelKind.EMBEDDING:
            return frozenset({Capability.EMBED})
        can = {Capability.GENERATE, Capability.EMBED}
        if self.tokenizer.chat_template:
            can.add(Capability.CHAT)
        return frozenset(can)


def load_model(settings: ModelConfig) -> LoadedModel:
    """Load the model that `settings` name, with its tokenizer and adapters.

    Raises:
        ModelLoadError: the model is missing, broken, too large, or not supported on this machine.
    """
    if settings.quantization == FASTEST:
        compile_meanwhile()
    source = resolve(settings.path, settings.revision)
    adapter_folders = _adapter_folders(source, settings)
    found = detect(source, settings)
    placement = place(settings)
    if settings.quantization == FASTEST and found.kind is not ModelKind.DECODER:
        settings = replace(settings, quantization=None)
    quantization = plan_quantization(settings, found.config, placement.device)
    if quantization.method == INT8 and settings.dtype == "auto":
        settings = replace(settings, dtype="float32")
    dtype = choose_dtype(settings.dtype, placement.device, found.stored_dtype, full=found.prefers_full_precision)
    if quantization.method == INT8 and str(dtype) != "torch.float32":
        raise ModelLoadError(f"8-bit weights on a CPU compute in float32; leave out --dtype {settings.dtype}")
    if not quantization.stored and not quantization.arguments:
        try:
            check_memory(source, placement, dtype, found.stored_dtype)
        except ModelLoadError as error:
            if not quantization.chosen:
                raise
            log.info("no memory to make 8-bit weights of this model (%s); it runs as it is", error)
            return load_model(replace(settings, quantization=None, dtype="auto"))
    tokenizer = found.facts.tokenizer(settings)
    context_length = found.facts.served_context(settings.context_length)

    def load_plain() -> tuple[Any, LoraAdapters]:
        model = _load_weights(source, found, placement, dtype, quantization, settings)
        return load_adapters(model, adapter_folders)

    from fastchat_grpc.models.cpu import Unsuitable, speed_up

    model, adapters = load_plain()
    if quantization.own_layers and placement.device.type == "cpu" and dtype.is_floating_point and dtype.itemsize == 4:
        try:
            speed_up(model, found.kind, int8=quantization.method == INT8, avoid=tokenizer.special_token_ids)
        except Unsuitable as error:
            if quantization.chosen:
                log.info("8-bit weights do not suit this model (%s); it runs as it is", error)
                return load_model(replace(settings, quantization=None, dtype="auto"))
            if quantization.method == INT8:
                raise ModelLoadError(
                    f"the model {source} cannot be run with 8-bit weights on the CPU: {error}"
                ) from error
            log.warning("this model runs with torch's own linear layers, as faster ones do not suit it (%s)", error)
            model, adapters = load_plain()
    if quantization.chosen:
        log.info(
            "8-bit weights: this processor (%s) computes with them about twice as fast as with float32; "
            "--quantization none keeps the model's own precision",
            fast_instructions(),
        )
    return _describe(model, tokenizer, adapters, found, context_length, placement, quantization)


def _adapter_folders(source: Path, settings: ModelConfig) -> dict[str, Path]:
    """The folder of each LoRA adapter."""
    folders = {name: resolve(path) for name, path in settings.lora_adapters.items()}
    for name, folder in folders.items():
        if not (folder / "adapter_config.json").is_file():
            raise ModelLoadError(f"LoRA adapter {name}: no adapter_config.json in {folder}")
    if (source / "adapter_config.json").is_file() and not (source / "config.json").is_file():
        base = read_json(source / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        raise ModelLoadError(f"{source} is a LoRA adapter: use --model-path {base} --lora NAME={source}")
    return folders


def _load_weights(
    source: Path,
    found: Detected,
    placement: Placement,
    dtype: torch.dtype,
    quantization: QuantizationPlan,
    settings: ModelConfig,
) -> Any:
    arguments: dict[str, Any] = {"dtype": dtype, "trust_remote_code": settings.trust_remote_code}
    arguments |= found.file_arguments | quantization.arguments | placement_arguments(placement)
    log.info("loading the weights of %s", source.name)
    try:
        with loading_bars():
            model, report = found.auto_class.from_pretrained(found.folder, output_loading_info=True, **arguments)
    except Exception as error:  # transformers raises anything from KeyError to ImportError for a bad checkpoint
        raise ModelLoadError(f"the model {source} cannot be loaded: {first_line(error)}") from error
    _refuse_missing(source, report)
    model.eval()
    model.requires_grad_(False)
    return model


def _refuse_missing(source: Path, report: Mapping[str, Any]) -> None:
    """transformers fills weights that a checkpoint lacks with random numbers; that is no model to serve."""
    # A pooler is not used here, and checkpoints of masked language models come without one.
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise ModelLoadError(f"the checkpoint {source} lacks {len(missing)} tensors of the model, such as {missing[0]}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(
    model: Any,
    tokenizer: HuggingFaceTokenizer,
    adapters: LoraAdapters,
    found: Detected,
    context_length: int,
    placement: Placement,
    quantization: QuantizationPlan,
) -> LoadedModel:
    base = model.get_base_model() if adapters.names else model
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        kind=found.kind,
        context_length=context_length,
        vocabulary_size=tokenizer.vocabulary_size,
        hidden_size=int(base.config.get_text_config().hidden_size),
        device=placement.device,
        dtype=base.dtype,
        adapters=adapters,
        pooling=found.pooling,
        quantization="" if quantization.method == NONE else quantization.method,
        default_sampling=found.facts.default_sampling,
    )
