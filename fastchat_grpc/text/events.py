"""Events on their way from an engine to a consumer that may be slower."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from fastchat_grpc.core import Delta, Event


def merge(first: Delta, second: Delta) -> Delta:
    """Two successive Deltas of one choice as one."""
    return Delta(
        index=first.index,
        text=first.text + second.text,
        reasoning=first.reasoning + second.reasoning,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        usage=second.usage,
        cumulative_text=second.cumulative_text,
    )


class EventQueue:
    """Events of one request, between the loop callback that delivers them and one consumer.

    What the consumer has not taken yet is merged, so a slow one gets fewer and larger Deltas, and the
    queue never holds more than one per choice. Used on the event loop only.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._last_delta: dict[int, int] = {}  # choice -> position in _events
        self._error: Exception | None = None
        self._closed = False
        self._ready = asyncio.Event()

    def put(self, events: Iterable[Event]) -> None:
        """Add events, in order."""
        for event in events:
            position = self._last_delta.get(event.index) if isinstance(event, Delta) else None
            if isinstance(event, Delta) and position is not None:
                waiting = self._events[position]
                assert isinstance(waiting, Delta)
                self._events[position] = merge(waiting, event)
                continue
            if isinstance(event, Delta):
                self._last_delta[event.index] = len(self._events)
            self._events.append(event)
        self._ready.set()

    def close(self, error: Exception | None = None) -> None:
        """End the stream after what is queued, with an error if one is given."""
        self._error, self._closed = error, True
        self._ready.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            await self._ready.wait()
            events, self._events = self._events, []
            self._last_delta.clear()
            if not self._closed:
                self._ready.clear()
            for event in events:
                yield event
            if self._closed and not self._events:
                if self._error is not None:
                    raise self._error
                return
