"""Calls of a server, measured: what the border tells whoever counts them. Without a meter it costs nothing."""

from __future__ import annotations

import asyncio
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol

import grpc

from fastchat_grpc.errors import Code, FastChatError
from fastchat_grpc.rpc.ended import has_ended
from fastchat_grpc.rpc.limits import Limit

Context = grpc.aio.ServicerContext[Any, Any]


class MethodMeter(Protocol):
    """Counts the calls of one method."""

    def started(self) -> None:
        """A call has come."""

    def ended(self, status: str, seconds: float, sent: int) -> None:
        """A call has ended, with the name of its status; `sent`: bytes of all its answers."""


class Meter(Protocol):
    """Counts the calls of a server."""

    def of(self, method: str) -> MethodMeter:
        """The meter of a method that the server has, by its full name."""
        ...

    def unknown(self) -> MethodMeter:
        """The meter of all methods that it has not."""
        ...


class MeteredCall:
    """One call, from when its method is about to run to its end. Counts against a limit, too, if there is one."""

    __slots__ = ("_began", "_context", "_host", "_limit", "_meter", "sent")

    def __init__(self, meter: MethodMeter, limit: Limit | None, context: Context) -> None:
        self._meter = meter
        self._limit = limit
        self._context = context
        self._host = ""
        self._began = perf_counter()
        self.sent = 0

    def __enter__(self) -> MeteredCall:
        self._meter.started()
        if self._limit is not None:
            peer = self._context.peer()
            self._host = peer.rpartition(":")[0] or peer
            try:
                self._limit.enter(self._host)
            except FastChatError as error:
                self._meter.ended(error.code.name, perf_counter() - self._began, 0)
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._limit is not None:
            self._limit.leave(self._host)
        status = "OK" if error is None else status_of(error, self._context)
        self._meter.ended(status, perf_counter() - self._began, self.sent)


def status_of(error: BaseException, context: Context) -> str:
    """The name of the status with which a call ends that ends with an error."""
    if isinstance(error, FastChatError):
        return error.code.name
    if isinstance(error, grpc.aio.AbortError):
        told: Any = context.code()  # a number, whatever the types say
        return Code(int(told)).name if told is not None else "UNKNOWN"
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)) or (
        isinstance(error, Exception) and has_ended(error)
    ):
        left_s = context.time_remaining()
        return "CANCELLED" if left_s is None or left_s > 0 else "DEADLINE_EXCEEDED"
    return "INTERNAL"
