"""Several addresses of one service, for a client: the servers of its failover.

The addresses are those of controllers, or of workers; any of them will do. A call goes to the address
that answered last, and when that fails to the others in turn. An address that was lost is tried again when a
connection to it stands: what is behind it is back, or others are picked there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, Generic, TypeVar

import grpc

from fastchat_grpc.config import TlsConfig, split_address
from fastchat_grpc.errors import ClientClosed, FastChatError, NoLiveWorker
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.rpc.failover import Attempt, Call, Nobody
from fastchat_grpc.rpc.plan import Outlook
from fastchat_grpc.rpc.resume import ResumeState
from fastchat_grpc.rpc.retry import Verdict

MIN_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0
RECONNECT = (("grpc.max_reconnect_backoff_ms", 1000),)
"""Calls wait for a server to come back no longer than seconds: so it is looked for each second."""

T = TypeVar("T")
Start = Callable[[grpc.aio.Channel, Call[Any], float | None], Any]
"""Starts a call on a channel, with a timeout in seconds."""


class AddressBook:
    """One channel per address, and which address answered last. One per client. Raises ConfigError."""

    def __init__(self, addresses: Sequence[str], tls: TlsConfig | None) -> None:
        for address in addresses:
            split_address(address)
        self._channels = {address: open_channel(address, tls, options=RECONNECT) for address in addresses}
        self._preferred = addresses[0]
        self._watches: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._channels)

    def order(self) -> list[str]:
        """All addresses, the preferred one first."""
        addresses = list(self._channels)
        first = addresses.index(self._preferred)
        return addresses[first:] + addresses[:first]

    def channel(self, address: str) -> grpc.aio.Channel:
        """The channel to an address."""
        return self._channels[address]

    def answered(self, address: str) -> None:
        """Prefer an address from now on."""
        self._preferred = address

    async def connected(self, addresses: Sequence[str], timeout_s: float) -> set[str]:
        """Those of the addresses to which a connection stands, as soon as there is one; none after the timeout.

        All when the book is closed: a call then says so.
        """
        watches = [asyncio.create_task(_connected(self._channels[address])) for address in addresses]
        self._watches.update(watches)
        try:
            await asyncio.wait(watches, timeout=max(timeout_s, 0.0), return_when=asyncio.FIRST_COMPLETED)
            return {address for address, watch in zip(addresses, watches, strict=True) if watch.done()}
        finally:
            self._watches.difference_update(watches)
            for watch in watches:
                watch.cancel()

    async def close(self) -> None:
        """Close every channel."""
        for watch in self._watches:  # which would not hear of it
            watch.cancel()
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))


async def _connected(channel: grpc.aio.Channel) -> None:
    """Return when the connection stands, or the channel is closed."""
    with suppress(grpc.aio.UsageError):  # of a channel that was closed before
        while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            await channel.wait_for_state_change(state)


class Addresses(Generic[T]):
    """The servers of one call, streaming or not, for `Failover` with the PARSED codec.

    Args:
        book: the addresses.
        start: starts the call.
    """

    def __init__(self, book: AddressBook, start: Start) -> None:
        self._book = book
        self._start = start
        self._pause_s = MIN_PAUSE_S
        self._round = book.order()
        self._next_round: list[str] = []
        self._full: list[str] = []
        self._empty: list[str] = []
        self._error: FastChatError = NoLiveWorker("there is no server to ask")

    def pick(self, call: Call[T]) -> _Attempt[T]:
        """The call at the next address. Raises Nobody when the round is over."""
        if not self._round:
            # Those that were lost, leave or start may be back later; the others have said no. While one of the former
            # is waited for, controllers without a worker are asked again: theirs may be back sooner.
            coming = self._next_round or (self._full and call.displaced)
            raise Nobody(Outlook.COMING if coming else Outlook.CLOSED, self._error)
        address = self._round.pop(0)
        try:
            running = self._start(self._book.channel(address), call, call.remaining_s())
        except grpc.aio.UsageError:
            raise ClientClosed("the client was closed during the call") from None
        return _Attempt(self, address, running, None if call.started else call.state)

    async def wait(self, call: Call[T], timeout_s: float) -> None:
        """Pause, then begin the next round, with those to which a connection stands."""
        until = monotonic() + timeout_s
        await asyncio.sleep(min(self._pause_s, timeout_s))
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        asked = self._next_round + self._full + self._empty
        there = await self._book.connected(asked, until - monotonic())
        self._round = [address for address in asked if address in there]
        self._next_round = [address for address in asked if address not in there]
        self._full.clear()
        self._empty.clear()

    def answered(self, address: str) -> None:
        """An address has answered."""
        self._book.answered(address)

    def failed(self, address: str, error: FastChatError, verdict: Verdict) -> None:
        """An attempt at an address has ended with an error."""
        self._error = error
        if verdict is Verdict.FULL:
            self._full.append(address)
        elif verdict is Verdict.EMPTY:
            self._empty.append(address)
        elif verdict in (Verdict.LOST, Verdict.LEAVING, Verdict.STARTING):
            self._next_round.append(address)


class _Attempt(Attempt[T]):
    def __init__(self, addresses: Addresses[T], address: str, call: Any, begins: ResumeState[T] | None) -> None:
        super().__init__(call, begins)
        self._addresses = addresses
        self._address = address

    def cancelled(self) -> FastChatError:
        return ClientClosed("the client was closed during the call")

    def answered(self) -> None:
        self._addresses.answered(self._address)

    def failed(self, error: FastChatError, verdict: Verdict) -> FastChatError:
        self._addresses.failed(self._address, error, verdict)
        return error
