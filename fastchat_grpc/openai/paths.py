"""Names of fields: the domain's, which errors carry, to those that the caller wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fastchat_grpc.errors import InvalidArgument

GRAMMAR = "structured_output"
_NAME = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")
_GROUPS = ("sampling.", "stopping.", "output.", "chat.")


def rename(error: InvalidArgument, renames: Mapping[str, str]) -> InvalidArgument:
    """The same error about the field of the caller's schema, which it also names where it speaks of other fields."""
    field = to_caller(error.field, renames)
    description = _in_callers_words(error.description, renames)
    if (field, description) == (error.field, error.description):
        return error
    renamed = InvalidArgument.__new__(type(error))
    InvalidArgument.__init__(renamed, field, description, metadata=error.metadata)
    renamed.retry_after_s = error.retry_after_s
    return renamed


def _in_callers_words(description: str, renames: Mapping[str, str]) -> str:
    """Names of two words and more, that is: `prompt` or `input` may be meant as words."""
    names = {path.rpartition(".")[2]: shown for path, shown in renames.items()}
    return _NAME.sub(lambda found: names.get(found[0], found[0]), description)


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
