"""What the backends share whose engine is stepped by one thread: its life, requests on their way, embeddings, load."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from time import monotonic

from fastchat_grpc.backends import driver, lanes
from fastchat_grpc.backends.base import BackendLoad
from fastchat_grpc.backends.engine_thread import EngineThread
from fastchat_grpc.backends.served import Served, ServedBackend
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import EmbedRequest, EmbedResult, Event, GenerateRequest, ModelInfo
from fastchat_grpc.errors import ConfigError, WorkerUnavailable
from fastchat_grpc.text.batch import BatchEngine
from fastchat_grpc.text.grammar import GrammarCompiler
from fastchat_grpc.text.job import Job

Embed = Callable[[list[list[int]], bool, str], list[list[float]]]
"""Inputs as tokens, whether to normalize, and the adapter or "", to a vector for each input; in the engine's thread."""


def one_by_one(lengths: list[int]) -> list[list[int]]:
    """Each input by itself."""
    return [[i] for i in range(len(lengths))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model with its engine, as the engine's thread has made them."""

    engine: BatchEngine
    served: Served
    max_running: int
    embed: Embed
    embed_batches: Callable[[list[int]], list[list[int]]] = one_by_one
    """Indices of inputs by their lengths: those that are embedded together, between two steps of running streams."""
    grammars: GrammarCompiler | None = None
    """None: the backend takes no grammars."""


class BatchedBackend(ServedBackend):
    """One model and the thread that runs it. A subclass says how both are made, and where seeds come from."""

    thread_name = "engine"

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        self._thread: EngineThread | None = None
        self._loaded: Loaded | None = None

    def _load(self) -> Loaded:
        """Load the model. Called in the engine's thread, which owns it. Raises ModelLoadError."""
        raise NotImplementedError

    def _seed(self, job: Job, index: int) -> int:
        """The seed of one choice."""
        raise NotImplementedError

    async def start(self) -> Sequence[ModelInfo]:
        """See Backend."""
        made: list[Loaded] = []

        def make_engine() -> BatchEngine:
            made.append(self._load())
            return made[0].engine

        self._thread = EngineThread(self.thread_name, make_engine, self._seed)
        await self._thread.start()
        if self._thread is None:
            raise ConfigError("the worker was stopped while it loaded its model")
        self._loaded = made.pop()
        self._served_model = self._loaded.served
        return self._served.infos()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """See Backend."""
        arrival = monotonic()
        thread, loaded = self._running
        if (adapter := loaded.served.adapter(request)) is not None:
            request = replace(request, lora_adapter=adapter)
        job = await self._job(request, arrival)
        if request.grammar is not None and loaded.grammars is not None:
            job.grammar = await lanes.GRAMMARS.run(loaded.grammars.compile, request.grammar)
        async with aclosing(driver.drive(job, thread)) as events:
            async for event in events:
                yield event

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """See Backend."""
        inputs = await self._embed_inputs(request)
        thread, loaded = self._running
        adapter = loaded.served.adapters.get(request.model, "")
        vectors: list[list[float]] = [[]] * len(inputs)
        for batch in loaded.embed_batches([len(token_ids) for token_ids in inputs]):
            some = [inputs[i] for i in batch]
            try:
                made = await thread.call(lambda some=some: loaded.embed(some, request.normalize, adapter))  # type: ignore[misc]
            except Exception as error:
                raise driver.as_domain_error(error) from error
            for i, vector in zip(batch, made, strict=True):
                vectors[i] = vector
        return EmbedResult(embeddings=vectors, prompt_tokens=sum(map(len, inputs)))

    def load(self) -> BackendLoad:
        """See Backend."""
        if self._loaded is None:
            return BackendLoad(max_running=self._config.model.max_running or 1)
        engine = self._loaded.engine
        return BackendLoad(
            max_running=self._loaded.max_running,
            kv_cache_usage=engine.kv_cache_usage,
            kv_free_tokens=engine.kv_free_tokens,
            processed_tokens=engine.processed_tokens,
            steps=self._thread.steps if self._thread is not None else None,
        )

    async def close(self) -> None:
        """See Backend."""
        thread, self._thread = self._thread, None
        self._loaded = self._served_model = None
        if thread is not None:
            await thread.close()

    @property
    def _running(self) -> tuple[EngineThread, Loaded]:
        if self._thread is None or self._loaded is None:
            raise WorkerUnavailable("the model is not loaded, or was unloaded")
        return self._thread, self._loaded
