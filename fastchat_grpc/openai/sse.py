"""Server-sent events, as OpenAI frames them."""

from __future__ import annotations

from fastchat_grpc.errors import FastChatError
from fastchat_grpc.openai.jsonio import dumps
from fastchat_grpc.rpc.http_errors import error_object

CONTENT_TYPE = "text/event-stream"
JSON_TYPE = "application/json"
START = b"data: "
END = b"\n\n"
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
"""A comment: readers skip it."""


def event(data: bytes) -> bytes:
    """One event. JSON holds no line breaks, so one data line carries it."""
    return START + data + END


def failure(error: FastChatError) -> bytes:
    """The end of a stream that failed after its first byte, when the HTTP status is already sent."""
    return event(dumps(error_object(error))) + DONE
