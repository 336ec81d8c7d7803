"""One request under way on this worker: whose turn it is, the engine's or the reader's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from time import monotonic

from fastchat_grpc.core import Event
from fastchat_grpc.errors import Draining, FastChatError, ReaderTooSlow
from fastchat_grpc.worker.admission import Slot

logger = logging.getLogger(__name__)


def evicted() -> Draining:
    """Why a request that is evicted ends."""
    return Draining("this worker's time to drain is over; the request may go on elsewhere")


class Active:
    """A request that runs, or waits for its slot."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self.task = task
        self.slot: Slot | None = None
        self.events: AsyncGenerator[Event, None] | None = None
        self._unread_since: float | None = None
        self._dropping: asyncio.Task[None] | None = None
        self._why: FastChatError | None = None
        self.evicted = False
        """Whether a cancel is an eviction."""

    @property
    def awaits_engine(self) -> bool:
        """Whether the engine owes this request something."""
        return self.slot is not None and not self.slot.released and self._unread_since is None

    def unread_s(self, now: float) -> float:
        """Seconds for which an event has been waiting for the caller to read it."""
        return 0.0 if self._unread_since is None or self._dropping is not None else now - self._unread_since

    def sent(self) -> None:
        """An event goes to the caller."""
        self._unread_since = monotonic()

    def read(self) -> None:
        """The caller has taken the event. Raises why the request was ended meanwhile, if it was."""
        self._unread_since = None
        if self._why is not None:
            raise self._why

    def drop(self, now: float) -> asyncio.Task[None]:
        """Take the slot from a caller that does not read: it finds out when it reads again."""
        return self._drop(ReaderTooSlow.after(self.unread_s(now)))

    def evict(self) -> asyncio.Task[None] | None:
        """End it with Draining: at once where it waits for the engine or for its slot.

        Where an event is on its way to the caller, its task is in the hands of whoever sends it, who would lose both
        the event and the reason if it were cancelled: so the caller finds out when it comes for the next one.
        """
        if self._dropping is not None:
            return None
        if self._unread_since is not None:
            return self._drop(evicted())
        self.evicted = True
        self.task.cancel()
        return None

    def _drop(self, why: FastChatError) -> asyncio.Task[None]:
        self._why = why
        self._dropping = asyncio.get_running_loop().create_task(self._end())
        return self._dropping

    async def end(self) -> None:
        """Let the engine let go of the request, before its slot goes to another."""
        if self._dropping is not None:
            await asyncio.wait([self._dropping])
        elif self.events is not None:
            await self.events.aclose()

    async def _end(self) -> None:
        try:
            if self.events is not None:
                await self.events.aclose()
        except Exception:
            logger.exception("the backend failed to end a request that was not read")
        finally:
            if self.slot is not None:
                self.slot.release()
