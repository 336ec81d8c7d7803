"""Tickets: what a gateway's requests have reserved. The picker issues them, the access log ends them."""

from __future__ import annotations

import math
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from fastchat_grpc.controller.fleet import Reservation, Worker

LIFETIME_S = 3600.0
"""A ticket whose end nobody tells is void after this time."""
ENDED_S = 15.0
"""The end of a request is remembered for this time: a question that it overtook must not open its ticket again."""


@dataclass(slots=True)
class Ticket:
    """One request of a gateway: where it is, as far as is known, and where it goes if that worker fails it.

    Attributes:
        reservation: None for a request of another controller, before it has a worker of this one.
        place: "ip:port" of the worker that `reservation` is for.
        further: workers that come next, by their places.
        journey: what a stream has been through that has lost a worker (`going_on`).
        open: whether somebody will still release what it owns.
    """

    gateway: str
    reservation: Reservation | None
    place: str
    further: dict[str, Worker]
    issued_at: float
    journey: Any = None
    open: bool = True

    def move_on(self, place: str, reservation: Reservation) -> None:
        """The request has gone on to another worker."""
        self.release()
        self.reservation, self.place = reservation, place
        self.further.pop(place, None)

    def release(self) -> None:
        """It is with no worker now."""
        if self.reservation is not None:
            self.reservation.release()


class Tickets:
    """Open tickets by name."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._open: OrderedDict[str, Ticket] = OrderedDict()
        self._ended: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def issue(self, gateway: str, reservation: Reservation, place: str, further: dict[str, Worker]) -> str:
        """Name of a new ticket, which now owns the reservation."""
        self._void_old()
        name = secrets.token_hex(12)
        self._open[name] = Ticket(gateway, reservation, place, further, self._clock())
        return name

    def adopt(self, name: str, gateway: str) -> Ticket:
        """A ticket that another controller has issued, and that is this one's, too, from now on."""
        self._void_old()
        self._open[name] = ticket = Ticket(gateway, None, "", {}, self._clock())
        return ticket

    def get(self, name: str) -> Ticket | None:
        """An open ticket; None for one that is unknown, or another controller's."""
        return self._open.get(name)

    def end(self, name: str) -> None:
        """A request has ended, of this controller or of another."""
        self.take(name)
        now = self._clock()
        self._ended[name] = now
        while self._ended[next(iter(self._ended))] < now - ENDED_S:
            self._ended.popitem(last=False)

    def has_ended(self, name: str) -> bool:
        """Whether a request has ended a short while ago."""
        return name in self._ended

    def take(self, name: str) -> Ticket | None:
        """Close a ticket and release its reservation; None for one that is unknown, or another controller's."""
        ticket = self._open.pop(name, None)
        if ticket is not None:
            ticket.open = False
            ticket.release()
        return ticket

    def void(self, gateway: str, before: float = math.inf) -> int:
        """End all tickets of a gateway that were issued before a time; returns how many."""
        names = [name for name, ticket in self._open.items() if ticket.gateway == gateway and ticket.issued_at < before]
        for name in names:
            self.take(name)
        return len(names)

    def now(self) -> float:
        """The time by which tickets are issued, in seconds."""
        return self._clock()

    def _void_old(self) -> None:
        oldest = self._clock() - LIFETIME_S
        while self._open and (name := next(iter(self._open))) and self._open[name].issued_at < oldest:
            self.take(name)
