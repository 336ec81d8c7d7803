"""Pages of long lists (AIP-158): a token says where the next page begins, not what the list was."""

from __future__ import annotations

import base64
import json
from hashlib import blake2b
from typing import Any

from fastchat_grpc.errors import InvalidArgument

DEFAULT_PAGE_SIZE = 500
MAX_PAGE_SIZE = 1000
MAX_PAGE_BYTES = 2 * 1024 * 1024
"""A page ends at the entry that passes this size: entries with a thousand models each are large."""
ENTRIES_AT_ONCE = 100
"""Entries that are looked at before other calls get their turn."""


def page_size(asked: int) -> int:
    """Entries of a page. Raises InvalidArgument."""
    if not 0 <= asked <= MAX_PAGE_SIZE:
        raise InvalidArgument("page_size", f"must be 0 to {MAX_PAGE_SIZE}, got {asked}")
    return asked or DEFAULT_PAGE_SIZE


class Position:
    """Where in an ordered list of names a page begins or ends, for one choice of filters.

    Args:
        filters: everything else that decides what is listed; a token of other filters is refused.
    """

    def __init__(self, *filters: Any) -> None:
        self._filters = blake2b(json.dumps(filters).encode(), digest_size=6).hexdigest()

    def after(self, token: str) -> str:
        """The name after which the page begins; empty for the first page. Raises InvalidArgument."""
        if not token:
            return ""
        try:
            filters, _, name = base64.urlsafe_b64decode(token.encode()).decode().partition(" ")
        except ValueError:
            filters = name = ""
        if filters != self._filters or not name:
            raise InvalidArgument("page_token", "is not one that this list gave for these filters")
        return name

    def token(self, name: str) -> str:
        """The token of the page after a name."""
        return base64.urlsafe_b64encode(f"{self._filters} {name}".encode()).decode()
