"""Server interceptors: what every call passes through."""

from __future__ import annotations

import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from fastchat_grpc.errors import BackendFailed, FastChatError
from fastchat_grpc.rpc.status import abort

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns domain errors into statuses, for every method, in one place.

    Cancellation and `AbortError` pass untouched. An unexpected exception becomes INTERNAL; its
    place is logged, its message is not, since it may quote a prompt.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _guard_unary(handler.unary_unary, method), handler.request_deserializer, handler.response_serializer
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream, method), handler.request_deserializer, handler.response_serializer
            )
        return handler


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


def to_domain_error(error: Exception, method: str) -> FastChatError:
    """The error itself if it is ours; else INTERNAL, with the place of the failure logged."""
    if isinstance(error, FastChatError):
        return error
    place = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s failed with %s\n%s", method, type(error).__name__, place)
    return BackendFailed(f"internal error ({type(error).__name__}); the server's log has its place")
