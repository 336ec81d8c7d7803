"""Requests on their way through an engine that makes tokens by itself. Shared by the backends over such engines.

An engine knows tokens and log probabilities; text, stops, usage and events are the `Choice`s'. A `Job` is
one request between the two: the engine feeds it, on the event loop, and `drive` yields what comes of it:

    engine --feed(index, token_ids, logprobs)--> Job -> Choice -> EventQueue --> drive() --> events
           <--------- stop(job, index) ---------

A choice that has ended by our stops, or whose caller has gone, is stopped in the engine at once, whether
or not anybody reads the events.

An engine with one thread that steps a batch implements `TokenEngine` and uses `drive`. An engine whose
requests are asynchronous generators (one per choice) uses `drive_streams`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import traceback
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from time import monotonic
from typing import Protocol

from fastchat_grpc.backends import lanes
from fastchat_grpc.core import (
    INT64_MAX,
    Completion,
    Delta,
    Event,
    FinishReason,
    GenerateRequest,
    Prompt,
    Timings,
    TokenLogprob,
    TopLogprob,
)
from fastchat_grpc.errors import BackendFailed, FastChatError
from fastchat_grpc.text import prompt as prompts
from fastchat_grpc.text.choice import Choice, ChoiceLimits
from fastchat_grpc.text.events import EventQueue
from fastchat_grpc.text.grammar import CompiledGrammar
from fastchat_grpc.text.reasoning import Marks
from fastchat_grpc.text.seeds import GOLDEN
from fastchat_grpc.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Piece:
    """What an engine made for one choice since its last piece.

    `logprobs` holds one entry per token where the request asks for them, else nothing. `finish_reason`
    is set where the engine itself has ended the choice.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: FinishReason | None = None


class TokenEngine(Protocol):
    """An engine that feeds jobs. Both methods are called on the event loop and must not block it."""

    def submit(self, job: Job) -> None:
        """Begin every choice of `job.pending`; feed the job on the event loop from now on."""
        ...

    def stop(self, job: Job, index: int) -> None:
        """Make no more tokens for a choice; what is fed for it from now on is dropped."""
        ...


class Job:
    """One request in an engine; `prompt_ids` as `prepare` returned them. Used on the event loop only."""

    def __init__(
        self,
        request: GenerateRequest,
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer,
        *,
        context_length: int,
        stream_interval: int,
        arrival: float | None = None,
        reasoning: Marks | None = None,
    ) -> None:
        self.request = request
        self.prompt_ids = prompt_ids
        self.cached_tokens = 0
        """Prompt tokens that came from a cache; set by the engine when it knows."""
        self.grammar: CompiledGrammar | None = None
        """The request's, where the backend compiles it itself; set before the job begins."""
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._arrival = monotonic() if arrival is None else arrival
        self._prepared_s = 0.0
        self._queued_s = 0.0
        self._first_token_s = 0.0
        self._engine: TokenEngine | None = None
        self._events = EventQueue()
        limits = ChoiceLimits(
            prompt_tokens=len(prompt_ids),
            context_length=context_length,
            stream_interval=stream_interval,
            reasoning=reasoning,
        )
        self._open: dict[int, Choice] = {}
        for index in range(request.output.n):
            if not request.resumed_choice(index).finished:
                self._open[index] = Choice(request, index, tokenizer, limits, prompt_ids)

    @property
    def pending(self) -> tuple[int, ...]:
        """Indices of the choices that want more tokens."""
        return tuple(self._open)

    @property
    def held_tokens(self) -> int:
        """Tokens that the engine holds keys and values of, the prompt once."""
        return len(self.prompt_ids) + sum(choice.token_count for choice in self._open.values()) if self._open else 0

    def prefix(self, index: int) -> list[int]:
        """What the engine continues for a choice: the prompt, and the output that another worker made of it."""
        return [*self.prompt_ids, *self.request.resumed_choice(index).output_token_ids]

    def max_tokens(self, index: int) -> int:
        """Tokens that the engine may still make for a choice. At least 1 while the choice is pending."""
        made = len(self.request.resumed_choice(index).output_token_ids)
        room = self._context_length - len(self.prompt_ids)
        return max(1, min(self.request.stopping.max_new_tokens, room) - made)

    def min_tokens(self, index: int) -> int:
        """Tokens before which the engine must not make an end of sequence or stop token; at most `max_tokens`.

        A request may ask for more than its prompt leaves room for; engines take that for an error.
        """
        made = len(self.request.resumed_choice(index).output_token_ids)
        return min(self.max_tokens(index), max(0, self.request.stopping.min_new_tokens - made))

    def show_prompt(self, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        """Send the prompt event if the request asks for it. Call it before the first `feed`."""
        echo = prompts.echo(self._tokenizer, self.request, self.prompt_ids, logprobs)
        if echo is not None:
            self._events.put([echo])

    def started(self, at: float | None = None) -> None:
        """The engine has begun with the prompt, at a time of the monotonic clock: its time in the queue is over."""
        self._queued_s = self._queued_s or max(0.0, (monotonic() if at is None else at) - self._arrival)

    def feed(
        self,
        index: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob] = (),
        finish_reason: FinishReason | None = None,
    ) -> None:
        """Take new tokens of a choice; see `Piece`. Does nothing for a choice that has ended."""
        choice = self._open.get(index)
        if choice is None:
            return
        if token_ids and not self._first_token_s:
            self._first_token_s = monotonic() - self._arrival
        for i, token_id in enumerate(token_ids):
            choice.push(token_id, logprobs[i] if logprobs else None)
            if choice.finish_reason is not None:
                break
        if choice.finish_reason is None and finish_reason is not None:
            choice.end(finish_reason)
        self._emit(choice, ended_by_engine=finish_reason is not None)

    def fail(self, error: Exception) -> None:
        """End the request with an error, after the events that are out."""
        self._stop_all()
        self._events.close(error)

    def _begin(self, engine: TokenEngine) -> None:
        """Choices that had their end in what was resumed end now; the rest goes to the engine."""
        self._engine = engine
        self._prepared_s = monotonic() - self._arrival
        for choice in list(self._open.values()):
            if choice.finish_reason is not None:
                self._emit(choice, ended_by_engine=True)
        if self._open:
            engine.submit(self)
        else:
            self._events.close()

    def _emit(self, choice: Choice, ended_by_engine: bool) -> None:
        events: list[Event] = []
        if choice.due and (delta := choice.delta()) is not None:
            events.append(self._with_cached(delta))
        if choice.finish_reason is not None:
            del self._open[choice.index]
            events.append(self._with_cached(choice.completion(self._timings())))
            if not ended_by_engine and self._engine is not None:
                self._engine.stop(self, choice.index)
        if events:
            self._events.put(events)
        if not self._open:
            self._events.close()

    def _with_cached(self, event: Delta | Completion) -> Delta | Completion:
        if not self.cached_tokens:
            return event
        return replace(event, usage=replace(event.usage, cached_tokens=self.cached_tokens))

    def _timings(self) -> Timings:
        return Timings(
            queued_s=self._queued_s,
            time_to_first_token_s=self._first_token_s,
            total_s=monotonic() - self._arrival,
            prepared_s=self._prepared_s,
        )

    def _stop_all(self) -> None:
        indices = self.pending
        self._open.clear()
        for index in indices:
            if self._engine is not None:
                self._engine.stop(self, index)


async def drive(job: Job, engine: TokenEngine) -> AsyncGenerator[Event, None]:
    """Run a job in an engine and yield its events. Closing the generator stops it in the engine."""
    try:
        job._begin(engine)
        async with aclosing(job._events.__aiter__()) as events:  # type: ignore[type-var]
            async for event in events:
                yield event
    finally:
        job._stop_all()


async def drive_streams(
    job: Job, open_stream: Callable[[int], AsyncGenerator[Piece, None]]
) -> AsyncGenerator[Event, None]:
    """Run a job whose choices are streams of an asynchronous engine, and yield its events.

    Args:
        open_stream: makes the stream of one choice, by index. Closing a stream must abort it in the engine;
            an exception of it fails the job. A stream that ends without a finish reason ends with ABORT.
    """
    streams = _Streams(open_stream)
    try:
        async with aclosing(drive(job, streams)) as events:
            async for event in events:
                yield event
    finally:
        await streams.close()


class _Streams:
    """One task per choice, each reading a stream. Implements TokenEngine."""

    def __init__(self, open_stream: Callable[[int], AsyncGenerator[Piece, None]]) -> None:
        self._open_stream = open_stream
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def submit(self, job: Job) -> None:
        for index in job.pending:
            self._tasks[index] = asyncio.create_task(self._read(job, index))

    def stop(self, job: Job, index: int) -> None:
        task = self._tasks[index]
        if task is not asyncio.current_task():  # the reader itself sees that its choice has ended
            task.cancel()

    async def close(self) -> None:
        """Wait until every stream is closed. `drive` has stopped them; a second cancel would cut their aborts short."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _read(self, job: Job, index: int) -> None:
        try:
            async with aclosing(self._open_stream(index)) as pieces:
                async for piece in pieces:
                    job.feed(index, piece.token_ids, piece.logprobs, piece.finish_reason)
                    if index not in job.pending:
                        return
            job.feed(index, (), finish_reason=FinishReason.ABORT)
        except Exception as error:
            job.fail(as_domain_error(error))


def as_domain_error(error: Exception) -> FastChatError:
    """A domain error as it is; any other as BackendFailed, with its kind only, since its text may quote a prompt."""
    if isinstance(error, FastChatError):
        return error
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("the engine failed with %s:\n%s", type(error).__name__, frames)
    return BackendFailed(f"the engine failed with {type(error).__name__}; its log says more")


async def prepare(tokenizer: Tokenizer, request: GenerateRequest, context_length: int) -> list[int]:
    """As `text.prompt.prepare`, off the event loop where the prompt is long."""
    return await lanes.run(lanes.characters(request.prompt), prompts.prepare, tokenizer, request, context_length)


async def tokenize(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """As `text.prompt.tokenize`, off the event loop where the prompt is long."""
    return await lanes.run(lanes.characters(prompt), prompts.tokenize, tokenizer, prompt)


async def detokenize(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Text of token ids, special tokens included; off the event loop where there are many."""
    prompts.check_token_ids("token_ids", token_ids, tokenizer.vocabulary_size)
    size = len(token_ids) * lanes.CHARACTERS_PER_TOKEN
    return await lanes.run(size, tokenizer.decode, token_ids, keep_special_tokens=True)


def token_logprob(
    tokenizer: Tokenizer, token_id: int, logprob: float | None, top: Iterable[tuple[int, float]] = ()
) -> TokenLogprob:
    """The log probability of a token, with its alternatives as (token id, log probability), likeliest first."""
    data = tokenizer.token_bytes(token_id)
    alternatives = tuple(_top_logprob(tokenizer, other, value) for other, value in top)
    return TokenLogprob(token_id, data.decode("utf-8", "replace"), data, logprob, alternatives)


def _top_logprob(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    data = tokenizer.token_bytes(token_id)
    return TopLogprob(token_id, data.decode("utf-8", "replace"), data, logprob)


class Seeds:
    """Seeds for an engine: a request's own, or random ones, which `seed` (--seed) makes repeatable."""

    def __init__(self, seed: int | None) -> None:
        self._random = random.Random(seed)

    def request_seed(self, request: GenerateRequest) -> int:
        """The seed of a request, not negative."""
        seed = request.sampling.seed
        return self._random.getrandbits(63) if seed is None else seed & INT64_MAX

    def of_choice(self, request: GenerateRequest, index: int) -> int:
        """The seed of one choice of a request."""
        return self.choice_seed(self.request_seed(request), index)

    @staticmethod
    def choice_seed(request_seed: int, index: int) -> int:
        """The seed of one choice: the first has the request's, so that n does not change it."""
        return (request_seed + index * GOLDEN) & INT64_MAX
