"""Signs of life of a stream whose model has said nothing yet.

A request may wait for a slot, and a long prompt takes a while. Load balancers and HTTP clients take such a stream for
dead, many after 60 s, so that it says something now and then that every reader of server-sent events skips. With the
first ping the answer has begun: its status is 200, and a gateway tries it nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 600.0
"""Seconds after which pings end, so that a server that hangs is found out."""


async def with_pings(items: AsyncGenerator[T, None], interval_s: float) -> AsyncGenerator[T | None, None]:
    """The same items, and None after every `interval_s` of silence before the first; never where that is 0."""
    if interval_s > 0:
        first = asyncio.ensure_future(anext(items))
        try:
            for _ in range(int(PATIENCE_S / interval_s)):
                done, _ = await asyncio.wait({first}, timeout=interval_s)
                if done:
                    break
                yield None
            item = await first
        except StopAsyncIteration:
            return
        finally:
            if not first.done():
                first.cancel()
                await asyncio.wait({first})
        yield item
    async for item in items:
        yield item
