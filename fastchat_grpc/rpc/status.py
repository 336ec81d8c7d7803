"""Domain errors to gRPC statuses, and back. The one border where errors change shape."""

from __future__ import annotations

from typing import NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from fastchat_grpc import errors
from fastchat_grpc.errors import Code, FastChatError, InvalidArgument

DOMAIN = "fastchat_grpc"
STATUS_BY_CODE: dict[int, grpc.StatusCode] = {status.value[0]: status for status in grpc.StatusCode}


def _subclasses(cls: type[FastChatError]) -> list[type[FastChatError]]:
    return [cls, *(sub for child in cls.__subclasses__() for sub in _subclasses(child))]


_CLASS_BY_REASON = {cls.reason: cls for cls in _subclasses(FastChatError)}


def error_to_status(error: FastChatError) -> status_pb2.Status:
    """Build the google.rpc.Status: ErrorInfo always, BadRequest for fields, RetryInfo where a retry may help."""
    details: list[any_pb2.Any] = []

    def add(detail: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo) -> None:
        packed = any_pb2.Any()
        packed.Pack(detail)
        details.append(packed)

    add(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    if isinstance(error, InvalidArgument) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.description)
        add(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        add(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(code=int(error.code), message=error.message, details=details)


async def abort(context: grpc.aio.ServicerContext[object, object], error: FastChatError) -> NoReturn:
    """End the call with the error's status. Always raises."""
    status = rpc_status.to_status(error_to_status(error))
    await context.abort(status.code, status.details, tuple(status.trailing_metadata))
    raise AssertionError("abort returned")  # pragma: no cover


def error_from_rpc(rpc_error: grpc.aio.AioRpcError) -> FastChatError:
    """Rebuild the domain error that a peer sent; a plain status becomes a FastChatError of its code."""
    try:
        status = rpc_status.from_call(rpc_error)
    except ValueError:  # details that disagree with the status: a proxy rewrote one of them
        status = None
    if status is None:
        status = status_pb2.Status(code=rpc_error.code().value[0], message=rpc_error.details() or "")
    return error_from_status(status)


def error_from_status(status: status_pb2.Status) -> FastChatError:
    """The domain error of a status that is not OK; of one without our details, a FastChatError of its code."""
    reason, metadata, field, description = "", {}, "", status.message
    retry_after_s: float | None = None
    for detail in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad) and bad.field_violations:
            field, description = bad.field_violations[0].field, bad.field_violations[0].description
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    cls = _CLASS_BY_REASON.get(reason)
    if cls is None or int(cls.code) != status.code:
        return _plain_error(Code(status.code), status.message)
    if issubclass(cls, InvalidArgument):
        invalid = InvalidArgument.__new__(cls)
        InvalidArgument.__init__(invalid, field, description, metadata=metadata)
        return invalid
    return cls(status.message, metadata=metadata, retry_after_s=retry_after_s)


def _plain_error(code: Code, message: str) -> FastChatError:
    cls = _CLASS_BY_CODE.get(code)
    if cls is None:
        cls = type(f"Rpc{code.name.title().replace('_', '')}", (FastChatError,), {"code": code, "reason": code.name})
        _CLASS_BY_CODE[code] = cls
    return cls(message or code.name)


_CLASS_BY_CODE: dict[Code, type[FastChatError]] = {
    Code.CANCELLED: errors.Cancelled,
    Code.UNAVAILABLE: errors.WorkerUnavailable,
    Code.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    Code.UNAUTHENTICATED: errors.Unauthenticated,
    Code.PERMISSION_DENIED: errors.PermissionDenied,
    Code.UNIMPLEMENTED: errors.NotSupported,
}
