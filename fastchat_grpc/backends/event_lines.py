"""Lines of event streams (server-sent events), as their standard has them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

_END = re.compile(rb"\r\n|\n|\r(?!\Z)")
"""A carriage return at the end of what has come may be the first half of an end."""


async def lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Lines of a response's bytes, which are UTF-8 whatever its headers say.

    They end with CR, LF, or both. What else Unicode calls an end of a line (U+0085, U+2028, ...) is text: JSON has it
    inside strings, where HTTP libraries' own readers of lines cut it in two.
    """
    begun: list[bytes] = []
    async for chunk in chunks:
        held = bool(begun) and begun[-1].endswith(b"\r")
        begun.append(chunk)
        if held or b"\n" in chunk or b"\r" in chunk:
            *whole, rest = _END.split(b"".join(begun))
            for line in whole:
                yield line.decode("utf-8", "replace")
            begun = [rest]
    if last := b"".join(begun):
        yield last.removesuffix(b"\r").decode("utf-8", "replace")
