"""Registrations with every controller: each address given, and each address that a name stands for."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from fastchat_grpc.config import join_address, split_address
from fastchat_grpc.rpc.registration import Registration
from fastchat_grpc.rpc.supervise import Backoff, Supervised, Supervisor

logger = logging.getLogger(__name__)

RESOLVE_S = 10.0
"""Names are resolved again this often, so that a controller that is added to the name is found."""
RESTART = Backoff(first_s=0.2, most_s=5.0)

Resolve = Callable[[str], Sequence[str]]


class Registrations:
    """Keeps one Registration for each controller, each in a task of its own that is started again if it fails.

    Args:
        addresses: host:port of controllers; a host may be a name with several addresses.
        make: makes the registration for one resolved address; the second argument is the name that
            the controller's certificate is for.
        resolve: from host:port to the addresses it stands for; blocking; empty if it is unknown now.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        make: Callable[[str, str], Registration],
        resolve: Resolve | None = None,
        interval_s: float = RESOLVE_S,
    ) -> None:
        self._addresses = addresses
        self._make = make
        self._resolve = resolve or resolve_address
        self._interval_s = interval_s
        self._places: dict[str, Sequence[str]] = {}  # what each address stands for
        self._running: dict[str, tuple[Registration, Supervised]] = {}

    def __iter__(self) -> Iterator[Registration]:
        return iter([registration for registration, _ in self._running.values()])

    @property
    def registered(self) -> bool:
        """Whether there is a controller, and every one holds a lease."""
        looked_up = self._places.keys() >= set(self._addresses)
        return bool(self._running) and looked_up and all(registration.registered for registration in self)

    def push(self, *, urgent: bool = True) -> None:
        """Send heartbeats soon: the state, or (not urgent) the load has changed."""
        for registration in self:
            registration.push(urgent=urgent)

    def renew(self) -> None:
        """Register again soon: the description has changed."""
        for registration in self:
            registration.renew()

    async def run(self) -> None:
        """Register with all and stay registered until cancelled; then deregister from all."""
        supervisor = Supervisor()
        try:
            # Each address by itself: a name that is slow to resolve holds up nobody else.
            for address in dict.fromkeys(self._addresses):
                follow = partial(self._follow, address, supervisor)
                supervisor.spawn(f"finding controllers at {address}", follow)
            await asyncio.Event().wait()
        finally:
            await supervisor.close()
            self._running.clear()
            self._places.clear()

    async def _follow(self, address: str, supervisor: Supervisor) -> None:
        """Keep registered with the controllers of one address, as its name changes."""
        host, _ = split_address(address)
        while True:
            found = await asyncio.to_thread(self._resolve, address)
            # A name that does not resolve now keeps what it had; a name of one address stays a name, so that
            # grpc resolves it itself.
            kept = [] if found else self._places.get(address, ())
            self._places[address] = found if len(found) > 1 else kept or [address]
            self._settle(host, self._places[address], supervisor)
            await asyncio.sleep(self._interval_s)

    def _settle(self, host: str, places: Sequence[str], supervisor: Supervisor) -> None:
        """Start registrations with controllers that are new, and end those with controllers that are gone."""
        for gone in self._running.keys() - {place for places in self._places.values() for place in places}:
            self._running.pop(gone)[1].cancel()
        for place in places:
            if place not in self._running:
                registration = self._make(place, host)
                task = supervisor.spawn(f"registration with {place}", registration.run, restart=RESTART)
                self._running[place] = (registration, task)


def resolve_address(address: str) -> list[str]:
    """The addresses that host:port stands for, of one family; the address itself if it is an IP."""
    host, port = split_address(address)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        return [address]
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the latter for names that are none, such as "a..b"
        return []
    # A host with both families would be one controller twice.
    family = min(info[0] for info in infos)
    return sorted({join_address(str(info[4][0]), port) for info in infos if info[0] == family})
