"""What every call passes through: keys are checked before a method runs, and errors become statuses after it.

The methods of a server are wrapped once, when they are added, and found by one look into a table. A server
interceptor would do the same anew for each call, and cost it about a tenth of what an empty call costs.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from fastchat_grpc.errors import BackendFailed, FastChatError
from fastchat_grpc.rpc.status import abort

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Admit = Callable[[str, Any], None]
"""Raises a FastChatError for a call that is not let in; gets its full method name and its metadata."""


class Border(grpc.GenericRpcHandler):
    """All methods of a server. Add services to it as if it were the server, and it to the server.

    Domain errors become statuses, for every method, in one place. Cancellation and `AbortError` pass
    untouched. An unexpected exception becomes INTERNAL; its place is logged, its message is not, since it
    may quote a prompt.
    """

    def __init__(self, admit: Admit | None = None) -> None:
        self._admit = admit
        self._methods: dict[str, Handler] = {}
        self._generic: list[grpc.GenericRpcHandler] = []

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """Called by the generated `add_..._to_server`."""
        for name, handler in handlers.items():
            method = f"/{service}/{name}"
            self._methods[method] = _guarded(handler, method)

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
                return _refusal(handler, error)
        return handler

    def _find(self, details: grpc.HandlerCallDetails) -> Handler | None:
        for generic in self._generic:
            if (handler := generic.service(details)) is not None:
                self._methods[details.method] = guarded = _guarded(handler, details.method)
                return guarded
        return None


def _guarded(handler: Handler, method: str) -> Handler:
    behaviors = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    behavior = next(behavior for behavior in behaviors if behavior is not None)
    return _make(handler, (_guard_stream if handler.response_streaming else _guard_unary)(behavior, method))


def _make(handler: Handler, behavior: Callable[..., Any]) -> Handler:
    """The same method with another behavior."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(behavior, handler.request_deserializer, handler.response_serializer)


def _guard_unary(behavior: Callable[..., Any], method: str) -> Callable[[Any, Context], Awaitable[Any]]:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            result = behavior(request, context)
            return await result if isinstance(result, Awaitable) else result
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, to_domain_error(error, method))

    return guarded


def _guard_stream(behavior: Callable[..., Any], method: str) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            responses = behavior(request, context)
            if isinstance(
                responses, Awaitable
            ):  # a coroutine that writes to the context itself, as in grpc's own services
                await responses
                return
            # A client that goes away closes this generator; the servicer's must be closed with it, not
            # whenever the garbage collector finds it.
            async with aclosing(responses):
                async for response in responses:
                    yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, to_domain_error(error, method))

    return guarded


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
