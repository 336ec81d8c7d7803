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

    def __init__(self, names: tuple[str, ...] = (), layers: tuple[Any, ...] = ()) -> None:
        self.names = names
        self._layers = layers
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
        for layer in self._layers:
            layer.requires_grad_(False)
        self._active = name


def load_adapters(model: Any, folders: Mapping[str, Path]) -> tuple[Any, LoraAdapters]:
    """Wrap `model` with the adapters in `folders`, by name. Raises ModelLoadError."""
    if not folders:
        return model, LoraAdapters()
    try:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ModelLoadError("LoRA adapters need the package peft; install fastchat-grpc[transformers]") from error
    for name, folder in folders.items():
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        except Exception as error:  # peft raises what torch, safetensors and transformers raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ModelLoadError(f"LoRA adapter {name} in {folder} cannot be loaded: {reason}") from error
    model.eval()
    layers = tuple(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    adapters = LoraAdapters(tuple(folders), layers)
    adapters.activate("")
    return model, adapters
