"""LoRA adapters of one base model, chosen by name for each pass.

All adapters live in one peft.PeftModel. A pass runs with one of them, or with none: an engine that
batches requests of several adapters runs one pass for each. (Cached keys and values depend on the
adapter as well: share prefixes within one adapter only.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastchat_grpc.errors import InvalidArgument, ModelLoadError


class LoraAdapters:
    """The adapters of a loaded model. Owned by the thread that runs the model."""

    def __init__(
        self, names: tuple[str, ...] = (), layers: tuple[Any, ...] = (), replaced: tuple[Any, ...] = ()
    ) -> None:
        self.names = names
        self._layers = layers
        self._replaced = replaced
        """Parts of the model that adapters bring whole (`modules_to_save`), such as an output layer."""
        self._active: str | None = None

    def check(self, name: str) -> None:
        """Raise InvalidArgument unless `name` is an adapter, or empty for the base model."""
        if name and name not in self.names:
            known = ", ".join(self.names) or "none"
            raise InvalidArgument("lora_adapter", f"the model has no adapter {name!r}; its adapters: {known}")

    def activate(self, name: str) -> None:
        """Let the next passes use adapter `name`, or the base model alone where it is empty. Cheap when unchanged."""
        if name == self._active:
            return
        for layer in self._layers:
            if name:
                layer.set_adapter(name)
            layer.enable_adapters(bool(name))
        for part in self._replaced:
            own = name in part._adapters
            if own:
                part.set_adapter(name)
            part.enable_adapters(own)
        for layer in (*self._layers, *self._replaced):
            layer.requires_grad_(False)
        self._active = name


def load_adapters(model: Any, folders: Mapping[str, Path]) -> tuple[Any, LoraAdapters]:
    """Wrap `model` with the adapters in `folders`, by name. Raises ModelLoadError."""
    if not folders:
        return model, LoraAdapters()
    try:
        from peft import PeftConfig, PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError as error:
        raise ModelLoadError("LoRA adapters need the package peft; install fastchat-grpc[transformers]") from error
    for name, folder in folders.items():
        try:
            _check(PeftConfig.from_pretrained(str(folder)))
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        except Exception as error:  # peft raises what torch, safetensors and transformers raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ModelLoadError(f"LoRA adapter {name} in {folder} cannot be loaded: {reason}") from error
    model.eval()
    layers = tuple(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    replaced = tuple(module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))
    adapters = LoraAdapters(tuple(folders), layers, replaced)
    adapters.activate("")
    return model, adapters


def _check(config: Any) -> None:
    """Raise ValueError for an adapter that would change nothing here, or other requests than its own."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise ValueError(f"it is of the kind {kind}, and LORA is served")
    if config.bias != "none":
        raise ValueError(f"it changes biases of the base model (bias={config.bias}), which others use: merge it")
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError("it is activated by tokens of the prompt (aLoRA), which is not supported")
