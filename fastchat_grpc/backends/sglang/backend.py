"""SGLang, in this process: its engine's `async_generate`, fed with token ids and read as token ids.

SGLang puts handlers for SIGTERM and SIGQUIT on the event loop that it runs on, which would take the worker's
own drain away; so it gets a loop in a thread of its own. Each choice is one SGLang request.

Source: `sglang.srt.entrypoints.engine.Engine`, `sglang.srt.managers.io_struct.GenerateReqInput` and
`sglang.srt.sampling.sampling_params.SamplingParams` of SGLang 0.5.23.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import monotonic
from typing import Any

from fastchat_grpc.backends import driver
from fastchat_grpc.backends.base import BackendLoad
from fastchat_grpc.backends.driver import Piece, Seeds
from fastchat_grpc.backends.loop_thread import LoopThread
from fastchat_grpc.backends.served import Served, ServedBackend, find_model, refuse_settings
from fastchat_grpc.backends.sglang.requests import (
    check_limits,
    engine_settings,
    parse_options,
    piece,
    prompt_logprobs,
    refusal,
    refused,
    sampling_parameters,
)
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import Capability, EmbedRequest, EmbedResult, Event, GenerateRequest, ModelInfo
from fastchat_grpc.errors import ModelLoadError, UnsupportedField, WorkerUnavailable
from fastchat_grpc.models.facts import limited_context
from fastchat_grpc.text.job import Job

DEFAULT_MAX_RUNNING = 64


def create(config: BackendConfig) -> SglangBackend:
    """Make an SGLang backend. Every server argument of SGLang is an option, by its name: `mem_fraction_static=0.8`."""
    refuse_settings(
        config,
        {
            "--max-gpu-memory": "use --backend-option mem_fraction_static=0.8",
            "--load-8bit": "name a method of SGLang with --quantization, such as w8a8_int8 or fp8",
            "--cpu-offloading": "use --backend-option cpu_offload_gb=4",
        },
    )
    # Log probabilities of the model itself, not those after the temperature; read when SGLang is imported.
    os.environ.setdefault("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    if config.model.gpus:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, config.model.gpus)))
    importlib.import_module("sglang")
    return SglangBackend(config, parse_options(config))


@dataclass(frozen=True, slots=True)
class _Loaded:
    engine: Any
    """sglang.srt.entrypoints.engine.Engine"""
    served: Served
    cache_tokens: int
    """Tokens that its KV cache holds."""


class SglangBackend(ServedBackend):
    """One SGLang engine and the thread of its event loop."""

    def __init__(self, config: BackendConfig, options: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._options = options
        self._seeds = Seeds(config.model.seed)
        self._max_running = config.model.max_running or DEFAULT_MAX_RUNNING
        self._seeded = bool(options.get("enable_deterministic_inference"))
        self._thread: LoopThread | None = None
        self._loaded: _Loaded | None = None
        self._jobs: set[Job] = set()
        self._processed_tokens = 0

    async def start(self) -> Sequence[ModelInfo]:
        self._thread = LoopThread("sglang")
        self._loaded = await asyncio.shield(asyncio.ensure_future(self._thread.call(self._load)))
        self._served_model = self._loaded.served
        return self._served.infos()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        arrival = monotonic()
        served = self._served
        adapter = served.adapter(request)
        check_limits(request, self._seeded)
        job = await self._job(request, arrival)
        self._jobs.add(job)
        shown = asyncio.Event()
        if request.output.prompt_logprobs is None or request.resume is not None:
            job.show_prompt()
            shown.set()

        def open_stream(index: int) -> AsyncGenerator[Piece, None]:
            return self._stream(job, index, adapter, shown)

        try:
            async with aclosing(driver.drive_streams(job, open_stream)) as events:
                async for event in events:
                    yield event
        finally:
            self._jobs.discard(job)

    async def _stream(
        self, job: Job, index: int, adapter: str | None, shown: asyncio.Event
    ) -> AsyncGenerator[Piece, None]:
        """One choice, as one request of SGLang. The first brings the prompt's log probabilities ahead of the others."""
        scores_prompt = not shown.is_set() and index == min(job.pending)
        if not scores_prompt:
            await shown.wait()
        tokenizer, first = self._served.tokenizer, True
        async with aclosing(self._outputs(job, index, adapter, scores_prompt)) as outputs:
            async for output in outputs:
                meta = output["meta_info"]
                if (error := refusal(meta, job.request.grammar)) is not None:
                    raise error
                if first:
                    first = False
                    job.started()
                    job.cached_tokens = min(int(meta.get("cached_tokens") or 0), len(job.prompt_ids))
                    self._processed_tokens += len(job.prompt_ids)
                if scores_prompt and not shown.is_set():
                    job.show_prompt(prompt_logprobs(tokenizer, job, meta))
                    shown.set()
                made = piece(tokenizer, job.request, output)
                self._processed_tokens += len(made.token_ids)
                yield made

    async def _outputs(
        self, job: Job, index: int, adapter: str | None, scores_prompt: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        thread, engine = self._running
        output, request_id = job.request.output, uuid.uuid4().hex
        wanted = output.logprobs is not None or scores_prompt
        arguments: dict[str, Any] = {
            "input_ids": job.prefix(index),
            "sampling_params": sampling_parameters(job, index, self._served.tokenizer, self._seed(job.request, index)),
            "return_logprob": wanted,
            "logprob_start_len": 0 if scores_prompt else -1,
            "top_logprobs_num": max(output.logprobs or 0, (output.prompt_logprobs or 0) if scores_prompt else 0),
            "lora_path": adapter,
            "stream": True,
            "rid": request_id,
        }

        async def begin() -> AsyncGenerator[dict[str, Any], None]:
            return self._aborted_when_closed(engine, request_id, await engine.async_generate(**arguments))

        async with aclosing(thread.stream(begin)) as outputs:
            try:
                async for item in outputs:
                    yield item
            except ValueError as error:  # how SGLang refuses a request before it is scheduled
                raise refused(str(error), job.request.grammar) from error

    async def _aborted_when_closed(
        self, engine: Any, request_id: str, outputs: AsyncGenerator[dict[str, Any], None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        finished = False
        try:
            async for output in outputs:
                finished = output["meta_info"].get("finish_reason") is not None
                yield output
        finally:
            await outputs.aclose()
            if not finished:
                engine.tokenizer_manager.abort_request(request_id)

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        if not request.normalize and Capability.EMBED in self._served.capabilities:
            raise UnsupportedField("skip_normalization", "SGLang returns vectors of length 1 only")
        inputs = await self._embed_inputs(request)
        thread, engine = self._running
        from sglang.srt.managers.io_struct import EmbeddingReqInput

        async def embed(token_ids: list[int]) -> list[float]:
            # As Engine.async_encode does; that takes text only.
            generator = engine.tokenizer_manager.generate_request(EmbeddingReqInput(input_ids=token_ids), None)
            async with aclosing(generator):
                return [float(x) for x in (await anext(generator))["embedding"]]

        async def embed_all() -> list[list[float]]:
            return await asyncio.gather(*(embed(token_ids) for token_ids in inputs))

        vectors = await thread.run(embed_all)
        count = sum(map(len, inputs))
        self._processed_tokens += count
        return EmbedResult(embeddings=vectors, prompt_tokens=count)

    def load(self) -> BackendLoad:
        room = self._loaded.cache_tokens if self._loaded is not None else 0
        held = sum(job.held_tokens for job in self._jobs)
        return BackendLoad(
            max_running=self._max_running,
            kv_cache_usage=min(1.0, held / room) if room else 0.0,
            processed_tokens=self._processed_tokens,
            prefix_cache=True,
        )

    async def close(self) -> None:
        loaded, self._loaded, self._served_model = self._loaded, None, None
        thread, self._thread = self._thread, None
        for job in list(self._jobs):
            job.fail(WorkerUnavailable("the worker closes"))
        if loaded is not None:
            await asyncio.to_thread(loaded.engine.shutdown)
        if thread is not None:
            await thread.close()

    @property
    def _running(self) -> tuple[LoopThread, Any]:
        if self._loaded is None or self._thread is None:
            raise WorkerUnavailable("the model is not loaded, or was unloaded")
        return self._thread, self._loaded.engine

    def _load(self) -> _Loaded:
        """Runs in the loop's thread, and blocks it: loading takes a minute or more."""
        from sglang.srt.entrypoints.engine import Engine

        facts = find_model(self._config.model, "sglang")
        tokenizer = facts.tokenizer(self._config.model)
        settings = engine_settings(self._config, facts, self._max_running)
        try:
            engine = Engine(**{**settings, **self._options})
        except Exception as error:  # SGLang raises what its parts raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ModelLoadError(f"SGLang cannot load {facts.source}: {reason}") from error
        if self._thread is None:
            engine.shutdown()
            raise ModelLoadError("closed while loading")
        capabilities = {Capability.EMBED}
        if not self._options.get("is_embedding"):
            capabilities = {
                Capability.GENERATE,
                Capability.LOGPROBS,
                Capability.RESUME,
                Capability.STRUCTURED_OUTPUT,
            }
            if self._seeded:  # SGLang then draws by a hash of the seed and the token's position
                capabilities |= {Capability.SEED, Capability.SEEDED_RESUME}
            if tokenizer.chat_template:
                capabilities.add(Capability.CHAT)
        quantization, precision = _number_formats(engine)
        served = Served(
            backend="sglang",
            names=self._config.model.served_names,
            tokenizer=tokenizer,
            context_length=limited_context(
                int(engine.tokenizer_manager.context_len), self._config.model.context_length
            ),
            capabilities=frozenset(capabilities),
            adapters={name: name for name in self._config.model.lora_adapters},
            embedding_size=facts.hidden_size,
            default_sampling=facts.default_sampling,
            quantization=quantization,
            precision=precision,
        )
        told = getattr(engine, "scheduler_info", None) or {}
        room = told.get("max_total_num_tokens") or self._max_running * served.context_length
        return _Loaded(engine, served, int(room))

    def _seed(self, request: GenerateRequest, index: int) -> int | None:
        """A seed where the engine heeds it."""
        if not self._seeded:
            return None
        return self._seeds.of_choice(request, index)


def _number_formats(engine: Any) -> tuple[str, str]:
    """Of weights and arithmetic, as SGLang has chosen them (`sglang.srt.configs.model_config.ModelConfig`)."""
    model = getattr(engine.tokenizer_manager, "model_config", None)
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    return str(getattr(model, "quantization", None) or dtype), dtype
