"""mlx-lm, by its batch generator: continuous batching on the GPU of a Mac, and on CPU or CUDA builds of MLX.

Source: `mlx_lm.generate.BatchGenerator` of mlx-lm 0.32.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

from fastchat_grpc.backends.base import BackendLoad
from fastchat_grpc.backends.batched import BatchedBackend, Loaded
from fastchat_grpc.backends.capabilities import TRAITS
from fastchat_grpc.backends.driver import Seeds
from fastchat_grpc.backends.mlx.engine import MlxEngine, MlxLimits, load_model, number_formats, use_fast_blas
from fastchat_grpc.backends.served import Served, find_model, refuse_settings, whole_number
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.errors import ConfigError
from fastchat_grpc.text.job import Job
from fastchat_grpc.text.tokenizer import Tokenizer

OPTIONS = frozenset({"blas", "prefill_tokens", "prefill_batch"})
DEFAULT_MAX_RUNNING = 32
QUANTIZATIONS = {"int8": 8, "int4": 4}


def create(config: BackendConfig) -> MlxBackend:
    """Make an MLX backend.

    Options: `prefill_tokens` of a prompt that one step takes, `prefill_batch` prompts that are read at once,
    `blas` a library that multiplies matrices on Linux CPUs (auto: the system's OpenBLAS; off: what MLX brings).
    `--quantization` int8 or int4 quantizes the weights on loading.
    """
    config.refuse_unknown_options(OPTIONS)
    refuse_settings(
        config,
        {
            "--gpus": "MLX uses one device",
            "--num-gpus": "MLX uses one device",
            "--max-gpu-memory": "MLX shares the main memory",
            "--cpu-offloading": "MLX shares the main memory",
            "--load-8bit": "use --quantization int8",
            "--lora": "fuse the adapter into the model with mlx_lm.fuse",
        },
    )
    quantization = config.model.quantization
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ConfigError(f"--quantization of the mlx backend must be int8 or int4, got {quantization}")
    use_fast_blas(config.options.get("blas", "auto"))
    importlib.import_module("mlx_lm")
    return MlxBackend(config)


class MlxBackend(BatchedBackend):
    """One model and the thread that runs it."""

    thread_name = "mlx-engine"

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        self._seeds = Seeds(config.model.seed)
        self._limits = MlxLimits(
            max_running=config.model.max_running or DEFAULT_MAX_RUNNING,
            prefill_tokens=whole_number(config, "prefill_tokens", 512),
            prefill_batch=whole_number(config, "prefill_batch", 8),
        )

    def load(self) -> BackendLoad:
        load = super().load()
        if self._thread is None or self._served_model is None:
            return load
        # Of what so many requests may grow to.
        most = load.max_running * self._served_model.context_length
        return replace(load, kv_cache_usage=min(1.0, self._thread.held_tokens / most))

    def _seed(self, job: Job, index: int) -> int:
        return self._seeds.of_choice(job.request, index)

    def _load(self) -> Loaded:
        settings = self._config.model
        facts = find_model(settings, "mlx")
        bits = QUANTIZATIONS[settings.quantization] if settings.quantization else None
        model = load_model(facts.source, settings, bits)
        tokenizer: Tokenizer = facts.tokenizer(settings)
        engine = MlxEngine(model, tokenizer, self._limits)
        quantization, precision = number_formats(model)
        served = Served(
            backend="mlx",
            names=settings.served_names,
            tokenizer=tokenizer,
            context_length=facts.served_context(settings.context_length),
            capabilities=TRAITS["mlx"].capabilities(
                chat=bool(tokenizer.chat_template), embed=engine.embedding_size > 0
            ),
            embedding_size=engine.embedding_size,
            default_sampling=facts.default_sampling,
            quantization=quantization or precision,
            precision=precision,
        )
        return Loaded(
            engine=engine,
            served=served,
            max_running=self._limits.max_running,
            embed=lambda inputs, normalize, _: [engine.embed(token_ids, normalize) for token_ids in inputs],
        )
