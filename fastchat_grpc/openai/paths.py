"""Names of fields: the domain's, which errors carry, to those that the caller wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fastchat_grpc.errors import InvalidArgument

GRAMMAR = "structured_output"
_GROUPS = ("sampling.", "stopping.", "output.", "chat.")


def rename(error: InvalidArgument, renames: Mapping[str, str]) -> InvalidArgument:
    """The same error about the field of the caller's schema."""
    field = to_caller(error.field, renames)
    if field == error.field:
        return error
    renamed = InvalidArgument.__new__(type(error))
    InvalidArgument.__init__(renamed, field, error.description, metadata=error.metadata)
    renamed.retry_after_s = error.retry_after_s
    return renamed


def to_caller(path: str, renames: Mapping[str, str]) -> str:
    """Translate one path, such as `sampling.top_p` to `top_p`."""
    if path.startswith(GRAMMAR) and GRAMMAR in renames:
        return renames[GRAMMAR]
    head = path
    while head:
        if head in renames:
            return renames[head] + path[len(head) :].replace(".parts[", ".content[")
        head = head[: max(head.rfind("."), head.rfind("["), 0)]
    for group in _GROUPS:
        path = path.removeprefix(group)
    return path


@contextmanager
def renamed_errors(renames: Mapping[str, str]) -> Iterator[None]:
    """Let errors about fields name the caller's."""
    try:
        yield
    except InvalidArgument as error:
        raise rename(error, renames) from None
