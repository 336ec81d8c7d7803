"""Several generations as one stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")
_QUEUED = 64


async def merge(generators: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yield (position of the generator, item) as items come. The first failure ends all; so does closing this."""
    if len(generators) == 1:
        async with aclosing(generators[0]) as only:
            async for event in only:
                yield 0, event
        return
    # The queue is bounded: a slow reader slows the generations down instead of filling memory.
    queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(_QUEUED)
    tasks = [asyncio.create_task(_pump(i, generator, queue)) for i, generator in enumerate(generators)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    position: int, generator: AsyncGenerator[T, None], queue: asyncio.Queue[tuple[int, T] | BaseException | None]
) -> None:
    try:
        async with aclosing(generator):
            async for item in generator:
                await queue.put((position, item))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
