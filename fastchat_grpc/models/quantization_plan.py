"""Which quantization a model is loaded with, and whether this machine can run it.

on loading      int8 (--load-8bit)     CPU: models/quantization.py; GPU: bitsandbytes
                bnb-8bit, bnb-4bit     bitsandbytes
                none                   nothing, not even the faster layers of models/cpu_linear.py
in the files    gptq, awq, compressed-tensors, bitsandbytes, fp8, ...: transformers reads the
                checkpoint's quantization_config; here its needs are checked, for a clear refusal
"""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastchat_grpc.config import ModelConfig
from fastchat_grpc.errors import ModelLoadError

if TYPE_CHECKING:
    import torch

INT8, BNB_8BIT, BNB_4BIT, NONE = "int8", "bnb-8bit", "bnb-4bit", "none"
FASTEST = "fastest"
"""8 bits where this processor computes with them faster than with float32, as measured; else as the model is."""
ON_LOADING = (INT8, BNB_8BIT, BNB_4BIT, NONE)

_PACKAGES = {
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "torchao": "torchao",
    "hqq": "hqq",
    "quanto": "optimum.quanto",
    "auto-round": "auto_round",
}
"""What transformers needs to read a checkpoint of each method."""
_GPU_ONLY = frozenset({"fp8", "fbgemm_fp8", "mxfp4", "eetq", "aqlm", "vptq", "spqr", "higgs", "fp_quant"})


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationPlan:
    """What to do about weights."""

    method: str = ""
    """How weights end up: empty (as they are), a name of ON_LOADING, or the checkpoint's method."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """For from_pretrained."""
    stored: bool = False
    """Whether the checkpoint itself is quantized."""
    chosen: bool = False
    """Whether it was chosen for speed (FASTEST), and is given up where it does not suit the model."""

    @property
    def own_layers(self) -> bool:
        """Whether the plain linear layers may be replaced by our own for the CPU."""
        return not self.stored and self.method in ("", INT8)


def plan_quantization(settings: ModelConfig, config: Any, device: torch.device) -> QuantizationPlan:
    """Decide how weights are quantized.

    Args:
        settings: what the user asks for.
        config: the model's configuration (transformers).
        device: where the model goes.

    Raises:
        ModelLoadError: the method is unknown, or cannot run here.
    """
    wanted = _wanted(settings)
    stored = _stored_method(config)
    if stored:
        if wanted not in (None, NONE, FASTEST, stored):
            raise ModelLoadError(f"the checkpoint is quantized already ({stored}); leave out --quantization {wanted}")
        _check_stored(stored, device)
        return QuantizationPlan(method=stored, stored=True)
    if wanted == FASTEST:
        suits = device.type == "cpu" and settings.dtype == "auto" and not settings.lora_adapters
        return QuantizationPlan(method=INT8, chosen=True) if suits and int8_is_fastest() else QuantizationPlan()
    if wanted is None:
        return QuantizationPlan()
    if wanted not in ON_LOADING:
        raise ModelLoadError(
            f"--quantization {wanted}: the checkpoint is not quantized so; choose one of {', '.join(ON_LOADING)}"
        )
    if wanted == INT8 and device.type != "cpu":
        wanted = BNB_8BIT
    if wanted in (BNB_8BIT, BNB_4BIT):
        return QuantizationPlan(method=wanted, arguments={"quantization_config": _bitsandbytes(wanted, device)})
    if wanted == INT8:
        _check_int8()
    return QuantizationPlan(method=wanted)


_compiling = threading.Lock()


def compile_meanwhile() -> None:
    """Begin to compile the kernels that `int8_is_fastest` asks for: a machine's first start need not wait for them
    after the model has been fetched and converted."""
    threading.Thread(target=int8_is_fastest, name="kernels", daemon=True).start()


def int8_is_fastest() -> bool:
    """Whether our kernels run 8-bit weights on this processor faster than float32.

    Measured: about twice as fast with AVX-512 VNNI and with AVX2, from 1 to 32 streams. The portable C of other
    processors is slower than float32. Without a C compiler there are no kernels.
    """
    if not fast_instructions():
        return False
    from fastchat_grpc.native.kernels import kernels

    with _compiling:
        return kernels() is not None


def fast_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the instructions of this processor that 8-bit products are fast with, or an empty text."""
    try:
        flags = cpuinfo.read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return ""
    if {"avx512f", "avx512bw", "avx512_vnni"} <= set(flags):
        return "AVX-512 VNNI"
    return "AVX2" if {"avx2", "fma"} <= set(flags) else ""


def _wanted(settings: ModelConfig) -> str | None:
    if not settings.load_8bit:
        return settings.quantization
    if settings.quantization not in (None, INT8, BNB_8BIT):
        raise ModelLoadError(f"--load-8bit and --quantization {settings.quantization} contradict each other")
    return settings.quantization or INT8


def _stored_method(config: Any) -> str:
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return ""
    method = stored.get("quant_method", "") if isinstance(stored, dict) else getattr(stored, "quant_method", "")
    name = str(getattr(method, "value", method))
    return "" if name == "gguf" else name  # weights of a GGUF file are loaded as plain numbers


def _check_stored(method: str, device: torch.device) -> None:
    package = _PACKAGES.get(method)
    if package is not None and not _installed(package):
        extra = {"gptqmodel": "[gptq]", "compressed_tensors": "[quantization]", "bitsandbytes": "[quantization]"}
        install = f"fastchat-grpc{extra[package]}" if package in extra else package.replace("_", "-")
        raise ModelLoadError(f"the checkpoint is quantized with {method}; install {install} to load it")
    if method in _GPU_ONLY and device.type == "cpu":
        raise ModelLoadError(f"the checkpoint is quantized with {method}, which needs a GPU; take one without it")


def _check_int8() -> None:
    from fastchat_grpc.native.kernels import kernels

    if kernels() is None:
        raise ModelLoadError("8-bit weights on a CPU need a C compiler; install gcc or clang, or leave out --load-8bit")


def _bitsandbytes(method: str, device: torch.device) -> Any:
    if not _installed("bitsandbytes"):
        raise ModelLoadError(f"{method} needs the package bitsandbytes; install fastchat-grpc[quantization]")
    if device.type in ("mps", "npu"):
        raise ModelLoadError(f"bitsandbytes ({method}) does not run on {device.type}")
    import torch
    import transformers

    config: Any = transformers.BitsAndBytesConfig

    if method == BNB_8BIT:
        return config(load_in_8bit=True)
    compute = torch.float32 if device.type == "cpu" else torch.bfloat16
    return config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False
