"""LoRA adapters as peft saves them, for OpenVINO GenAI.

GenAI puts an adapter's matrices beside each MatMul whose name contains theirs, scales all of them alike, and
leaves out, with no more than a warning, whatever it finds no place for. So an adapter is fitted to the model's
graph before: each matrix gets the name of its MatMul, the scale of its module is multiplied into it, and what
has no place, or is no plain LoRA, is refused by name. What GenAI then says is read, too (see `unused`).
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastchat_grpc.backends.openvino.graph import Place
from fastchat_grpc.errors import ModelLoadError
from fastchat_grpc.models.resolve import read_json, resolve

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
_WHOLE = re.compile(r"\.(embed_tokens|lm_head|wte|base_layer)\.weight$")
_OTHER_KINDS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings of peft that make of an adapter more than one product of two matrices beside a linear layer."""
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the model's own weights as they are."""
_NOWHERE = "fastchat_grpc_nowhere"
_UNUSED = re.compile(rf"Unused LoRA tensor: {re.escape(_PREFIX)}(\S+)")
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """An adapter's file of weights, and what decides how strongly they count."""

    name: str
    file: str
    alpha: float
    alphas: Mapping[str, float]
    """Of modules whose path ends in a match of the pattern, instead of `alpha`."""
    rslora: bool

    def scale(self, module: str, rank: int) -> float:
        """What the product of a module's matrices is multiplied by, as in peft (and arXiv:2312.03732 for rslora)."""
        matches = (alpha for ends, alpha in self.alphas.items() if re.match(rf"(.*\.)?({ends})$", module))
        return next(matches, self.alpha) / (rank**0.5 if self.rslora else rank)


def find(name: str, path: str) -> LoraFile:
    """The adapter in a folder, or of a hub id. Raises ModelLoadError, also for what is no plain LoRA."""
    folder = resolve(path)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ModelLoadError(f"LoRA adapter {name}: no {WEIGHTS_FILE} in {folder}")
    stated = read_json(folder / "adapter_config.json")
    if problem := _unlike_lora(stated):
        raise ModelLoadError(f"LoRA adapter {name}: the openvino backend cannot apply {problem}")
    return LoraFile(
        name=name,
        file=str(file),
        alpha=float(stated.get("lora_alpha", 8)),
        alphas={str(ends): float(alpha) for ends, alpha in (stated.get("alpha_pattern") or {}).items()},
        rslora=bool(stated.get("use_rslora")),
    )


def _unlike_lora(stated: Mapping[str, Any]) -> str | None:
    """The setting by which an adapter is something other than plain LoRA."""
    kind = stated.get("peft_type", "LORA")
    if kind != "LORA":
        return f"peft_type {kind}"
    if stated.get("bias", "none") != "none":
        return f"bias {stated['bias']}"
    if stated.get("init_lora_weights") not in _PLAIN_STARTS:
        return f"init_lora_weights {stated['init_lora_weights']}, which changes the model's weights; convert it to LoRA"
    return next((setting for setting in _OTHER_KINDS if stated.get(setting)), None)


def fit(lora: LoraFile, model: Mapping[str, Place]) -> Any:
    """The adapter as GenAI applies it, wholly, with a scale of 1: an openvino.Tensor that holds a safetensors file.

    Raises ValueError, which names the modules that do not fit.
    """
    import numpy as np
    import openvino
    from safetensors.numpy import save

    matrices = _matrices(lora)
    if missing := [module for module in matrices if module not in model]:
        raise ValueError(f"LoRA adapter {lora.name}: the model has no linear layers {_some(missing)}")
    # One that fits nowhere, so that it can be seen that GenAI still tells.
    tensors = dict.fromkeys(_tensor_names(_NOWHERE), np.zeros((1, 1), np.float32))
    for module, (a, b) in matrices.items():
        place = model[module]
        if (len(b), len(a), a.shape[1]) != (place.outputs, b.shape[1], place.inputs):
            shapes = f"{a.shape[1]} to {len(a)} and {b.shape[1]} to {len(b)}"
            raise ValueError(
                f"LoRA adapter {lora.name}: {module} goes from {place.inputs} to {place.outputs}, not {shapes}"
            )
        name_a, name_b = _tensor_names(place.node)
        tensors |= {name_a: a, name_b: b * np.float32(lora.scale(module, len(a)))}
    return openvino.Tensor(np.frombuffer(save(tensors), np.int8), shared_memory=False)


def _tensor_names(node: str) -> tuple[str, str]:
    return f"{_PREFIX}{node}.lora_A.weight", f"{_PREFIX}{node}.lora_B.weight"


def _matrices(lora: LoraFile) -> dict[str, tuple[Any, Any]]:
    """A [rank, inputs] and B [outputs, rank] of each module, in float32. Raises ValueError."""
    from safetensors import SafetensorError, deserialize

    try:
        tensors = deserialize(Path(lora.file).read_bytes())  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"LoRA adapter {lora.name}: {lora.file} cannot be read: {error}") from error
    pairs: dict[str, dict[str, Any]] = {}
    strange = []
    for name, tensor in tensors:
        match = _TENSOR.fullmatch(name)
        if match is None or len(tensor["shape"]) != 2 or tensor["dtype"] not in ("F32", "F16", "BF16"):
            strange.append(name)
        else:
            pairs.setdefault(match["module"], {})[match["matrix"]] = _float32(tensor)
    strange += [module for module, pair in pairs.items() if len(pair) != 2]
    if strange:
        hint = "; peft leaves whole layers out with save_embedding_layers=False" if _WHOLE.search(strange[0]) else ""
        raise ValueError(f"LoRA adapter {lora.name}: the openvino backend cannot apply {_some(strange)}{hint}")
    if not pairs:
        raise ValueError(f"LoRA adapter {lora.name}: {lora.file} holds no weights")
    return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}


def _float32(tensor: Mapping[str, Any]) -> Any:
    import numpy as np

    if tensor["dtype"] == "BF16":
        values = (np.frombuffer(tensor["data"], "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(tensor["data"], {"F32": "<f4", "F16": "<f2"}[tensor["dtype"]]).astype(np.float32)
    return values.reshape(tensor["shape"])


@contextmanager
def wholly_applied(name: str) -> Iterator[None]:
    """Raises ValueError unless the adapter of `fit` that is loaded meanwhile is applied, but for what fits nowhere.

    GenAI tells so on standard error, which is kept from the terminal until then.
    """
    with tempfile.TemporaryFile() as kept:
        own = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(own, 2)
            os.close(own)
            kept.seek(0)
            said = kept.read().decode(errors="replace")
            sys.stderr.write("".join(line for line in said.splitlines(keepends=True) if "LoRA" not in line))
    left_out = unused(said)
    if _NOWHERE not in left_out:
        raise ValueError(f"LoRA adapter {name}: OpenVINO GenAI does not tell whether it was applied")
    if len(left_out) > 1:
        raise ValueError(f"LoRA adapter {name}: OpenVINO GenAI leaves out {_some(left_out - {_NOWHERE})}")


def unused(said: str) -> set[str]:
    """Nodes whose matrices GenAI left out, by what it wrote to standard error."""
    return set(_UNUSED.findall(said))


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
