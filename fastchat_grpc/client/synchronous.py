"""The client for programs without an event loop: it runs one in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from fastchat_grpc.client.asynchronous import DEFAULT_ADDRESS, AsyncClient
from fastchat_grpc.client.requests import GenerateOptions, PromptLike, Result, build_request
from fastchat_grpc.config import FailoverConfig, TlsConfig
from fastchat_grpc.core import (
    ChatMessage,
    EmbedResult,
    Event,
    GenerateRequest,
)
from fastchat_grpc.errors import ClientClosed
from fastchat_grpc.v1 import generation_pb2, registry_pb2

CLOSE_S = 1.0
"""Time that calls have to end when their client is closed, before they are cancelled."""


T = TypeVar("T")


class Client:
    """The same, for code without an event loop: runs an AsyncClient on a thread of its own until `close`.

    It has the methods of AsyncClient, with the same arguments.
    """

    def __init__(
        self,
        address: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        tls: TlsConfig | None = None,
        api_key: str | None = None,
        timeout_s: float | None = None,
        failover: FailoverConfig | None = None,
    ) -> None:
        async def connect() -> AsyncClient:
            return AsyncClient(address, tls=tls, api_key=api_key, timeout_s=timeout_s, failover=failover)

        self._closed = threading.Event()
        self._streams: set[AsyncGenerator[Event, None]] = set()
        self._lock = threading.RLock()  # taken again where the garbage collector ends a stream under it
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fastchat-grpc-client", daemon=True)
        self._thread.start()
        try:
            self._client = self._run(connect())
        except BaseException:
            self._end_thread()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and end the thread; calls of other threads end with ClientClosed. Safe to call twice."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
        try:
            self._submit(self._close()).result()
        finally:
            self._end_thread()

    async def _close(self) -> None:
        for events in list(self._streams):
            with suppress(RuntimeError):  # another thread waits for its next event: it ends with the connection
                await events.aclose()
        await self._client.close()
        await _end_others()

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def stream(self, request: GenerateRequest) -> Generator[Event, None, None]:
        """As AsyncClient.stream."""
        events = self._client.stream(request)
        self._streams.add(events)
        try:
            while (event := self._run(_next(events))) is not None:
                yield event
        finally:
            self._end(events)

    def generate(
        self, prompt: PromptLike, *, model: str = "", **options: Unpack[GenerateOptions]
    ) -> Generator[Event, None, None]:
        """As AsyncClient.generate."""
        return self.stream(build_request(prompt, model, **options))

    def complete(self, prompt: PromptLike, *, model: str = "", **options: Unpack[GenerateOptions]) -> Result:
        """As AsyncClient.complete."""
        return self._run(self._client.complete(prompt, model=model, **options))

    def embed(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        model: str = "",
        truncate: bool | None = None,
        normalize: bool = True,
    ) -> EmbedResult:
        """As AsyncClient.embed."""
        return self._run(self._client.embed(inputs, model=model, truncate=truncate, normalize=normalize))

    def count_tokens(self, prompt: str | Sequence[ChatMessage], *, model: str = "") -> int:
        """As AsyncClient.count_tokens."""
        return self._run(self._client.count_tokens(prompt, model=model))

    def model_info(self, model: str = "") -> generation_pb2.GetModelInfoResponse:
        """As AsyncClient.model_info."""
        return self._run(self._client.model_info(model))

    def status(self) -> generation_pb2.GetStatusResponse:
        """As AsyncClient.status."""
        return self._run(self._client.status())

    def models(self) -> Sequence[registry_pb2.FleetModel]:
        """As AsyncClient.models."""
        return self._run(self._client.models())

    def workers(self, model: str = "") -> Sequence[registry_pb2.Worker]:
        """As AsyncClient.workers."""
        return self._run(self._client.workers(model))

    def drain_worker(
        self, worker_id: str, *, drain_timeout_s: float | None = None, join_token: str | None = None
    ) -> int:
        """As AsyncClient.drain_worker."""
        drained = self._client.drain_worker(worker_id, drain_timeout_s=drain_timeout_s, join_token=join_token)
        return self._run(drained)

    def undrain_worker(self, worker_id: str, *, join_token: str | None = None) -> None:
        """As AsyncClient.undrain_worker."""
        self._run(self._client.undrain_worker(worker_id, join_token=join_token))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._closed.is_set():
                work.close()
                raise ClientClosed("the client is closed")
            future = self._submit(work)
        try:
            return future.result()
        except BaseException as error:
            future.cancel()  # an interrupt of the caller's thread ends the call too
            if self._closed.is_set() and isinstance(error, CancelledError):
                raise ClientClosed("the client was closed during the call") from None
            raise

    def _end(self, events: AsyncGenerator[Event, None]) -> None:
        """Cancel a stream, unless its client is closed, and it with it."""
        with self._lock:
            self._streams.discard(events)
            if self._closed.is_set():
                return
            ended = self._submit(events.aclose())
        # The garbage collector may have come for it on any thread.
        if threading.current_thread() is not self._thread:
            ended.result()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


async def _end_others() -> None:
    """Wait until all other tasks of this loop have ended, since threads wait for them; cancel what does not end."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        _, left = await asyncio.wait(others, timeout=CLOSE_S)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=CLOSE_S)


async def _next(events: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(events, None)
