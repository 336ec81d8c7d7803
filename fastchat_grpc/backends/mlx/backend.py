"""mlx-lm, by its batch generator: continuous batching on the GPU of a Mac, and on CPU or CUDA builds of MLX.

Source: `mlx_lm.generate.BatchGenerator` of mlx-lm 0.32.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import monotonic

from fastchat_grpc.backends import driver
from fastchat_grpc.backends.base import BackendLoad
from fastchat_grpc.backends.capabilities import TRAITS
from fastchat_grpc.backends.driver import Job, Seeds
from fastchat_grpc.backends.engine_thread import EngineThread
from fastchat_grpc.backends.mlx.engine import MlxEngine, MlxLimits, load_model, number_formats, use_fast_blas
from fastchat_grpc.backends.served import Served, ServedBackend, find_model, refuse_settings, whole_number
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import EmbedRequest, EmbedResult, Event, GenerateRequest, ModelInfo
from fastchat_grpc.errors import ConfigError, WorkerUnavailable
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


@dataclass(slots=True)
class _Made:
    """What the engine's thread leaves for the event loop while it starts."""

    engine: MlxEngine | None = None
    served: Served | None = None


class MlxBackend(ServedBackend):
    """One model and the thread that runs it."""

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        self._seeds = Seeds(config.model.seed)
        self._limits = MlxLimits(
            max_running=config.model.max_running or DEFAULT_MAX_RUNNING,
            prefill_tokens=whole_number(config, "prefill_tokens", 512),
            prefill_batch=whole_number(config, "prefill_batch", 8),
        )
        self._engine: MlxEngine | None = None
        self._thread: EngineThread | None = None

    async def start(self) -> Sequence[ModelInfo]:
        made = _Made()
        self._thread = EngineThread("mlx-engine", lambda: self._make(made), self._seed)
        await self._thread.start()
        assert made.served is not None
        self._engine, self._served_model = made.engine, made.served
        return made.served.infos()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        arrival = monotonic()
        served = self._served
        served.adapter(request)
        job = self._job(request, await served.prepare(request), arrival)
        async with aclosing(driver.drive(job, self._running)) as events:
            async for event in events:
                yield event

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        inputs = await self._embed_inputs(request)
        engine, thread = self._engine, self._running
        assert engine is not None
        vectors = []
        for token_ids in inputs:  # one at a time, so that streams go on in between
            vectors.append(await thread.call(lambda ids=token_ids: engine.embed(ids, request.normalize)))  # type: ignore[misc]
        return EmbedResult(embeddings=vectors, prompt_tokens=sum(map(len, inputs)))

    def load(self) -> BackendLoad:
        processed = self._engine.processed_tokens if self._engine is not None else 0
        most = self._limits.max_running
        usage = 0.0
        if self._thread is not None and self._served_model is not None:  # of what so many requests may grow to
            usage = min(1.0, self._thread.held_tokens / (most * self._served_model.context_length))
        steps = self._thread.steps if self._thread is not None else None
        return BackendLoad(max_running=most, kv_cache_usage=usage, processed_tokens=processed, steps=steps)

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        self._engine = self._served_model = None
        if thread is not None:
            await thread.close()

    @property
    def _running(self) -> EngineThread:
        if self._thread is None:
            raise WorkerUnavailable("the model is not loaded, or was unloaded")
        return self._thread

    def _seed(self, job: Job, index: int) -> int:
        return self._seeds.of_choice(job.request, index)

    def _make(self, made: _Made) -> MlxEngine:
        """In the engine's thread, which owns every array."""
        settings = self._config.model
        facts = find_model(settings, "mlx")
        bits = QUANTIZATIONS[settings.quantization] if settings.quantization else None
        model = load_model(facts.source, settings, bits)
        tokenizer: Tokenizer = facts.tokenizer(settings)
        made.engine = MlxEngine(model, tokenizer, self._limits)
        quantization, precision = number_formats(model)
        made.served = Served(
            backend="mlx",
            names=settings.served_names,
            tokenizer=tokenizer,
            context_length=facts.served_context(settings.context_length),
            capabilities=TRAITS["mlx"].capabilities(
                chat=bool(tokenizer.chat_template), embed=made.engine.embedding_size > 0
            ),
            embedding_size=made.engine.embedding_size,
            default_sampling=facts.default_sampling,
            quantization=quantization or precision,
            precision=precision,
        )
        return made.engine
