"""Failover: one call carried past failing servers, without a seam in what the caller sees.

Before the first event a failed attempt is simply made elsewhere. After it, the next server is told what
the caller has already (`Resume` in generation.proto) and goes on from there. What is done when is decided by
`rpc.plan`; the loop is the same for a controller's relay, which carries raw messages, and for a client, which
carries parsed ones. They differ in their `Servers`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import monotonic
from typing import Any, Generic, Protocol, TypeVar

import grpc

from fastchat_grpc.config import FailoverConfig
from fastchat_grpc.errors import (
    DeadlineExceeded,
    FailoverExhausted,
    FastChatError,
    NoLiveWorker,
    NotResumable,
    ReaderTooSlow,
    WorkerUnavailable,
)
from fastchat_grpc.rpc.convert import duration
from fastchat_grpc.rpc.plan import Outlook, Situation, Step, next_step
from fastchat_grpc.rpc.request_ids import origin_told
from fastchat_grpc.rpc.resume import Codec, ResumeState
from fastchat_grpc.rpc.retry import RetryBudget, Verdict, judge
from fastchat_grpc.rpc.status import error_from_rpc
from fastchat_grpc.v1 import generation_pb2 as pb

T = TypeVar("T")

EOF = grpc.aio.EOF
_HARMLESS = (Verdict.STARTING, Verdict.LEAVING, Verdict.EMPTY)
"""Attempts that have cost nobody anything: they are bounded by the patience of those who wait alone."""


class Nobody(Exception):
    """No server can take the call now.

    Attributes:
        outlook: whether one may later.
        error: what the caller hears if it is not waited for.
    """

    def __init__(self, outlook: Outlook, error: FastChatError) -> None:
        super().__init__(error.message)
        self.outlook = outlook
        self.error = error


class Attempt(Generic[T]):
    """One attempt at one server: iterate over the items of its call. `close` it on every exit.

    Args:
        call: of grpc.aio, unary or streamed.
        begins: what is kept of the generation that this attempt begins; None where it goes on with one, or is unary.
    """

    def __init__(self, call: Any, begins: ResumeState[T] | None = None) -> None:
        self._call = call
        self._begins = begins
        self._read: Callable[[], Awaitable[Any]] = call.read if hasattr(call, "read") else lambda: call
        self._answered = False
        self._unread_since: float | None = None
        self._too_slow: ReaderTooSlow | None = None

    def __aiter__(self) -> Attempt[T]:
        return self

    def unread_s(self, now: float) -> float:
        """Seconds for which the caller has had an item and has not asked for the next one."""
        return 0.0 if self._unread_since is None else now - self._unread_since

    def drop(self, now: float) -> None:
        """Close it under a caller that does not read: it finds out when it reads again."""
        self._too_slow = ReaderTooSlow.after(self.unread_s(now))
        self._unread_since = None
        self.close()

    async def __anext__(self) -> T:
        """The next item. Raises the FastChatError that ended the call."""
        self._unread_since = None
        if self._too_slow is not None:
            raise self._too_slow
        try:
            item = await self._read()
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # grpc raises this, too, for a call that was cancelled by other hands than the caller's.
            raise self.cancelled() from None
        if item is EOF:
            raise StopAsyncIteration
        if not self._answered:
            self._answered = True
            if self._begins is not None:
                self._begins.learned(**origin_told(await self._call.initial_metadata()))
            self.answered()
        self._unread_since = monotonic()
        return item  # type: ignore[no-any-return]

    def answered(self) -> None:
        """The first item has come."""

    def cancelled(self) -> FastChatError:
        """Why the call was cancelled, where it was not by the caller."""
        return WorkerUnavailable("its channel was closed")

    def failed(self, error: FastChatError, verdict: Verdict) -> FastChatError:
        """The attempt ended with an error; returns the error to go on with."""
        return error

    def succeeded(self) -> None:
        """The caller has the whole answer."""

    def close(self) -> None:
        """Cancel what still runs and free what the attempt holds. Twice is harmless."""
        self._call.cancel()


class Servers(Protocol[T]):
    """Those that may take one call. Knows whom the call has tried."""

    def pick(self, call: Call[T]) -> Attempt[T]:
        """Start an attempt. Raises Nobody, or a FastChatError that is the caller's."""
        ...

    async def wait(self, call: Call[T], timeout_s: float) -> None:
        """Return when it is worth while to pick again, or after the timeout."""
        ...


class Failover:
    """Carries calls over attempts. One per relay or client: its budget is shared by all requests."""

    def __init__(self, config: FailoverConfig, rng: random.Random | None = None) -> None:
        self.config = config
        self.budget = RetryBudget(config)
        self.rng = rng or random.Random()
        self.running = 0
        """Calls under way, those that wait for a server included."""
        self.retried = 0
        """Attempts made again before the first event, since start."""
        self.resumed = 0
        """Generations continued after it, since start."""

    async def generate(
        self, request: pb.GenerateRequest, servers: Servers[T], codec: Codec[T], deadline: float | None = None
    ) -> AsyncGenerator[T, None]:
        """The events of one generation, whatever happens to the servers below it.

        Closing the generator ends the attempt that runs. `request` is not changed.

        Args:
            deadline: the caller's, in monotonic seconds.

        Raises:
            FastChatError: of the last attempt, when no other is allowed or possible.
        """
        config = self.config
        state = ResumeState(request, codec, config.max_cached_tokens, enabled=config.max_resumes > 0)
        call = Call(self, state, deadline, resumed=request.HasField("resume"))
        with self._under_way():
            while not call.complete:
                async with self._attempt(call, servers) as attempt:
                    async for item in attempt:
                        state.observe(item)
                        yield call.seen(item, codec)
                    if not state.complete:
                        raise WorkerUnavailable("the stream ended before its completion")
                    call.answered = True

    async def call(self, servers: Servers[T], deadline: float | None = None) -> T:
        """One unary call, whose attempts give one item each. Arguments and errors as `generate`."""
        call: Call[T] = Call(self, None, deadline)
        with self._under_way():
            while True:
                async with self._attempt(call, servers) as attempt:
                    item = await anext(attempt)
                    call.answered = True
                    return item

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        self.budget.request()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    @asynccontextmanager
    async def _attempt(self, call: Call[T], servers: Servers[T]) -> AsyncIterator[Attempt[T]]:
        """The next attempt of a call. An error that ends it is noted; the next one then decides what it means."""
        attempt = await call.next(servers)
        try:
            yield attempt
        except FastChatError as error:
            if not call.complete:  # else the caller has everything; how the call ended after that is no matter
                call.note(error, attempt)
        finally:
            if call.complete:
                attempt.succeeded()
            attempt.close()


class Call(Generic[T]):
    """What one call has been through: all that its next step depends on.

    Attributes:
        state: of a generation; None for a unary call.
        answered: whether a server has answered it to the end.
    """

    def __init__(
        self, owner: Failover, state: ResumeState[T] | None, deadline: float | None, *, resumed: bool = False
    ) -> None:
        self.state = state
        self.answered = False
        self._owner = owner
        self._deadline = deadline
        self._arrived_resumed = resumed
        self._patience_s = owner.config.wait_s
        self._arrival = monotonic()
        self._first_event: float | None = None
        self._made = 0
        self._attempts = 0
        self._losses = 0
        self._displaced = False
        self._funded = True
        self._last: FastChatError | None = None
        self._verdict: Verdict | None = None
        self._full: FastChatError | None = None
        self._absent: FastChatError | None = None
        self._loss: FastChatError | None = None

    @property
    def started(self) -> bool:
        """Whether the caller has seen an event."""
        return self.state is not None and self.state.started

    @property
    def complete(self) -> bool:
        """Whether the caller has everything."""
        # A request that leaves nothing to generate, or says so wrongly, is for a server to judge: it must be asked.
        return self.answered or (self.started and self.state is not None and self.state.complete)

    @property
    def displaced(self) -> bool:
        """Whether a server that had it went away: it was let in once, and may wait for room."""
        return self._displaced or self.started or self._arrived_resumed

    @property
    def verdict(self) -> Verdict | None:
        """How the last attempt ended; None before the first."""
        return self._verdict

    def remaining_s(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""
        return None if self._deadline is None else self._deadline - monotonic()

    def seen(self, item: T, codec: Codec[T]) -> T:
        """Take note of an event, and return it as the caller sees it: with durations of the whole call.

        A worker that resumed a generation knows only its own part.
        """
        if self._first_event is None:
            self._first_event = monotonic()
        self._patience_s = self._owner.config.wait_s  # it goes on: the next outage has its own patience
        if self._loss is None or not codec.completes(item):
            return item
        event = codec.decode(item)
        timings = event.completion.timings
        timings.ClearField("queued")
        timings.time_to_first_token.CopyFrom(duration(self._first_event - self._arrival))
        timings.total.CopyFrom(duration(monotonic() - self._arrival))
        return codec.encode(event)

    async def next(self, servers: Servers[T]) -> Attempt[T]:
        """The next attempt. Raises what the caller should hear where there is none."""
        while self._step(Outlook.READY) is Step.TRY:
            try:
                attempt = servers.pick(self)
            except Nobody as nobody:
                if self._step(nobody.outlook) is Step.STOP:
                    raise self._deserted(nobody) from None
            else:
                self._begin()
                return attempt
            await self._wait(servers)
        raise self._stopped()

    def note(self, error: FastChatError, attempt: Attempt[T]) -> None:
        """An attempt has failed."""
        verdict = self._verdict = judge(error, resumed=self.started or self._arrived_resumed)
        self._last = error = attempt.failed(error, verdict)
        if verdict is Verdict.FULL:
            self._full = error
        elif verdict in (Verdict.STARTING, Verdict.LEAVING, Verdict.EMPTY):
            self._absent = error  # of somebody who has, or may have, what others do not know
        self._displaced = self._displaced or verdict in (Verdict.LOST, Verdict.LEAVING)
        if self.started:
            if verdict is not Verdict.UNABLE:
                self._loss = self._loss or error
            self._losses += verdict is Verdict.LOST
        elif self._arrived_resumed:
            self._losses += verdict is Verdict.LOST  # bounded as what it is, the rest of a stream, and not charged
        elif verdict in _HARMLESS or (verdict is Verdict.FULL and self._displaced):
            self._attempts -= 1
        elif verdict is not Verdict.FINAL and self._attempts < self._owner.config.max_attempts:
            self._funded = self._owner.budget.withdraw()

    def _begin(self) -> None:
        self._made += 1
        if self.started:
            self._owner.resumed += 1
            return
        self._owner.retried += self._attempts > 0
        self._attempts += 1

    def _step(self, outlook: Outlook) -> Step:
        left_s = self.remaining_s()
        situation = Situation(
            last=self._verdict,
            started=self.started or self._arrived_resumed,
            displaced=self._displaced,
            resumable=self.state is not None and not (self.state.started and self.state.obstacle),
            attempts=self._attempts,
            losses=self._losses,
            funded=self._funded,
            patience_s=self._patience_s,
            late=left_s is not None and left_s <= 0,
        )
        return next_step(situation, outlook, self._owner.config)

    async def _wait(self, servers: Servers[T]) -> None:
        left_s = self.remaining_s()
        started = monotonic()
        try:
            await servers.wait(self, self._patience_s if left_s is None else min(self._patience_s, left_s))
        finally:
            self._patience_s -= monotonic() - started

    def _deserted(self, nobody: Nobody) -> FastChatError:
        """What the caller hears when nobody can take the call and waiting is of no use, or was of none."""
        if self._late():
            return self._too_late()
        if not self.started:
            unable = self._absent or self._last if self._verdict is Verdict.UNABLE else None
            return self._full or unable or nobody.error
        broke = "the stream broke" if self._loss is None else f"the stream broke ({self._loss.message})"
        if self._verdict is Verdict.UNABLE and self._last is not None:
            return NotResumable(f"{broke}, and the worker that was asked to go on cannot: {self._last.message}")
        if nobody.error is self._last or not isinstance(nobody.error, NoLiveWorker):
            return nobody.error
        return type(nobody.error)(f"{broke}, and to go on with it {nobody.error.message}")

    def _stopped(self) -> FastChatError:
        """What the caller hears when no further attempt is allowed; nobody above shall start over."""
        if self._late():
            return self._too_late()
        assert self._last is not None, "a call is not stopped before its first attempt"
        error = self._last
        if self._verdict is Verdict.FINAL:
            return error
        if self.state is not None and self.state.started and (why := self.state.obstacle):
            return error if self._owner.config.max_resumes == 0 else NotResumable(f"{error.message}; {why}")
        if not self.started and self._full is not None:
            return self._full
        if self._verdict is not Verdict.LOST:
            return self._absent or error
        return FailoverExhausted(f"gave up after {self._made} attempts; the last: {error.message}")

    def _late(self) -> bool:
        left_s = self.remaining_s()
        return left_s is not None and left_s <= 0

    def _too_late(self) -> FastChatError:
        why = f"; before: {self._last.message}" if self._last is not None else ""
        return DeadlineExceeded(f"the deadline passed before a server could answer{why}")
