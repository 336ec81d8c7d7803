"""From our settings and `--backend-option`s to vLLM's engine arguments."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Mapping
from typing import Any

from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.errors import ConfigError, ModelLoadError
from fastchat_grpc.models.facts import ModelFacts
from fastchat_grpc.models.resolve import read_json, resolve

_OURS = {
    "model": "--model-path",
    "tokenizer": "--model-path",
    "revision": "--revision",
    "served_model_name": "--model-names",
    "trust_remote_code": "--trust-remote-code",
    "dtype": "--dtype",
    "quantization": "--quantization",
    "max_model_len": "--context-length",
    "max_num_seqs": "--limit-worker-concurrency",
    "tensor_parallel_size": "--num-gpus",
    "device_ids": "--gpus",
    "seed": "--seed",
    "enable_lora": "--lora",
    "stream_interval": "--stream-interval",
}
"""Arguments that flags of the worker set."""
_REFUSED = {
    "enable_log_requests": "it would write prompts into logs",
    "skip_tokenizer_init": "grammars and stop tokens need the tokenizer",
    "disable_log_stats": "load is read from the statistics",
}
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_MAX_ADAPTERS_PER_BATCH = 8
_DRAIN_S = 3600
"""On a SIGTERM, which service managers send to every process, the engine ends what it has; the worker decides when."""


def prepare_environment(settings: ModelConfig) -> None:
    """Set what vLLM reads from the environment on import. What the user has set stays."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",  # no reports to anybody
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with gRPC threads may hang
    }
    if settings.gpus:
        defaults["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, settings.gpus))
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def parse_options(config: BackendConfig) -> Mapping[str, Any]:
    """The options, as vLLM's own command line reads them. Raises ConfigError."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    given = {name.replace("-", "_"): value for name, value in config.options.items()}
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in given:
        if name in _OURS:
            raise ConfigError(f"--backend-option {name} is set by {_OURS[name]}")
        if name in _REFUSED:
            raise ConfigError(f"--backend-option {name} is not supported: {_REFUSED[name]}")
        if name not in known:
            raise ConfigError(f"backend vllm has no option {name!r}; its options are vLLM's engine arguments")
    if not given:
        return {}

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM has no types here
        def error(self, message: str) -> Any:
            raise ConfigError(f"--backend-option: {message}")

    words = [word for name, value in given.items() for word in _words(name, value)]
    parsed = AsyncEngineArgs.add_cli_args(Parser(add_help=False)).parse_args(words)
    return {name: getattr(parsed, name) for name in given}


def _words(name: str, value: str) -> list[str]:
    """An option as words of a command line; switches have no value there."""
    flag = "--" + name.replace("_", "-")
    if value.lower() == "true":
        return [flag]
    if value.lower() == "false":
        return ["--no-" + flag.removeprefix("--")]
    return [f"{flag}={value}"]


def engine_arguments(
    config: BackendConfig, facts: ModelFacts, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """vLLM's AsyncEngineArgs, and a LoRARequest for each adapter by name. Raises ModelLoadError."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    settings = config.model
    _require_device(settings)
    arguments: dict[str, Any] = {
        "model": str(facts.source),
        "served_model_name": list(settings.served_names),
        "trust_remote_code": settings.trust_remote_code,
        "dtype": _dtype(settings, facts),
        "quantization": settings.quantization,
        "max_model_len": settings.context_length,
        "max_num_seqs": settings.max_running,
        "tensor_parallel_size": max(settings.num_gpus, len(settings.gpus)),
        "seed": secrets.randbits(31) if settings.seed is None else settings.seed & 0x7FFFFFFF,
        "enable_log_requests": False,
        "disable_log_stats": True,  # vLLM's own loggers; ours is passed beside
        "scheduling_policy": "priority",
        "shutdown_timeout": _DRAIN_S,
    }
    arguments |= _whole_prompts(options)
    adapters, lora_arguments = _lora(settings)
    return AsyncEngineArgs(**{**arguments, **lora_arguments, **options}), adapters


def _whole_prompts(options: Mapping[str, Any]) -> dict[str, Any]:
    """On a CPU each prompt is read in one step: vLLM's engine ends, with everyone's requests, where one with a seed is
    read in pieces, as it steps a random generator back that cannot be there (`GPUModelRunner._bookkeeping_sync`)."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    if options.get("enable_chunked_prefill"):
        raise ModelLoadError("--backend-option enable_chunked_prefill: on a CPU vLLM does not survive a seed then")
    return {"enable_chunked_prefill": False}


def _require_device(settings: ModelConfig) -> None:
    from vllm.platforms import current_platform

    found = str(current_platform.device_type)
    if settings.device not in ("auto", found):
        raise ModelLoadError(
            f"--device {settings.device}: this build of vLLM runs on {found or 'no device found here'}"
        )


def _dtype(settings: ModelConfig, facts: ModelFacts) -> str:
    """vLLM's own choice, except on a CPU, where it would emulate half precision."""
    import torch
    from vllm.platforms import current_platform

    from fastchat_grpc.models.devices import choose_dtype

    if settings.dtype != "auto" or not current_platform.is_cpu():
        return settings.dtype
    stored = getattr(torch, facts.stored_dtype, None) if facts.stored_dtype else None
    return str(choose_dtype("auto", torch.device("cpu"), stored)).removeprefix("torch.")


def _lora(settings: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """A LoRARequest for each adapter, and the engine arguments that make room for them."""
    if not settings.lora_adapters:
        return {}, {}
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    adapters, ranks = {}, []
    for number, (name, path) in enumerate(settings.lora_adapters.items(), start=1):
        folder = resolve(path)
        file = folder / "adapter_config.json"
        if not file.is_file():
            raise ModelLoadError(f"LoRA adapter {name}: no adapter_config.json in {folder}")
        ranks.append(int(read_json(file).get("r", 8)))
        adapters[name] = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder))
    room = next((rank for rank in _LORA_RANKS if rank >= max(ranks)), None)
    if room is None:
        raise ModelLoadError(f"vLLM takes LoRA adapters up to rank {_LORA_RANKS[-1]}, got {max(ranks)}")
    # Beside requests with adapters, vLLM's CPU code gives those without one the last place: it must stay empty.
    on_cpu = current_platform.is_cpu()
    count = len(adapters) + 1 if on_cpu else min(len(adapters), _MAX_ADAPTERS_PER_BATCH)
    return adapters, {"enable_lora": True, "max_lora_rank": room, "max_loras": count}
