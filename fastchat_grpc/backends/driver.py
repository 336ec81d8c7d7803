"""Requests on their way through an engine that makes tokens by itself: a `text.job.Job` each. Shared by all backends.

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
from dataclasses import dataclass

from fastchat_grpc.backends import lanes
from fastchat_grpc.core import (
    INT64_MAX,
    Event,
    FinishReason,
    GenerateRequest,
    Prompt,
    TokenLogprob,
    TopLogprob,
)
from fastchat_grpc.errors import BackendFailed, FastChatError
from fastchat_grpc.text import prompt as prompts
from fastchat_grpc.text.job import Job, TokenEngine
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


async def drive(job: Job, engine: TokenEngine) -> AsyncGenerator[Event, None]:
    """Run a job in an engine and yield its events. Closing the generator stops it in the engine."""
    try:
        job.begin(engine)
        async with aclosing(job.events.__aiter__()) as events:  # type: ignore[type-var]
            async for event in events:
                yield event
    finally:
        job.stop()


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


async def prepare(
    tokenizer: Tokenizer, request: GenerateRequest, context_length: int, *, output_apart: bool = False
) -> list[int]:
    """As `text.prompt.prepare`, off the event loop where the prompt is long."""
    size = lanes.characters(request.prompt)
    return await lanes.run(size, prompts.prepare, tokenizer, request, context_length, output_apart=output_apart)


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
