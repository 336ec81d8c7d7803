"""Picks that callers hold: who asks for an address alone says when the request there has ended."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict

from fastchat_grpc.controller.fleet import Reservation

PICK_TTL_S = 120.0
"""A pick that nobody releases ends by itself; from then on what runs there shows in the worker's own figures alone."""
MAX_PICKS = 100_000
"""Picks that are held; the oldest end first."""


class Picks:
    """Reservations by pick id. Ids cannot be guessed: who knows one can end the pick."""

    def __init__(self, ttl_s: float = PICK_TTL_S) -> None:
        self.ttl_s = ttl_s
        self._held: OrderedDict[str, tuple[Reservation, float]] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, reservation: Reservation) -> str:
        """Keep a reservation until it is released or too old. Returns the pick's id."""
        loop = asyncio.get_running_loop()
        pick_id = secrets.token_hex(16)
        self._held[pick_id] = (reservation, loop.time() + self.ttl_s)
        if len(self._held) > MAX_PICKS:
            self._end_oldest()
        if self._timer is None:
            self._timer = loop.call_later(self.ttl_s, self._expire)
        return pick_id

    def release(self, pick_id: str) -> None:
        """End a pick. One that is over or unknown is no error."""
        held = self._held.pop(pick_id, None)
        if held is not None:
            held[0].release()

    def close(self) -> None:
        """End all."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._held:
            self._end_oldest()

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._held:
            _, ends = next(iter(self._held.values()))
            if ends > loop.time():
                self._timer = loop.call_at(ends, self._expire)
                return
            self._end_oldest()

    def _end_oldest(self) -> None:
        _, (reservation, _) = self._held.popitem(last=False)
        reservation.release()
