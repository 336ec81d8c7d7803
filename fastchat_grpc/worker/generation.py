"""Generation on this worker: model names, admission and the backend, for every service that needs it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from time import monotonic

from fastchat_grpc.backends.base import Backend
from fastchat_grpc.config import MAX_MESSAGE_BYTES
from fastchat_grpc.core import (
    Capability,
    Delta,
    EmbedRequest,
    EmbedResult,
    Event,
    GenerateRequest,
    ModelInfo,
    Prompt,
    SamplingDefaults,
)
from fastchat_grpc.errors import InvalidArgument, ModelDiffers, ModelNotFound, Starting, UnsupportedField
from fastchat_grpc.rpc.access import CLIENT
from fastchat_grpc.worker.active import Active, evicted
from fastchat_grpc.worker.admission import Admission
from fastchat_grpc.worker.records import NOTHING, Records

logger = logging.getLogger(__name__)

EMBEDDING_OVERHEAD = 16
"""Bytes of an EmbedResponse for each vector, beside its numbers; more than there are."""


class LocalGeneration:
    """One backend behind its admission. Does nothing before `open`, and nothing new after `close`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._admission: Admission | None = None
        self._models: dict[str, ModelInfo] = {}
        self._active: set[Active] = set()
        self._dropping: set[asyncio.Task[None]] = set()
        self.records: Records = NOTHING
        """Where requests are noted; set before `open`."""
        self.output_tokens = 0
        """Tokens sent since start."""

    def open(self, models: Sequence[ModelInfo], admission: Admission) -> None:
        """Begin to take requests."""
        self._models = {model.name: model for model in models}
        self._admission = admission

    @property
    def opened(self) -> bool:
        """Whether requests are, or were, taken."""
        return self._admission is not None

    @property
    def admission(self) -> Admission:
        """Slots and queue. Raises Starting before `open`."""
        if self._admission is None:
            raise Starting("this worker is loading its model")
        return self._admission

    def models(self) -> Sequence[ModelInfo]:
        """The models served; none before `open`."""
        return list(self._models.values())

    def model(self, name: str) -> ModelInfo:
        """The model of that name; the only one for an empty name. Raises ModelNotFound or InvalidArgument."""
        if self._admission is None:
            raise Starting("this worker is loading its model")
        if not name:
            if len(self._models) == 1:
                return next(iter(self._models.values()))
            raise InvalidArgument("model", f"several models are served; name one of {', '.join(self._models)}")
        if name not in self._models:
            raise ModelNotFound(
                f"model {name[:128]!r} is not served here; served: {', '.join(self._models)}",
                metadata={"model": name[:128]},
            )
        return self._models[name]

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Events of one request, as `Backend.generate`. Closing the generator frees its slot.

        Raises ReaderTooSlow to a caller that comes back after its slot was taken for want of reading.
        """
        model = self.model(request.model)
        _check_origin(request, model)
        counter_based = Capability.SEEDED_RESUME in model.capabilities
        request = replace(request, model=model.name, sampling=request.sampling.seeded(counter_based=counter_based))
        resumed = request.resume is not None
        with self.records.begin(request, CLIENT.get()) as record:
            async with (
                self._evictable() as active,
                self.admission.slot(request.priority, weight=_sequences(request), resumed=resumed) as active.slot,
            ):
                record.admitted()
                events = active.events = self._with_defaults(request, model.default_sampling)
                try:
                    async for event in events:
                        if isinstance(event, Delta):
                            self.output_tokens += len(event.token_ids)
                        record.event(event)
                        active.sent()
                        yield event
                        active.task = _running()  # whoever asks for the next event may be another task
                        active.read()
                finally:
                    await active.end()

    async def _with_defaults(self, request: GenerateRequest, defaults: SamplingDefaults) -> AsyncGenerator[Event, None]:
        """Events of a request with the model's own sampling defaults, as far as the backend takes them with it."""
        begun = False
        while True:
            filled = replace(request, sampling=request.sampling.filled(defaults))
            try:
                async with aclosing(self._backend.generate(filled)) as events:
                    async for event in events:
                        begun = True
                        yield event
                return
            except UnsupportedField as refusal:
                if begun or filled.sampling == request.sampling:
                    raise
                logger.debug("a default of model %s gives way: %s", request.model, refusal.field)
                defaults = defaults.yielding(refusal.field)

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Embed, in a slot. Raises InvalidArgument, before the work, for more than a message can bring back."""
        model = self.model(request.model)
        most = MAX_MESSAGE_BYTES // (4 * model.embedding_size + EMBEDDING_OVERHEAD)
        if model.embedding_size and len(request.inputs) > most:
            raise InvalidArgument(
                "inputs",
                f"{len(request.inputs)} embeddings of {model.embedding_size} numbers each do not fit a message, which "
                f"has at most {MAX_MESSAGE_BYTES} bytes; embed at most {most} at a time",
            )
        request = replace(request, model=model.name)
        with self.records.begin(request, CLIENT.get()) as record:
            async with self._evictable() as active, self.admission.slot() as active.slot:
                record.admitted()
                result = await self._backend.embed(request)
                record.embedded(result)
                return result

    async def tokenize(self, model: str, prompt: Prompt) -> Sequence[int]:
        """Token ids of a prompt. Needs no slot."""
        return await self._backend.tokenize(self.model(model).name, prompt)

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """Text of token ids. Needs no slot."""
        return await self._backend.detokenize(self.model(model).name, token_ids)

    def chat_template(self, model: str) -> str:
        """The model's chat template, or an empty string."""
        return self._backend.chat_template(self.model(model).name)

    @property
    def awaiting(self) -> int:
        """Requests to which the engine owes something: neither those that wait nor those that nobody reads."""
        return sum(active.awaits_engine for active in self._active)

    def drop_unread(self, bound_s: float) -> int:
        """Take their slots from requests whose callers have not read for `bound_s` seconds. How many those are."""
        now = monotonic()
        unread = [active for active in self._active if active.unread_s(now) > bound_s]
        for active in unread:
            self._keep(active.drop(now))
        return len(unread)

    def evict(self) -> None:
        """End what runs with UNAVAILABLE, so that callers resume it elsewhere."""
        for active in self._active:
            if (task := active.evict()) is not None:
                self._keep(task)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    @asynccontextmanager
    async def _evictable(self) -> AsyncIterator[Active]:
        """Run the body as something that `evict` may end; its cancel becomes Draining."""
        active = Active(_running())
        self._active.add(active)
        try:
            yield active
        except asyncio.CancelledError:
            if not active.evicted:
                raise
            _running().uncancel()
            raise evicted() from None
        finally:
            self._active.discard(active)


def _running() -> asyncio.Task[object]:
    task = asyncio.current_task()
    assert task is not None
    return task


def _sequences(request: GenerateRequest) -> int:
    """How many sequences a request generates: its choices, without those that a resumed one has finished."""
    return request.output.n - sum(choice.finished for choice in request.resume or ())


def _check_origin(request: GenerateRequest, model: ModelInfo) -> None:
    """Raise ModelDiffers if the request goes on with what other weights, or other random numbers, began."""
    began, here = request.resume_fingerprint, model.fingerprint
    if began and here and began != here:
        raise ModelDiffers(
            f"the generation began with another revision of model {model.name!r} than this worker serves",
            metadata={"model": model.name, "fingerprint": here},
        )
    drawn_by = request.resume_backend
    seeded = request.sampling.seed is not None and not request.sampling.greedy
    drawn = seeded and any(choice.output_token_ids or choice.finished for choice in request.resume or ())
    if drawn and drawn_by and drawn_by != model.backend:
        raise ModelDiffers(
            f"the generation began at the backend {drawn_by[:64]!r}, and this worker's, {model.backend!r}, draws "
            "other random numbers for its seed",
            metadata={"model": model.name, "backend": model.backend},
        )
