"""Failover: one generation carried past failing servers, without a seam in what the caller sees.

Before the first event a failed attempt is simply made elsewhere. After it, the next server is told what
the caller has already (`Resume` in generation.proto) and goes on from there. The logic is the same for a
controller's relay, which carries raw messages, and for a client, which carries parsed ones.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable
from time import monotonic
from typing import Any, Protocol, TypeVar

import grpc

from fastchat_grpc.config import FailoverConfig
from fastchat_grpc.errors import (
    FailoverExhausted,
    FastChatError,
    InvalidArgument,
    NoLiveWorker,
    QueueFull,
    WorkerUnavailable,
)
from fastchat_grpc.rpc.convert import duration
from fastchat_grpc.rpc.progress import PARSED, Codec, Progress
from fastchat_grpc.rpc.retry import RetryBudget, Verdict, judge
from fastchat_grpc.rpc.status import error_from_rpc
from fastchat_grpc.v1 import generation_pb2 as pb

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

EOF = grpc.aio.EOF


class Attempt(Protocol[T_co]):
    """One attempt at one server. `close` is called once, on every exit."""

    def read(self) -> Awaitable[T_co | Any]:
        """The next item, or EOF at a good end. Raises AioRpcError, and CancelledError where `cancelled` says why."""
        ...

    def cancelled(self) -> FastChatError:
        """Why the call was cancelled, where it was not the caller's task."""
        ...

    def answered(self) -> None:
        """The first item has come."""
        ...

    def failed(self, error: FastChatError, verdict: Verdict) -> FastChatError:
        """The attempt ended with an error; returns the error to go on with."""
        ...

    def close(self) -> None:
        """Cancel what still runs and free what the attempt holds."""
        ...


class Router(Protocol[T_co]):
    """Finds servers for the attempts of one call."""

    async def next(self, progress: Progress[Any], last: Verdict | None) -> Attempt[T_co]:
        """Start an attempt at a server that was not tried yet, with `progress.request(...)`.

        Args:
            last: how the attempt before ended; None at the first.

        Raises:
            FastChatError: there is none, or none came back in time.
        """
        ...


class Failover:
    """Carries calls over attempts. One per relay or client: its budget is shared by all requests."""

    def __init__(self, config: FailoverConfig, rng: random.Random | None = None) -> None:
        self.config = config
        self.budget = RetryBudget(config)
        self._rng = rng or random.Random()
        self.running = 0
        """Calls under way."""
        self.retried = 0
        """Attempts made again before the first event, since start."""
        self.resumed = 0
        """Generations continued after it, since start."""

    async def generate(
        self, request: pb.GenerateRequest, router: Router[T], codec: Codec[T]
    ) -> AsyncGenerator[T, None]:
        """The events of one generation, whatever happens to the servers below it.

        Closing the generator ends the attempt that runs. `request` belongs to it from now on.

        Raises:
            FastChatError: of the last attempt, when no other is allowed or possible.
        """
        config = self.config
        progress = Progress(request, codec, config.max_cached_tokens, self._rng, resumable=config.max_resumes > 0)
        tries = _Tries(self)
        watch = _Stopwatch()
        while True:
            attempt = await tries.next(router, progress)
            self.running += 1
            error: FastChatError = WorkerUnavailable("the stream ended before its completion")
            try:
                item = await attempt.read()
                if item is not EOF:
                    attempt.answered()
                    watch.first_event()
                while item is not EOF:
                    progress.observe(item)
                    if progress.resumed and codec.completes(item):
                        item = watch.corrected(item, codec)
                    yield item
                    item = await attempt.read()
            except (grpc.aio.AioRpcError, asyncio.CancelledError) as caught:
                error = _domain_error(caught, attempt)
            finally:
                self.running -= 1
                attempt.close()
            if progress.complete:
                return  # the caller has everything; how the stream ended after that is no matter
            tries.note(attempt.failed(error, judge(error)), progress)

    async def call(self, router: Router[T]) -> T:
        """One unary call, whose attempts give one item each. Errors as `generate`."""
        progress: Progress[Any] = Progress(pb.GenerateRequest(), PARSED, 0, resumable=False)
        tries = _Tries(self)
        while True:
            attempt = await tries.next(router, progress)
            self.running += 1
            try:
                item: T = await attempt.read()
                attempt.answered()
                return item
            except (grpc.aio.AioRpcError, asyncio.CancelledError) as caught:
                error = _domain_error(caught, attempt)
            finally:
                self.running -= 1
                attempt.close()
            tries.note(attempt.failed(error, judge(error)), progress)


def _domain_error(error: BaseException, attempt: Attempt[Any]) -> FastChatError:
    """What ended an attempt. A cancel of the caller's own task goes on as it is."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error_from_rpc(error)
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise error
    # grpc raises this, too, for a call that was cancelled by other hands.
    return attempt.cancelled()


class _Tries:
    """Counts the attempts of one generation and decides whether there is another."""

    def __init__(self, owner: Failover) -> None:
        self._owner = owner
        self._config = owner.config
        self._attempts = 0
        self._resumes = 0
        self._last: FastChatError | None = None
        self._full: QueueFull | None = None
        owner.budget.request()

    async def next(self, router: Router[T], progress: Progress[Any]) -> Attempt[T]:
        """The next attempt. Raises what the caller should hear where there is none."""
        self._attempts += 1
        try:
            return await router.next(progress, judge(self._last) if self._last else None)
        except NoLiveWorker:
            if self._full is not None and not progress.started:
                raise self._full from None
            raise

    def note(self, error: FastChatError, progress: Progress[Any]) -> None:
        """An attempt has failed. Raises `error` unless another may be made."""
        if progress.started and self._last is not None and isinstance(error, InvalidArgument):
            raise self._last  # the next server cannot resume: what broke the stream is the news
        self._last = error
        if isinstance(error, QueueFull):
            self._full = error
        if judge(error) is Verdict.FINAL:
            raise error
        if progress.started:
            if not progress.resumable:
                raise error
            if self._resumes >= self._config.max_resumes:
                raise self._exhausted(error)
            self._resumes += 1
            self._owner.resumed += 1
        else:
            if self._attempts >= self._config.max_attempts or not self._owner.budget.withdraw():
                raise self._exhausted(error)
            self._owner.retried += 1

    def _exhausted(self, error: FastChatError) -> FastChatError:
        """What the caller hears when no further attempt is allowed; nobody above shall start over."""
        if self._full is not None:
            return self._full
        if judge(error) is Verdict.REFUSED:
            return error
        return FailoverExhausted(f"gave up after {self._attempts} attempts; the last: {error.message}")


class _Stopwatch:
    """Durations of one generation as its caller saw them; a worker that resumed it knows only its own part."""

    def __init__(self) -> None:
        self._arrival = monotonic()
        self._first: float | None = None

    def first_event(self) -> None:
        if self._first is None:
            self._first = monotonic()

    def corrected(self, item: T, codec: Codec[T]) -> T:
        """A Completion with these durations."""
        event = codec.decode(item)
        timings = event.completion.timings
        timings.ClearField("queued")
        timings.time_to_first_token.CopyFrom(duration((self._first or self._arrival) - self._arrival))
        timings.total.CopyFrom(duration(monotonic() - self._arrival))
        return codec.encode(event)
