"""Where workers are: the IP addresses of the names that they advertise, looked up again from time to time.

Each name is looked up by itself: one that is malformed, slow or late holds up no other. One that does not
resolve is tried again after half a second, then less often: a pod's name is often a moment late.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import ipaddress
import itertools
import logging
import math
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

from fastchat_grpc.config import join_address, split_address
from fastchat_grpc.errors import ConfigError
from fastchat_grpc.rpc.printable import printable

logger = logging.getLogger(__name__)

RESOLVE_S = 30.0
"""Names that resolve are looked up again this often, and those that do not, at least this often."""
FIRST_RETRY_S = 0.5
LOOKUP_TIMEOUT_S = 5.0
LOOKUPS = 32
"""Lookups at a time, of names that failed when they were last looked up and of all others each: names that hang again
and again hold up their like alone."""

Resolve = Callable[[str], Awaitable[str | None]]


class Names:
    """The "ip:port" of each address that somebody uses.

    Args:
        on_change: called when a place has come, changed or gone.
        resolve: from "host:port" to "ip:port"; None where the name does not resolve.
    """

    def __init__(self, on_change: Callable[[], None], resolve: Resolve | None = None) -> None:
        self._on_change = on_change
        self._resolve = resolve or self._ask_resolver
        self._users: Counter[str] = Counter()
        self._places: dict[str, str] = {}
        self._failures: Counter[str] = Counter()
        self._wake = asyncio.Event()
        self._usual = _Due()
        self._failing = _Due()
        self._looking: dict[str, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._users)

    def get(self, address: str) -> str | None:
        """The place of an address; None while it is not known."""
        return self._places.get(address)

    def places(self) -> dict[str, str]:
        """All places, each with the host by which it is known (the first in order, where there are several)."""
        found: dict[str, str] = {}
        for address in sorted(self._places, reverse=True):
            found[self._places[address]] = split_address(address)[0]
        return found

    def use(self, address: str) -> None:
        """Somebody is at this address. Balance it with `drop`."""
        self._users[address] += 1
        if self._users[address] > 1:
            return
        try:
            place = literal(address)
        except ConfigError as error:
            logger.error("a worker advertises an address that is none: %s", printable(str(error)))
            return
        if place is None:
            self._look_at(address, monotonic())
        else:
            self._places[address] = place  # can be used at once
            self._on_change()

    def drop(self, address: str) -> None:
        """Somebody has left this address."""
        self._users[address] -= 1
        if self._users[address] > 0:
            return
        del self._users[address]
        self._failures.pop(address, None)
        if (task := self._looking.pop(address, None)) is not None:
            task.cancel()
        if self._places.pop(address, None) is not None:
            self._on_change()

    async def run(self) -> None:
        """Look names up as they are due, until cancelled."""
        try:
            while True:
                self._wake.clear()
                for due in (self._usual, self._failing):
                    self._start_lookups(due)
                left_s = min(self._usual.next_at, self._failing.next_at) - monotonic()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left_s if left_s < math.inf else None):
                        await self._wake.wait()
        finally:
            for task in self._looking.values():
                task.cancel()
            self._looking.clear()
            for due in (self._usual, self._failing):
                due.close()

    def _look_at(self, address: str, when: float) -> None:
        self._due(address).add(address, when)
        self._wake.set()

    def _due(self, address: str) -> _Due:
        return self._failing if self._failures[address] else self._usual

    def _start_lookups(self, due: _Due) -> None:
        while due.next_at <= monotonic():
            address = due.pop()
            if address in self._users and address not in self._looking:
                due.running += 1
                self._looking[address] = asyncio.create_task(self._look_up(address, due))

    async def _look_up(self, address: str, due: _Due) -> None:
        """One lookup. A name that does not resolve now keeps the place that it had."""
        place = None
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                place = await self._resolve(address)
        except Exception as error:  # whatever a resolver does to a name, it is that name's trouble alone
            logger.debug("looking up %s: %r", printable(address), error)
        finally:
            due.running -= 1
            self._wake.set()
        self._looking.pop(address, None)
        if address not in self._users:
            return
        if place is None:
            self._failed(address)
            return
        self._failures.pop(address, None)
        self._look_at(address, monotonic() + RESOLVE_S)
        if self._places.get(address) != place:
            self._places[address] = place
            self._on_change()

    def _failed(self, address: str) -> None:
        self._failures[address] += 1
        if self._failures[address] == 1:
            logger.warning("the worker address %s does not resolve", printable(address))
        pause_s = min(RESOLVE_S, FIRST_RETRY_S * 2 ** min(self._failures[address] - 1, 10))
        self._look_at(address, monotonic() + pause_s)

    async def _ask_resolver(self, address: str) -> str | None:
        host, port = split_address(address)
        threads = self._due(address).threads
        try:
            found = await asyncio.get_running_loop().run_in_executor(threads, _addresses, host, port)
        except OSError:
            return None
        usable = [(family, ip) for family, ip in found if family in (socket.AF_INET, socket.AF_INET6)]
        if not usable:
            return None
        _, ip = min(usable, key=lambda entry: entry[0] != socket.AF_INET)
        return join_address(ip, port)


class _Due:
    """Names that are to be looked up, each at its time and LOOKUPS of them at once."""

    def __init__(self) -> None:
        self.running = 0
        self._threads: ThreadPoolExecutor | None = None
        self._names: list[tuple[float, int, str]] = []
        self._order = itertools.count()

    @property
    def next_at(self) -> float:
        """When the next lookup may begin, by the monotonic clock; never, while so many run."""
        return self._names[0][0] if self._names and self.running < LOOKUPS else math.inf

    @property
    def threads(self) -> ThreadPoolExecutor:
        """Threads for these lookups alone: one that hangs keeps its thread for longer than anybody waits for it."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(LOOKUPS, thread_name_prefix="resolver")
        return self._threads

    def close(self) -> None:
        """Leave the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def add(self, address: str, when: float) -> None:
        heapq.heappush(self._names, (when, next(self._order), address))

    def pop(self) -> str:
        return heapq.heappop(self._names)[2]


def _addresses(host: str, port: int) -> list[tuple[int, str]]:
    return [
        (family, str(where[0])) for family, _, _, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ]


def literal(address: str) -> str | None:
    """An address whose host is an IP already, in its usual form; None for a name. Raises ConfigError for neither."""
    host, port = split_address(address)
    with contextlib.suppress(ValueError):
        return join_address(str(ipaddress.ip_address(host)), port)
    return None
