"""How a call's request is read: its first message within a bounded time, then the others as they come.

Grpc itself would wait for a message for ever, never answer a call that ends without one, and answer bytes that are
no message with UNKNOWN, and log each.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError

from fastchat_grpc.errors import InvalidArgument, RequestLate

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Receive = Callable[[Context], Awaitable[Any]]
"""Reads what a behavior takes: the request, or an iterator of them. Raises FastChatError."""

EOF = grpc.aio.EOF


class FirstMessages:
    """Reads the first messages of a server's calls.

    All of them have the same time, so one timer, for the oldest, does for all: one for each call would cost more
    than anything else that is done before its method runs.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._waiting: dict[asyncio.Task[Any], float] = {}  # calls, and until when they wait; the oldest first
        self._late: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, context: Context) -> Any:
        """The bytes of a call's first message, or EOF. Raises RequestLate."""
        task = asyncio.current_task()
        assert task is not None, "calls run in tasks"
        loop = asyncio.get_running_loop()
        self._waiting[task] = until = loop.time() + self._patience_s
        if self._timer is None:
            self._timer = loop.call_at(until, self._end_late)
        try:
            return await context.read()
        except asyncio.CancelledError:
            if task not in self._late or task.uncancel() > 0:
                raise
            raise RequestLate(f"no message came within {self._patience_s:g} s of the beginning of the call") from None
        finally:
            self._waiting.pop(task, None)
            self._late.discard(task)

    def _end_late(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._waiting:
            task, until = next(iter(self._waiting.items()))
            if until > loop.time():
                self._timer = loop.call_at(until, self._end_late)
                return
            del self._waiting[task]
            self._late.add(task)
            task.cancel()


def receiving(handler: Handler, firsts: FirstMessages) -> Receive:
    """How the request of a method is had from its call: its message, or an iterator of its messages."""
    deserialize = handler.request_deserializer or _as_it_is

    async def single(context: Context) -> Any:
        raw = await firsts.read(context)
        if raw is EOF:
            raise InvalidArgument("", "the call has ended without a request message")
        return parse_request(deserialize, raw)

    async def messages(context: Context) -> AsyncIterator[Any]:
        raw = await firsts.read(context)
        while raw is not EOF:
            yield parse_request(deserialize, raw)
            raw = await context.read()

    async def streamed(context: Context) -> Any:
        return messages(context)

    return streamed if handler.request_streaming else single


def parse_request(deserialize: Callable[[bytes], T], raw: bytes) -> T:
    """The message that a caller sent. Raises InvalidArgument for bytes that are none."""
    try:
        return deserialize(raw)
    except DecodeError:
        # Its message names the type alone; a traceback would say no more, and anybody could fill the log with them.
        raise InvalidArgument("", "the request is not a message of this method's type") from None


def _as_it_is(raw: bytes) -> bytes:
    return raw
