"""Whose call a relayed call is, and what of its caller's goes on to the worker."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic
from typing import Any

import grpc

from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.errors import FastChatError, InvalidArgument, ModelNotFound, RelayLoop, Starting
from fastchat_grpc.openai.jsonio import parse_object
from fastchat_grpc.rpc.access import CLIENT
from fastchat_grpc.rpc.bridge import CLIENT_HEADER

FORWARDED = frozenset({"traceparent", "tracestate", "baggage", "x-request-id"})
HOPS = "x-fastchat-grpc-hops"
MAX_HOPS = 8
LOOK_S = 0.1
"""Time between two looks of a request at a controller that has just started."""

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """What a relayed call keeps of its caller's: the deadline (monotonic seconds; None: none) and the metadata."""

    deadline: float | None = None
    metadata: Sequence[tuple[str, str]] = ()


NOBODY = Caller()
CALLER: ContextVar[Caller] = ContextVar("CALLER", default=NOBODY)
"""Whose call this is, for services that reach the fleet through the GenerationPort: its methods have no context."""


def caller_of(context: Context) -> Caller:
    """Deadline and metadata that a relayed call has of its caller's. Raises RelayLoop."""
    left_s = context.time_remaining()
    return Caller(
        deadline=None if left_s is None else monotonic() + left_s,
        metadata=forwarded(context.invocation_metadata()),
    )


def forwarded(metadata: Iterable[tuple[str, Any]] | None) -> list[tuple[str, str]]:
    """The metadata that goes on to the worker. Raises RelayLoop."""
    passed: list[tuple[str, str]] = []
    hops = 0
    for key, value in metadata or ():
        if key in FORWARDED:
            passed.append((key, value))
        elif key == HOPS and str(value).isdecimal():
            hops = int(value) if len(value) < 4 else MAX_HOPS  # Python makes no number of thousands of digits
    if hops >= MAX_HOPS:
        raise RelayLoop(f"the request has passed {hops} controllers; check --parent-address for a circle")
    passed.append((HOPS, str(hops + 1)))
    if client := CLIENT.get():
        passed.append((CLIENT_HEADER, client))
    return passed


class OnBehalf:
    """A servicer of JSON methods whose calls keep deadline and metadata of their callers on the way to the worker.

    Such a servicer knows models by a list. While the controller has just started, a call waits until its model
    is known, so that nobody hears of a model that it does not exist before that can be known.

    Args:
        patience_s: how long a call waits for that.
    """

    def __init__(self, servicer: Any, registry: Registry, patience_s: float) -> None:
        self._servicer = servicer
        self._registry = registry
        self._patience_s = patience_s

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._servicer, name)
        later = self._stream_later if inspect.isasyncgenfunction(method) else self._later

        def called(request: Any, context: Context) -> Any:
            CALLER.set(caller_of(context))  # each call has a task, and so a context, of its own
            if self._registry.settled and later == self._stream_later:
                return method(request, context)
            return later(method, request, context)

        return called

    async def _later(self, method: Any, request: Any, context: Context) -> Any:
        if not self._registry.settled:
            await self._known(request)
        try:
            return await method(request, context)
        except ModelNotFound:
            for model in _models_named(request):
                self._look_up(model)
            raise

    def _look_up(self, model: str) -> None:
        """A list of what lives does not tell a model that is away from one that never was: raise what does."""
        with suppress(ModelNotFound, InvalidArgument):
            self._registry.pool(model)

    async def _stream_later(self, method: Any, request: Any, context: Context) -> AsyncIterator[Any]:
        await self._known(request)
        async with aclosing(method(request, context)) as responses:
            async for response in responses:
                yield response

    async def _known(self, request: Any) -> None:
        """Return when it is known whether the request's model is served. Raises Starting when patience ends."""
        until = monotonic() + self._patience_s
        for model in _models_named(request):
            while True:
                try:
                    self._registry.pool(model)
                except Starting:
                    if monotonic() >= until:
                        raise
                    await asyncio.sleep(LOOK_S)
                except FastChatError:
                    break
                else:
                    break


def _models_named(request: Any) -> list[str]:
    """The models that a request of the OpenAI surface names: those of its prompts, too, where each has its own."""
    named = [getattr(request, "model", None)]
    with suppress(FastChatError):
        body = parse_object(getattr(request, "data", b""))
        prompts = body.get("prompts")
        named += [body.get("model"), *(item.get("model") for item in _objects(prompts))]
    return list(dict.fromkeys(model for model in named if isinstance(model, str)))


def _objects(items: Any) -> list[dict[str, Any]]:
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
