"""Domain errors as OpenAI error objects. Streams send them in band; the bridge shapes statuses by the same tables."""

from __future__ import annotations

from typing import Any

from fastchat_grpc.errors import Code, FastChatError, InvalidArgument

HTTP_STATUS: dict[Code, int] = {
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.UNIMPLEMENTED: 400,  # which clients do not send again, as they do 501
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.UNAUTHENTICATED: 401,
}
"""HTTP status of each code. They are those of Envoy's transcoder, but for UNIMPLEMENTED."""
TYPE_BY_STATUS: dict[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
    499: "cancelled",
    500: "server_error",
    501: "invalid_request_error",
    502: "server_error",
    503: "server_error",
    504: "timeout_error",
}
CODE_BY_REASON: dict[str, str] = {
    "PROMPT_TOO_LONG": "context_length_exceeded",
    "UNAUTHENTICATED": "invalid_api_key",
    "QUEUE_FULL": "rate_limit_exceeded",
}
"""Codes that OpenAI's clients know; every other reason is its own code in lower case."""
PARAM_BY_REASON: dict[str, str] = {"MODEL_NOT_FOUND": "model"}


def error_object(error: FastChatError) -> dict[str, Any]:
    """The JSON object that OpenAI's clients expect, `{"error": {...}}`."""
    status = HTTP_STATUS.get(error.code, 500)
    param = error.field if isinstance(error, InvalidArgument) else PARAM_BY_REASON.get(error.reason)
    return {
        "error": {
            "message": error.message,
            "type": TYPE_BY_STATUS.get(status, "server_error"),
            "param": param or None,
            "code": CODE_BY_REASON.get(error.reason, error.reason.lower()),
        }
    }
