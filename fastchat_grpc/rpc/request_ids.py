"""Names of requests: the caller's own, or one that the first server makes, the same at all who take part."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from fastchat_grpc.core import MAX_REQUEST_ID_LENGTH
from fastchat_grpc.rpc.bridge import RESUME_HEADER, WORKER_HEADER

REQUEST_ID = "x-request-id"
WORKER_ID = "x-fastchat-grpc-worker"
FINGERPRINT = "x-fastchat-grpc-fingerprint"
"""Of the model that answers: whoever goes on with the answer needs it before the answer's end."""
BACKEND = "x-fastchat-grpc-backend"
"""That runs it: likewise."""
_KEYS = {
    "served_by": WORKER_HEADER,
    "knows_state": RESUME_HEADER,
    "request_id": REQUEST_ID,
    "worker_id": WORKER_ID,
    "fingerprint": FINGERPRINT,
    "backend": BACKEND,
}
_ORIGIN = {FINGERPRINT: "fingerprint", BACKEND: "backend"}


def request_id(given: str, metadata: Iterable[tuple[str, Any]] | None) -> str:
    """The name of a request: as its message says, else as its metadata says, else a new one."""
    if given:
        return given
    for key, value in metadata or ():
        if key == REQUEST_ID and isinstance(value, str) and value:
            return value[:MAX_REQUEST_ID_LENGTH]
    return uuid.uuid4().hex


def told(**values: str) -> tuple[tuple[str, str], ...]:
    """Metadata that tells a caller who answers which request. What cannot be metadata, or is empty, is left out.

    Args:
        values: `request_id`, `worker_id`, `fingerprint` and `backend`; for a bridge, `served_by` is the
            worker, and `knows_state` "1".
    """
    return tuple((_KEYS[name], value) for name, value in values.items() if value and _printable(value))


def origin_told(metadata: Iterable[tuple[str, Any]] | None) -> dict[str, str]:
    """The `fingerprint` and the `backend` that `told` has put into metadata."""
    return {_ORIGIN[key]: str(value) for key, value in metadata or () if key in _ORIGIN}


def _printable(value: str) -> bool:
    return value.isascii() and value.isprintable() and value == value.strip()
