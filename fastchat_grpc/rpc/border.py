"""What every call passes through: keys and bounds are checked before a method runs, requests are parsed, and after
it answers are serialized and errors become statuses.

The methods of a server are wrapped once, when they are added, and found by one look into a table. A server
interceptor would do the same anew for each call, and cost it about a tenth of what an empty call costs.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from typing import Any

import grpc

from fastchat_grpc.config import MAX_MESSAGE_BYTES
from fastchat_grpc.errors import AnswerTooLarge, BackendFailed, Draining, FastChatError
from fastchat_grpc.rpc.ended import has_ended
from fastchat_grpc.rpc.limits import WATCHES, CallBounds, CallLimits
from fastchat_grpc.rpc.metering import Meter, MeteredCall
from fastchat_grpc.rpc.receiving import Context, FirstMessages, Handler, Receive, receiving
from fastchat_grpc.rpc.status import abort

logger = logging.getLogger(__name__)

Admit = Callable[[str, Any], None]
"""Raises a FastChatError for a call that is not let in; gets its full method name and its metadata."""
AdmitPeer = Callable[[str, Context], None]
"""The same of the connection; gets the call's context."""
Scope = Callable[[Context], AbstractContextManager[Any]]
"""What the method of a call runs in: it counts the call, and gets the bytes of its answers (`sent`)."""
Span = Callable[[Context], AbstractAsyncContextManager[None]]
"""What a call runs in."""


class _Uncounted:
    """A call that counts against no limit and that nobody measures."""

    sent = 0


_UNCOUNTED = nullcontext(_Uncounted())


class Border(grpc.GenericRpcHandler):
    """All methods of a server. Add services to it as if it were the server, and it to the server.

    Domain errors become statuses, for every method, in one place. Cancellation and `AbortError` pass
    untouched. An unexpected exception becomes INTERNAL; its place is logged, its message is not, since it
    may quote a prompt. An answer that grpc would not send is refused here, in words that say what to do.
    """

    def __init__(
        self,
        admit: Admit | None = None,
        bounds: CallBounds | None = None,
        admit_peer: AdmitPeer | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        meter: Meter | None = None,
    ) -> None:
        self._admit = admit
        self._meter = meter
        self._max_bytes = max_message_bytes
        self._admit_peer = admit_peer
        self._limits = CallLimits(bounds)
        self._firsts = FirstMessages(self._limits.first_message_s)
        self._endless: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._methods: dict[str, Handler] = {}
        self._generic: list[grpc.GenericRpcHandler] = []

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """Called by the generated `add_..._to_server`."""
        for name, handler in handlers.items():
            method = f"/{service}/{name}"
            self._methods[method] = self._guarded(handler, method)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Called by the generated `add_..._to_server`; stubs of old generators call nothing else."""
        self._generic += handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """Called by grpc for each call."""
        method = handler_call_details.method
        handler = self._methods.get(method) or self._find(handler_call_details)
        if handler is not None and self._admit is not None:
            try:
                self._admit(method, handler_call_details.invocation_metadata or ())
            except FastChatError as error:
                self._refused(method, error.code.name)
                return _refusal(handler, error)
        if handler is None and self._meter is not None:
            self._refused("", "UNIMPLEMENTED")
        return handler

    def _refused(self, method: str, status: str) -> None:
        """A call has ended before its method ran; one that is unknown has no name."""
        if self._meter is not None:
            meter = self._meter.of(method) if method else self._meter.unknown()
            meter.started()
            meter.ended(status, 0.0, 0)

    def _find(self, details: grpc.HandlerCallDetails) -> Handler | None:
        for generic in self._generic:
            if (handler := generic.service(details)) is not None:
                self._methods[details.method] = guarded = self._guarded(handler, details.method)
                return guarded
        return None

    def _guarded(self, handler: Handler, method: str) -> Handler:
        behaviors = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
        behavior = next(behavior for behavior in behaviors if behavior is not None)
        if self._admit_peer is not None:
            behavior = _of_peer(behavior, method, self._admit_peer)
        render = _rendering(handler.response_serializer, self._max_bytes)
        guard = _guard_stream if handler.response_streaming else _guard_unary
        receive = receiving(handler, self._firsts)
        guarded = guard(behavior, method, receive, render, self._scope(method))
        if handler.request_streaming or method in WATCHES:
            guarded = (_ending_stream if handler.response_streaming else _ending_unary)(guarded, self._until_closed)
        return _make(handler, guarded)

    def _scope(self, method: str) -> Scope:
        """What a call of a method runs in."""
        limit = self._limits.of(method)
        if self._meter is not None:
            meter = self._meter.of(method)
            return lambda context: MeteredCall(meter, limit, context)
        if limit is None:
            return lambda context: _UNCOUNTED
        return lambda context: limit.call(context.peer())

    @property
    def open_calls(self) -> int:
        """Calls under way, but for those that keep a fleet together."""
        return self._limits.open

    def close(self) -> None:
        """End the calls that would not end by themselves. A server that stops would wait for them in vain."""
        self._closed = True
        for task in self._endless:
            task.cancel()

    @asynccontextmanager
    async def _until_closed(self, context: Context) -> AsyncIterator[None]:
        """Run a call that has no end of its own: `close` ends it."""
        task = asyncio.current_task()
        assert task is not None, "calls run in tasks"
        self._endless.add(task)
        try:
            if self._closed:
                raise asyncio.CancelledError
            yield
        except asyncio.CancelledError:
            if not self._closed:
                raise
            task.uncancel()
            await abort(context, Draining("this server is shutting down"))
        finally:
            self._endless.discard(task)


def _of_peer(behavior: Callable[..., Any], method: str, admit_peer: AdmitPeer) -> Callable[..., Any]:
    def checked(request: Any, context: Context) -> Any:
        admit_peer(method, context)
        return behavior(request, context)

    return checked


def _rendering(serialize: Callable[[Any], bytes] | None, max_bytes: int) -> Callable[[Any], bytes]:
    """From answers to bytes. Raises AnswerTooLarge."""

    def rendered(answer: Any) -> bytes:
        raw = answer if serialize is None else serialize(answer)
        if len(raw) > max_bytes:
            raise AnswerTooLarge(
                f"the answer has {len(raw)} bytes, and a message has at most {max_bytes}; ask for less at a time",
                metadata={"max_message_bytes": str(max_bytes)},
            )
        return raw

    return rendered


def _unless_bytes(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes] | None:
    """The serializer of grpc's own services, which write to the context themselves; what passed the guard is bytes."""
    if serialize is None:
        return None
    return lambda answer: answer if isinstance(answer, bytes) else serialize(answer)


def _make(handler: Handler, behavior: Callable[..., Any]) -> Handler:
    """The same method with another behavior, which reads the request, or requests, from the context by itself."""
    make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    return make(behavior, None, _unless_bytes(handler.response_serializer))


def _guard_unary(
    behavior: Callable[..., Any],
    method: str,
    receive: Receive,
    render: Callable[[Any], bytes],
    scope: Scope,
) -> Callable[[Any, Context], Awaitable[Any]]:
    async def guarded(_: Any, context: Context) -> Any:
        try:
            with scope(context) as call:
                result = behavior(await receive(context), context)
                raw = render(await result if isinstance(result, Awaitable) else result)
                call.sent += len(raw)
                return raw
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _fail(context, error, method)

    return guarded


def _guard_stream(
    behavior: Callable[..., Any],
    method: str,
    receive: Receive,
    render: Callable[[Any], bytes],
    scope: Scope,
) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def guarded(_: Any, context: Context) -> AsyncIterator[Any]:
        try:
            with scope(context) as call:
                responses = behavior(await receive(context), context)
                if isinstance(
                    responses, Awaitable
                ):  # a coroutine that writes to the context itself, as in grpc's own services
                    await responses
                    return
                # A client that goes away closes this generator; the servicer's must be closed with it, not
                # whenever the garbage collector finds it.
                async with aclosing(responses):
                    async for response in responses:
                        raw = render(response)
                        call.sent += len(raw)
                        yield raw
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _fail(context, error, method)

    return guarded


def _ending_unary(guarded: Callable[[Any, Context], Any], until_closed: Span) -> Callable[[Any, Context], Any]:
    async def ending(request: Any, context: Context) -> Any:
        async with until_closed(context):
            return await guarded(request, context)

    return ending


def _ending_stream(guarded: Callable[[Any, Context], Any], until_closed: Span) -> Callable[[Any, Context], Any]:
    async def ending(request: Any, context: Context) -> AsyncIterator[Any]:
        async with until_closed(context), aclosing(guarded(request, context)) as responses:
            async for response in responses:
                yield response

    return ending


async def _fail(context: Context, error: Exception, method: str) -> None:
    """End a call with an error, unless it is over."""
    if has_ended(error):
        raise error  # nobody is there to hear of it; grpc ends the call
    await abort(context, to_domain_error(error, method))


def _refusal(handler: Handler, error: FastChatError) -> Handler:
    async def refuse(_: Any, context: Context) -> Any:
        await abort(context, error)

    async def refuse_stream(_: Any, context: Context) -> AsyncIterator[Any]:
        await abort(context, error)
        yield  # type: ignore[unreachable]  # makes it a generator, as the method's shape asks

    return _make(handler, refuse_stream if handler.response_streaming else refuse)


def to_domain_error(error: Exception, method: str) -> FastChatError:
    """The error itself if it is ours; else INTERNAL, with the place of the failure logged."""
    if isinstance(error, FastChatError):
        return error
    place = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s failed with %s\n%s", method, type(error).__name__, place)
    return BackendFailed(f"internal error ({type(error).__name__}); the server's log has its place")
