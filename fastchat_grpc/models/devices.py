"""Where a model goes: device, dtype and, over several GPUs, the map of its layers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastchat_grpc.config import ModelConfig
from fastchat_grpc.errors import ModelLoadError
from fastchat_grpc.models.machine import available_memory
from fastchat_grpc.models.resolve import weight_files

if TYPE_CHECKING:
    import torch

_PREFERENCE = ("cuda", "xpu", "npu", "mps")
_GPU_SHARE = 0.85  # of free memory for weights, as FastChat leaves; the rest is for activations and the KV cache
_CPU_SHARE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where weights go. `device_map` None: everything to `device`."""

    device: torch.device
    device_map: str | None = None
    max_memory: dict[int | str, str | int] = field(default_factory=dict)
    offload: bool = False
    """Layers without room on the GPUs stay in main memory, and on disk when that is full."""


def place(config: ModelConfig) -> Placement:
    """Choose the device, and how weights spread. Raises ModelLoadError where this machine lacks it."""
    import torch

    kind = _choose_kind(config.device)
    if kind == "cpu":
        _refuse_gpu_settings(config)
        return Placement(device=torch.device("cpu"))
    indices = _indices(kind, config)
    device = torch.device(kind) if kind == "mps" else torch.device(kind, indices[0])
    if len(indices) == 1 and not config.cpu_offloading and config.max_gpu_memory is None:
        return Placement(device=device)
    if kind == "mps":
        raise ModelLoadError("--cpu-offloading and --max-gpu-memory need discrete GPUs; mps shares the main memory")
    limits: dict[int | str, str | int] = {i: config.max_gpu_memory or _gpu_share(kind, i) for i in indices}
    if config.cpu_offloading:
        limits["cpu"] = int(available_memory() * _CPU_SHARE)
    # Filling one GPU after the other suits GPUs of unlike sizes; equal limits ask for an even spread.
    strategy = "auto" if config.max_gpu_memory else "sequential"
    return Placement(device=device, device_map=strategy, max_memory=limits, offload=config.cpu_offloading)


def choose_dtype(name: str, device: torch.device, checkpoint: torch.dtype | None, *, full: bool = False) -> torch.dtype:
    """The dtype of weights.

    Args:
        name: "auto", or a dtype's name.
        checkpoint: dtype of the stored weights, if known.
        full: the family loses accuracy in half precision (T5) or is small (embeddings).
    """
    import torch

    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    stored = checkpoint or torch.float32
    if device.type == "cpu":
        # Without AMX or AVX-512 BF16, products of half precision are emulated: slower than fp32.
        return torch.bfloat16 if stored is torch.bfloat16 and _cpu_has_bf16() else torch.float32
    if stored in (torch.float16, torch.bfloat16) or full:
        return stored
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def _choose_kind(wanted: str) -> str:
    if wanted == "auto":
        return next((kind for kind in _PREFERENCE if _available(kind)), "cpu")
    if wanted != "cpu" and not _available(wanted):
        raise ModelLoadError(f"--device {wanted}: {_why_missing(wanted)}; use --device cpu or auto")
    return wanted


def _available(kind: str) -> bool:
    import torch

    if kind == "cuda":
        return torch.cuda.is_available()
    if kind == "mps":
        return torch.backends.mps.is_available()
    if kind == "npu" and importlib.util.find_spec("torch_npu") is None:
        return False
    module: Any = getattr(torch, kind, None)
    return module is not None and bool(module.is_available())


def _why_missing(kind: str) -> str:
    import torch

    if kind == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if kind == "npu" and importlib.util.find_spec("torch_npu") is None:
        return "the package torch_npu is not installed"
    return f"torch {torch.__version__} finds no such device on this machine"


def _refuse_gpu_settings(config: ModelConfig) -> None:
    given = {
        "--gpus": bool(config.gpus),
        "--num-gpus": config.num_gpus > 1,
        "--max-gpu-memory": config.max_gpu_memory is not None,
        "--cpu-offloading": config.cpu_offloading,
    }
    for flag, is_given in given.items():
        if is_given:
            raise ModelLoadError(f"{flag} needs a GPU, and the model is to run on the CPU")


def _indices(kind: str, config: ModelConfig) -> list[int]:
    """The GPUs to use: the first `num_gpus` of `gpus`, or of the machine's."""
    import torch

    count = 1 if kind == "mps" else int(getattr(torch, kind).device_count())
    offered = list(config.gpus) or list(range(count))
    wanted = config.num_gpus
    if wanted > len(offered) or any(i >= count for i in offered[:wanted]):
        raise ModelLoadError(
            f"--num-gpus {config.num_gpus} --gpus {','.join(map(str, config.gpus)) or 'all'}: "
            f"this machine has {count} {kind} device{'s' if count != 1 else ''}, numbered from 0"
        )
    return offered[:wanted]


def _gpu_share(kind: str, index: int) -> int:
    import torch

    free, _ = getattr(torch, kind).mem_get_info(index)
    return int(free * _GPU_SHARE)


def _cpu_has_bf16() -> bool:
    import torch

    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


def check_memory(source: Path, placement: Placement, dtype: torch.dtype, stored: torch.dtype | None) -> None:
    """Raise ModelLoadError where the weights cannot fit into main memory; the system would kill the process."""
    if placement.device.type != "cpu":
        return
    size = source.stat().st_size if source.is_file() else sum(file.stat().st_size for file in weight_files(source))
    grows = dtype.itemsize / stored.itemsize if stored is not None and source.is_dir() else 1.0
    needed, free = int(size * grows), available_memory()
    if needed > free:
        hint = ", or load it in half the size with --dtype bfloat16" if dtype.itemsize == 4 else ""
        raise ModelLoadError(
            f"the model needs about {needed / 2**30:.1f} GiB of memory as {str(dtype).removeprefix('torch.')}, and "
            f"{free / 2**30:.1f} GiB are free: take a smaller one{hint}"
        )


def placement_arguments(placement: Placement) -> dict[str, Any]:
    """Arguments of from_pretrained for a placement."""
    if placement.device_map is not None:
        return {"device_map": placement.device_map, "max_memory": dict(placement.max_memory)}
    return {} if placement.device.type == "cpu" else {"device_map": {"": placement.device}}
