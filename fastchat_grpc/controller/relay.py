"""The relay: a controller answers as a worker does, by passing each request to a worker that it picks.

Messages stay bytes. A request is read once, to learn model and session; events are read in passing, to
know what the caller has if the worker dies (see `fastchat_grpc.rpc.failover`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from fastchat_grpc.config import DispatchMethod, FailoverConfig
from fastchat_grpc.controller.dispatch import Dispatcher
from fastchat_grpc.controller.fleet import Change, ChangeKind, Reservation, Worker
from fastchat_grpc.core import Capability
from fastchat_grpc.errors import (
    Code,
    DeadlineExceeded,
    FastChatError,
    NoLiveWorker,
    QueueFull,
    RelayLoop,
    WorkerUnavailable,
)
from fastchat_grpc.rpc.failover import Failover
from fastchat_grpc.rpc.pool import ChannelPool, PooledChannel
from fastchat_grpc.rpc.progress import RAW, Progress
from fastchat_grpc.rpc.retry import Verdict
from fastchat_grpc.v1 import generation_pb2 as pb

GENERATE = "/fastchat_grpc.v1.GenerationService/Generate"
FORWARDED = frozenset({"traceparent", "tracestate", "baggage", "x-request-id"})
HOPS = "x-fastchat-grpc-hops"
MAX_HOPS = 8
AFFINITY_CHARACTERS = 256
"""Length of prompt that prefix_affinity goes by where there is no session key."""

_FAULTS = frozenset({Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """What a relayed call is about: for which model (by name), until when (monotonic seconds), with which metadata."""

    model: str
    key: str = ""
    deadline: float | None = None
    metadata: Sequence[tuple[str, str]] = ()

    def remaining_s(self) -> float | None:
        """Seconds left. Raises DeadlineExceeded when there are none."""
        if self.deadline is None:
            return None
        left = self.deadline - monotonic()
        if left <= 0:
            raise DeadlineExceeded("the deadline passed before a worker could answer")
        return left


class Relay:
    """Relays calls to workers, past those that fail. Its counters are those of its `failover`."""

    def __init__(self, dispatcher: Dispatcher, pool: ChannelPool, config: FailoverConfig) -> None:
        self.dispatcher = dispatcher
        self.pool = pool
        self.failover = Failover(config)

    def generate(self, request: pb.GenerateRequest, errand: Errand) -> AsyncGenerator[bytes, None]:
        """Serialized GenerateResponses of one generation. Close the generator to end it."""

        def start(channel: PooledChannel, progress: Progress[bytes], resumable: bool, timeout_s: float | None) -> Any:
            message = progress.request(resumable=resumable).SerializeToString()
            return channel.unary_stream(GENERATE)(message, timeout=timeout_s, metadata=errand.metadata)

        return self.failover.generate(request, _Router(self, errand, start), RAW)

    async def call(self, method: str, request: bytes, errand: Errand) -> bytes:
        """The serialized response of one unary call that may be repeated without harm."""

        def start(channel: PooledChannel, progress: Progress[bytes], resumable: bool, timeout_s: float | None) -> Any:
            return channel.unary_unary(method)(request, timeout=timeout_s, metadata=errand.metadata)

        return await self.failover.call(_Router(self, errand, start))

    def affinity_key(self, request: pb.GenerateRequest) -> str:
        """What prefix_affinity groups a request by; empty where nothing goes by it."""
        if self.dispatcher.method is not DispatchMethod.PREFIX_AFFINITY:
            return ""
        return request.session_key or _prefix(request)


def forwarded(metadata: Iterable[tuple[str, Any]] | None) -> list[tuple[str, str]]:
    """The metadata that goes on to the worker. Raises RelayLoop."""
    passed: list[tuple[str, str]] = []
    hops = 0
    for key, value in metadata or ():
        if key in FORWARDED:
            passed.append((key, value))
        elif key == HOPS and str(value).isdigit():
            hops = int(value)
    if hops >= MAX_HOPS:
        raise RelayLoop(f"the request has passed {hops} controllers; check --parent-address for a circle")
    passed.append((HOPS, str(hops + 1)))
    return passed


def _prefix(request: pb.GenerateRequest) -> str:
    match request.WhichOneof("input"):
        case "prompt":
            return request.prompt[:AFFINITY_CHARACTERS]
        case "prompt_token_ids":
            return str(request.prompt_token_ids.ids[: AFFINITY_CHARACTERS // 4])
        case "chat":
            text = ""
            for message in request.chat.messages:
                text += f"{message.role}:{message.content or ''.join(part.text for part in message.parts)}\n"
                if len(text) >= AFFINITY_CHARACTERS:
                    break
            return text[:AFFINITY_CHARACTERS]
    return ""


Start = Callable[[PooledChannel, Progress[bytes], bool, float | None], Any]


class _Router:
    """Picks the workers of one request: never one twice, and waits for one to come back where it must."""

    def __init__(self, relay: Relay, errand: Errand, start: Start) -> None:
        self._relay = relay
        self._errand = errand
        self._start = start
        self._tried: set[str] = set()
        self._patience_s = relay.failover.config.wait_s

    async def next(self, progress: Progress[bytes], last: Verdict | None) -> _Attempt:
        attempt = _Attempt(self._relay, progress)
        reservation = await self._pick(attempt, progress, last)
        self._tried.add(reservation.instance_id)
        channel = self._relay.pool.get(reservation.address)
        try:
            resumable = reservation.worker.can(self._errand.model, Capability.RESUME)
            call = self._start(channel, progress, resumable, self._errand.remaining_s())
        except BaseException:
            reservation.release()
            raise
        attempt.begin(reservation, channel, call)
        return attempt

    async def _pick(self, attempt: _Attempt, progress: Progress[bytes], last: Verdict | None) -> Reservation:
        needs = Capability.RESUME if progress.started else None
        while True:
            self._errand.remaining_s()
            try:
                return self._relay.dispatcher.pick(
                    self._errand.model, self._errand.key, self._tried, needs, attempt.move
                )
            except NoLiveWorker:
                if not self._worth_waiting(last) or not await self._change():
                    raise

    def _worth_waiting(self, last: Verdict | None) -> bool:
        if last is None:
            return self._relay.dispatcher.registry.recovering(self._errand.model)
        return last is Verdict.LOST

    async def _change(self) -> bool:
        """Wait for a worker to come, or to come back; False when patience has run out."""
        changed = asyncio.Event()

        def listen(change: Change) -> None:
            if change.kind in (ChangeKind.ADDED, ChangeKind.STATE):
                changed.set()

        unsubscribe = self._relay.dispatcher.registry.subscribe(listen)
        started = monotonic()
        left_s = self._errand.remaining_s()
        try:
            async with asyncio.timeout(self._patience_s if left_s is None else min(self._patience_s, left_s)):
                await changed.wait()
        except TimeoutError:
            return False
        finally:
            unsubscribe()
            self._patience_s -= monotonic() - started
        return True


class _Attempt:
    """One call to one worker, and the reservation that goes with it."""

    def __init__(self, relay: Relay, progress: Progress[bytes]) -> None:
        self._relay = relay
        self._progress = progress
        self._moved = False

    def begin(self, reservation: Reservation, channel: PooledChannel, call: Any) -> None:
        """The call is under way."""
        self._reservation = reservation
        self._channel = channel
        self._call = call
        self.read: Callable[[], Awaitable[Any]] = call.read if hasattr(call, "read") else lambda: call
        channel.calls += 1

    @property
    def worker(self) -> Worker:
        return self._reservation.worker

    def cancelled(self) -> FastChatError:
        if self._moved:
            return WorkerUnavailable("it gave no sign of life")
        return WorkerUnavailable("its channel was closed")

    def answered(self) -> None:
        self._reservation.succeeded()

    def failed(self, error: FastChatError, verdict: Verdict) -> FastChatError:
        self._account(error, verdict)
        if type(error) is not WorkerUnavailable:
            return error
        spec = self.worker.spec  # an error of the transport does not say whose it is
        return WorkerUnavailable(f"worker {spec.worker_id} at {spec.address}: {error.message}")

    def _account(self, error: FastChatError, verdict: Verdict) -> None:
        if self._moved or isinstance(error, NoLiveWorker):
            return
        if verdict is Verdict.LOST:
            self._reservation.suspect()
            self._reservation.failed()
        elif isinstance(error, QueueFull):
            self._relay.dispatcher.registry.full(self.worker)
        elif verdict is Verdict.REFUSED:
            self._reservation.suspect()
        elif error.code in _FAULTS:
            self._reservation.failed()

    def close(self) -> None:
        self._call.cancel()
        self._channel.calls -= 1
        self._channel.used_at = monotonic()
        self._reservation.release()

    def move(self) -> None:
        """The worker has expired, was replaced, or makes no progress: end the call if it can go on elsewhere."""
        movable = self._progress.resumable or not self._progress.started
        if movable and (self.worker.removed is not None or self._others()):
            self._moved = True
            self._call.cancel()

    def _others(self) -> bool:
        registry = self._relay.dispatcher.registry
        for model in self.worker.spec.models:
            with contextlib.suppress(FastChatError):
                if registry.pool(model.name)[1].ready.items:
                    return True
        return False
