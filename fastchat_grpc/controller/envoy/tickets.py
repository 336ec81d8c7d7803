"""Tickets: what a gateway's requests have reserved. The picker issues them, the access log ends them."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from fastchat_grpc.controller.fleet import Reservation

LIFETIME_S = 3600.0
"""A ticket whose end nobody tells is void after this time."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request of a gateway: the worker that it was sent to first, and where that is."""

    gateway: str
    reservation: Reservation
    place: str
    issued_at: float


class Tickets:
    """Open tickets by name."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._open: OrderedDict[str, Ticket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def issue(self, gateway: str, reservation: Reservation, place: str) -> str:
        """Name of a new ticket, which now owns the reservation."""
        self._void_old()
        name = secrets.token_hex(12)
        self._open[name] = Ticket(gateway, reservation, place, self._clock())
        return name

    def take(self, name: str) -> Ticket | None:
        """End a ticket and release its reservation; None for one that is unknown, or another controller's."""
        ticket = self._open.pop(name, None)
        if ticket is not None:
            ticket.reservation.release()
        return ticket

    def void(self, gateway: str) -> int:
        """End all tickets of a gateway that is gone; returns how many."""
        names = [name for name, ticket in self._open.items() if ticket.gateway == gateway]
        for name in names:
            self.take(name)
        return len(names)

    def _void_old(self) -> None:
        oldest = self._clock() - LIFETIME_S
        while self._open and (name := next(iter(self._open))) and self._open[name].issued_at < oldest:
            self.take(name)
