"""Registrations with every controller: each address given, and each address that a name stands for."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterator, Sequence

from fastchat_grpc.config import join_address, split_address
from fastchat_grpc.rpc.registration import Registration

logger = logging.getLogger(__name__)

RESOLVE_S = 10.0
"""Names are resolved again this often, so that a controller that is added to the name is found."""

Resolve = Callable[[str], Sequence[str]]


class Registrations:
    """Keeps one Registration for each controller.

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
        self._running: dict[str, tuple[Registration, asyncio.Task[None]]] = {}

    def __iter__(self) -> Iterator[Registration]:
        return iter([registration for registration, _ in self._running.values()])

    @property
    def registered(self) -> bool:
        """Whether there is a controller, and every one holds a lease."""
        return bool(self._running) and all(registration.registered for registration in self)

    def push(self) -> None:
        """Send heartbeats soon: the load has changed much."""
        for registration in self:
            registration.push()

    def renew(self) -> None:
        """Register again soon: the description has changed."""
        for registration, _ in self._running.values():
            registration.renew()

    async def run(self) -> None:
        """Register with all and stay registered until cancelled; then deregister from all."""
        try:
            while True:
                await self._follow()
                await asyncio.sleep(self._interval_s)
        finally:
            for _, task in self._running.values():
                task.cancel()
            await asyncio.gather(*(task for _, task in self._running.values()), return_exceptions=True)
            self._running.clear()

    async def _follow(self) -> None:
        """Start registrations with controllers that are new, and end those with controllers that are gone."""
        wanted: dict[str, str] = {}
        for address in self._addresses:
            host, _ = split_address(address)
            found = await asyncio.to_thread(self._resolve, address)
            # A name that does not resolve now keeps what it had; a name of one address stays a name, so that
            # grpc resolves it itself.
            kept = [place for place, name in self._names().items() if name == host]
            places = found if len(found) > 1 else kept if not found and kept else [address]
            wanted |= dict.fromkeys(places, host)
        for place in self._running.keys() - wanted.keys():
            _, task = self._running.pop(place)
            task.cancel()
        for place in wanted.keys() - self._running.keys():
            registration = self._make(place, wanted[place])
            self._running[place] = (registration, asyncio.create_task(registration.run()))

    def _names(self) -> dict[str, str]:
        return {place: registration.server_name for place, (registration, _) in self._running.items()}


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
    except OSError:
        return []
    # A host with both families would be one controller twice.
    family = min(info[0] for info in infos)
    return sorted({join_address(str(info[4][0]), port) for info in infos if info[0] == family})
