"""vLLM, in this process: its asynchronous engine (V1), fed with token ids and read as token ids.

vLLM schedules, samples and caches in a process of its own; here are only its front end and our text code.
Each choice is one vLLM request, so choices may resume apart, and share the prompt through the prefix cache.

Source: `vllm.v1.engine.async_llm.AsyncLLM`, `vllm.sampling_params.SamplingParams` of vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

from fastchat_grpc.backends import driver
from fastchat_grpc.backends.base import BackendLoad
from fastchat_grpc.backends.driver import Piece, Seeds
from fastchat_grpc.backends.served import Served, ServedBackend, find_model, refuse_settings
from fastchat_grpc.backends.vllm.arguments import engine_arguments, parse_options, prepare_environment
from fastchat_grpc.backends.vllm.requests import (
    Statistics,
    check_limits,
    piece,
    prompt_logprobs,
    sampling_parameters,
    translated,
)
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import (
    Capability,
    EmbedRequest,
    EmbedResult,
    Event,
    GenerateRequest,
    ModelInfo,
    StopConditions,
    TokenPrompt,
)
from fastchat_grpc.errors import (
    ModelLoadError,
    WorkerUnavailable,
)
from fastchat_grpc.models.facts import ModelFacts
from fastchat_grpc.text.job import Job

CLOSE_TIMEOUT_S = 10.0
"""Time for the engine's process to end before it is killed."""


def create(config: BackendConfig) -> VllmBackend:
    """Make a vLLM backend. Every engine argument of vLLM is an option, by its name: `enforce_eager=true`."""
    refuse_settings(
        config,
        {
            "--max-gpu-memory": "use --backend-option gpu_memory_utilization=0.8",
            "--load-8bit": "name a method of vLLM with --quantization, such as bitsandbytes or fp8",
            "--cpu-offloading": "use --backend-option cpu_offload_gb=4",
        },
    )
    prepare_environment(config.model)
    return VllmBackend(config, parse_options(config))


@dataclass(frozen=True, slots=True)
class _Loaded:
    engine: Any
    """vllm.v1.engine.async_llm.AsyncLLM"""
    served: Served
    max_running: int


class VllmBackend(ServedBackend):
    """One vLLM engine."""

    def __init__(self, config: BackendConfig, options: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._options = options
        self._seeds = Seeds(config.model.seed)
        self._statistics = Statistics()
        self._jobs: set[Job] = set()
        self._loaded: _Loaded | None = None
        self._closed = threading.Event()

    async def start(self) -> Sequence[ModelInfo]:
        # Shielded: a cancel must not leave a process behind that nobody knows.
        loading = asyncio.ensure_future(asyncio.to_thread(self._load))
        self._loaded = await asyncio.shield(loading)
        self._served_model = self._loaded.served
        await self._warm_up()
        return self._served.infos()

    async def _warm_up(self) -> None:
        """The first request makes vLLM compile and allocate; no caller should wait for that."""
        if Capability.EMBED in self._served.capabilities:
            await self._embed_one([0], True, None)
            return
        request = GenerateRequest(prompt=TokenPrompt((0,)), stopping=StopConditions(max_new_tokens=2))
        async for _ in self.generate(request):
            pass

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        arrival = monotonic()
        served = self._served
        adapter = served.adapter(request)
        check_limits(request)
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

    async def _stream(self, job: Job, index: int, adapter: Any, shown: asyncio.Event) -> AsyncGenerator[Piece, None]:
        """One choice, as one request of vLLM. The first brings the prompt's log probabilities, ahead of the others."""
        from vllm.inputs import tokens_input

        request = job.request
        scores_prompt = not shown.is_set() and index == min(job.pending)
        if not scores_prompt:
            await shown.wait()
        ends = () if request.stopping.ignore_eos else self._served.tokenizer.eos_token_ids
        parameters = sampling_parameters(
            job,
            index,
            seed=self._seed(request, index),
            stop_token_ids=ends,
            prompt_logprobs=request.output.prompt_logprobs if scores_prompt else None,
        )
        outputs = self._engine.generate(
            tokens_input(job.prefix(index)),
            parameters,
            request_id=uuid.uuid4().hex,
            lora_request=adapter,
            priority=request.priority,
        )
        async with aclosing(outputs):
            try:
                async for output in outputs:
                    job.started()
                    if output.num_cached_tokens:
                        job.cached_tokens = min(output.num_cached_tokens, len(job.prompt_ids))
                    if scores_prompt and not shown.is_set():
                        job.show_prompt(prompt_logprobs(self._served.tokenizer, job, output.prompt_logprobs))
                        shown.set()
                    yield piece(self._served.tokenizer, request, output.outputs[0])
            except Exception as error:
                raise translated(error, request.grammar) from error

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        inputs = await self._embed_inputs(request)
        adapter = self._served.adapters.get(request.model)
        vectors = await asyncio.gather(*(self._embed_one(ids, request.normalize, adapter) for ids in inputs))
        return EmbedResult(embeddings=vectors, prompt_tokens=sum(map(len, inputs)))

    async def _embed_one(self, token_ids: list[int], normalize: bool, adapter: Any) -> list[float]:
        from vllm import PoolingParams
        from vllm.inputs import tokens_input

        outputs = self._engine.encode(
            tokens_input(token_ids),
            PoolingParams(task="embed", use_activation=normalize),
            request_id=uuid.uuid4().hex,
            lora_request=adapter,
        )
        vector: list[float] = []
        async with aclosing(outputs):
            try:
                async for output in outputs:
                    vector = output.outputs.data.float().tolist()
            except Exception as error:
                raise translated(error) from error
        return vector

    def load(self) -> BackendLoad:
        configured = self._config.model.max_running or 1
        return BackendLoad(
            max_running=self._loaded.max_running if self._loaded else configured,
            # vLLM reports when it steps, so what it said last is out of date once nothing runs.
            kv_cache_usage=self._statistics.kv_cache_usage if self._jobs else 0.0,
            processed_tokens=self._statistics.processed_tokens,
            prefix_cache=True,
            preemptions=self._statistics.preemptions,
            steps=self._statistics.steps,
        )

    async def close(self) -> None:
        self._closed.set()
        loaded, self._loaded, self._served_model = self._loaded, None, None
        for job in list(self._jobs):
            job.fail(WorkerUnavailable("the worker closes"))
        if loaded is not None:
            if loaded.engine.output_handler is not None:
                loaded.engine.output_handler.cancel()  # else it reports the end of its engine as a failure
            await asyncio.to_thread(loaded.engine.shutdown, CLOSE_TIMEOUT_S)

    @property
    def _engine(self) -> Any:
        if self._loaded is None:
            raise WorkerUnavailable("the model is not loaded, or was unloaded")
        return self._loaded.engine

    def _load(self) -> _Loaded:
        """Runs in a thread: loading takes a minute or more."""
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = self._config.model
        facts = find_model(settings, "vllm")
        arguments, adapters = engine_arguments(self._config, facts, self._options)
        try:
            with _without_keyboard_interrupts():
                engine = AsyncLLM.from_engine_args(
                    arguments,
                    usage_context=UsageContext.OPENAI_API_SERVER,  # batches as large as those of vLLM's own server
                    stat_loggers=[self._statistics.logger()],
                )
        except Exception as error:  # vLLM raises what its dozens of parts raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ModelLoadError(f"vLLM cannot load {facts.source}: {reason}") from error
        try:
            loaded = self._describe(engine, facts, adapters)
            if self._closed.is_set():
                raise ModelLoadError("closed while loading")
        except BaseException:
            engine.shutdown(CLOSE_TIMEOUT_S)
            raise
        return loaded

    def _describe(self, engine: Any, facts: ModelFacts, adapters: Mapping[str, Any]) -> _Loaded:
        model = engine.model_config
        dtype = str(model.dtype).removeprefix("torch.")
        tokenizer = facts.tokenizer(self._config.model, vocabulary_size=int(model.get_vocab_size()))
        capabilities = {Capability.EMBED}
        if model.runner_type == "generate":
            capabilities = {
                Capability.GENERATE,
                Capability.LOGPROBS,
                Capability.SEED,
                Capability.RESUME,
                Capability.STRUCTURED_OUTPUT,
            }
            if tokenizer.chat_template:
                capabilities.add(Capability.CHAT)
        served = Served(
            backend="vllm",
            names=self._config.model.served_names,
            tokenizer=tokenizer,
            context_length=int(model.max_model_len),
            capabilities=frozenset(capabilities),
            adapters=adapters,
            embedding_size=int(model.get_hidden_size()),
            default_sampling=facts.default_sampling,
            quantization=str(model.quantization or "") or dtype,
            precision=dtype,
        )
        return _Loaded(
            engine=engine,
            served=served,
            max_running=int(engine.scheduler_config.max_num_seqs),
        )

    def _seed(self, request: GenerateRequest, index: int) -> int | None:
        """None where any will do: vLLM draws faster for a batch than for a request with a seed of its own."""
        if request.sampling.seed is None and self._config.model.seed is None:
            return None
        return self._seeds.of_choice(request, index)


@contextmanager
def _without_keyboard_interrupts() -> Iterator[None]:
    """Processes started inside inherit a blocked SIGINT: Ctrl-C reaches all of a terminal's processes, and the
    engine must outlive it while the worker drains. Blocked in this thread only."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
