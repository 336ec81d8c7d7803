"""What all conversions have in common."""

from __future__ import annotations

from typing import Any

from google.protobuf import duration_pb2


def duration(seconds: float) -> duration_pb2.Duration:
    """Seconds to a Duration."""
    message = duration_pb2.Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def seconds(message: duration_pb2.Duration) -> float:
    """A Duration to seconds."""
    return message.seconds + message.nanos / 1e9


def present(message: Any, *names: str) -> dict[str, Any]:
    """The optional fields that are set, for use as keyword arguments."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}
