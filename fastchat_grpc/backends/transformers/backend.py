"""Any Hugging Face model, through the project's own engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

from fastchat_grpc.backends import driver, lanes
from fastchat_grpc.backends.base import BackendLoad
from fastchat_grpc.backends.capabilities import TRAITS, refuse_unsupported
from fastchat_grpc.config import BackendConfig, EngineConfig
from fastchat_grpc.core import (
    Capability,
    ChatPrompt,
    EmbedRequest,
    EmbedResult,
    Event,
    GenerateRequest,
    ModelInfo,
    Prompt,
)
from fastchat_grpc.errors import (
    AdapterNotFound,
    ConfigError,
    InvalidArgument,
    NotSupported,
    PromptTooLong,
    UnsupportedField,
    WorkerUnavailable,
)
from fastchat_grpc.text import prompt as prompts
from fastchat_grpc.text.events import EventQueue

if TYPE_CHECKING:
    from fastchat_grpc.engine.build import BuiltEngine
    from fastchat_grpc.engine.engine import Delivery

logger = logging.getLogger(__name__)

OPTIONS = frozenset({"kv_cache_tokens", "prefill_tokens", "prefix_cache", "threads"})


def create(config: BackendConfig) -> TransformersBackend:
    """Make a backend of transformers models.

    Options: `kv_cache_tokens` that the KV cache holds, `prefill_tokens` of prompts that one step takes,
    `prefix_cache` on or off, `threads` for the CPU.
    """
    config.refuse_unknown_options(OPTIONS)
    return TransformersBackend(config, _engine_config(config))


class TransformersBackend:
    """One model, its adapters, and the engine thread that owns both."""

    def __init__(self, config: BackendConfig, settings: EngineConfig) -> None:
        self._config = config
        self._settings = settings
        self._built: BuiltEngine | None = None
        self._closed = False

    async def start(self) -> Sequence[ModelInfo]:
        loop = asyncio.get_running_loop()

        def deliver(deliveries: list[Delivery]) -> None:
            # The loop may be gone by the time that a closing engine says so to its last requests.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_hand_out, deliveries)

        # In a thread that ends: OpenMP keeps a pool for each thread that has computed, and lets its pools sleep
        # between any two operations once they have more threads than there are processors.
        loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        try:
            built = await loop.run_in_executor(loader, self._build, deliver)
        finally:
            loader.shutdown(wait=False)
        if self._closed:
            built.engine.close()
            raise ConfigError("the worker was stopped while it loaded its model")
        self._built = built
        built.engine.start()
        infos = built.loaded.infos(self._config.model.served_names, built.capabilities)
        return [replace(info, context_length=built.context_length) for info in infos]

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        arrival = monotonic()
        built = self._engine
        request = self._resolve_adapter(built, request)
        _check(built, request)
        token_ids = await lanes.run(
            lanes.characters(request.prompt),
            prompts.prepare,
            built.loaded.tokenizer,
            request,
            built.context_length,
            output_apart=built.output_apart,
        )
        grammar = None
        if request.grammar is not None:
            grammar = await lanes.GRAMMARS.run(built.grammars.compile, request.grammar)
        events = EventQueue()
        running = built.engine.submit(request, token_ids, events, arrival=arrival, grammar=grammar)
        try:
            async for event in events:
                yield event
        finally:
            built.engine.abort(running)

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        built = self._engine
        if Capability.EMBED not in built.capabilities:
            raise NotSupported(f"model {request.model} has no embeddings")
        inputs = await lanes.run(sum(map(len, request.inputs)), self._embed_inputs, built, request)
        adapter = request.model if request.model in built.loaded.adapters.names else ""
        future: Future[list[list[float]]] = Future()
        built.engine.run_job(built.embedder.pieces(inputs, request.normalize, adapter, future), future)
        vectors = await asyncio.wrap_future(future)
        return EmbedResult(embeddings=vectors, prompt_tokens=sum(map(len, inputs)))

    async def tokenize(self, model: str, prompt: Prompt) -> Sequence[int]:
        return await driver.tokenize(self._engine.loaded.tokenizer, prompt)

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        return await driver.detokenize(self._engine.loaded.tokenizer, token_ids)

    def chat_template(self, model: str) -> str:
        return self._engine.loaded.tokenizer.chat_template

    def load(self) -> BackendLoad:
        if self._built is None:
            return BackendLoad(max_running=self._config.model.max_running or 1)
        engine = self._built.engine
        return BackendLoad(
            max_running=self._built.max_running,
            kv_cache_usage=engine.scheduler.pool.usage,
            kv_free_tokens=engine.scheduler.pool.available * engine.scheduler.pool.block_size,
            processed_tokens=engine.processed_tokens,
            kv_block_size=engine.scheduler.pool.block_size,
            kv_block_count=engine.scheduler.pool.block_count,
            prefix_cache=engine.scheduler.limits.reuse_prefixes,
            preemptions=engine.scheduler.preemptions,
        )

    async def close(self) -> None:
        self._closed = True
        built, self._built = self._built, None
        if built is not None:
            await asyncio.to_thread(built.engine.close)

    def _build(self, deliver: Callable[[list[Delivery]], None]) -> BuiltEngine:
        logger.info("starting torch and transformers")
        from fastchat_grpc.engine.build import build_engine
        from fastchat_grpc.models.loading import load_model

        return build_engine(load_model(self._config.model), self._config, self._settings, deliver)

    @property
    def _engine(self) -> BuiltEngine:
        if self._built is None:
            raise WorkerUnavailable("the model is not loaded, or was unloaded")
        return self._built

    def _resolve_adapter(self, built: BuiltEngine, request: GenerateRequest) -> GenerateRequest:
        """An adapter may be asked for by its field, or as a model of its own."""
        names = built.loaded.adapters.names
        if not request.lora_adapter and request.model in names:
            return replace(request, lora_adapter=request.model)
        if request.lora_adapter and request.lora_adapter not in names:
            known = ", ".join(names) or "none"
            raise AdapterNotFound(f"lora_adapter: no adapter {request.lora_adapter[:128]!r} is loaded; loaded: {known}")
        return request

    def _embed_inputs(self, built: BuiltEngine, request: EmbedRequest) -> list[list[int]]:
        tokenizer, limit = built.loaded.tokenizer, built.loaded.context_length
        truncate = self._config.model.embed_truncate if request.truncate is None else request.truncate
        inputs = []
        for i, item in enumerate(request.inputs):
            token_ids = tokenizer.encode(item) if isinstance(item, str) else list(item)
            prompts.check_token_ids(f"inputs[{i}]", token_ids, tokenizer.vocabulary_size)
            if not token_ids:
                raise InvalidArgument(f"inputs[{i}]", "has no tokens")
            if len(token_ids) > limit and not truncate:
                raise PromptTooLong(f"inputs[{i}]", len(token_ids), limit)
            inputs.append(token_ids[:limit])
        return inputs


def _check(built: BuiltEngine, request: GenerateRequest) -> None:
    """Refuse what this model cannot do."""
    refuse_unsupported(request, TRAITS["transformers"])
    if Capability.GENERATE not in built.capabilities:
        raise NotSupported(f"model {request.model} makes embeddings only")
    if isinstance(request.prompt, ChatPrompt) and not built.loaded.tokenizer.chat_template:
        raise InvalidArgument("chat", "the model has no chat template; send a prompt, or set --conv-template")
    if built.loaded.kind.name == "ENCODER_DECODER" and request.output.prompt_logprobs is not None:
        raise UnsupportedField("output.prompt_logprobs", "an encoder-decoder has no probabilities of its input")


def _hand_out(deliveries: list[Delivery]) -> None:
    """On the event loop: give each request what a step brought it."""
    for delivery in deliveries:
        delivery.sink.put(delivery.events)
        if delivery.closed:
            delivery.sink.close(delivery.error)


def _engine_config(config: BackendConfig) -> EngineConfig:
    def number(option: str) -> int | None:
        value = config.options.get(option)
        if value is None:
            return None
        if not value.isdecimal():
            raise ConfigError(f"--backend-option {option} must be a whole number, got {value}")
        return int(value)

    switch = config.options.get("prefix_cache", "on")
    if switch not in ("on", "off"):
        raise ConfigError(f"--backend-option prefix_cache must be on or off, got {switch}")
    return EngineConfig(
        kv_cache_tokens=number("kv_cache_tokens"),
        prefill_tokens=number("prefill_tokens"),
        prefix_cache=switch == "on",
        threads=number("threads"),
    )
