"""Several addresses of one service, for a client: the servers of its failover.

The addresses are those of controllers, or of workers; any of them will do. A call goes to the address
that answered last, and when that fails to the others in turn. An address that was lost is tried again after
a pause: what is behind it comes back, or others are picked there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import grpc

from fastchat_grpc.config import TlsConfig, split_address
from fastchat_grpc.errors import ClientClosed, FastChatError, NoLiveWorker
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.rpc.failover import Attempt, Call, Nobody
from fastchat_grpc.rpc.plan import Outlook
from fastchat_grpc.rpc.request_ids import FINGERPRINT
from fastchat_grpc.rpc.resume import ResumeState
from fastchat_grpc.rpc.retry import Verdict

MIN_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0

T = TypeVar("T")
Start = Callable[[grpc.aio.Channel, Call[Any], float | None], Any]
"""Starts a call on a channel, with a timeout in seconds."""


class AddressBook:
    """One channel per address, and which address answered last. One per client. Raises ConfigError."""

    def __init__(self, addresses: Sequence[str], tls: TlsConfig | None) -> None:
        for address in addresses:
            split_address(address)
        self._channels = {address: open_channel(address, tls) for address in addresses}
        self._preferred = addresses[0]

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

    async def close(self) -> None:
        """Close every channel."""
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))


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
        self._error: FastChatError = NoLiveWorker("there is no server to ask")

    def pick(self, call: Call[T]) -> _Attempt[T]:
        """The call at the next address. Raises Nobody when the round is over."""
        if not self._round:
            # Those that were lost, leave or start may be back later; the others have said no.
            raise Nobody(Outlook.COMING if self._next_round else Outlook.CLOSED, self._error)
        address = self._round.pop(0)
        running = self._start(self._book.channel(address), call, call.remaining_s())
        return _Attempt(self, address, running, None if call.started else call.state, started=call.started)

    async def wait(self, call: Call[T], timeout_s: float) -> None:
        """Pause, then begin the next round."""
        await asyncio.sleep(min(self._pause_s, timeout_s))
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        self._round, self._next_round = self._next_round, []

    def answered(self, address: str) -> None:
        """An address has answered."""
        self._book.answered(address)

    def failed(self, address: str, error: FastChatError, verdict: Verdict, *, started: bool) -> None:
        """An attempt at an address has ended with an error."""
        self._error = error
        full = started and verdict is Verdict.FULL  # a generation that has begun waits for room
        if full or verdict in (Verdict.LOST, Verdict.LEAVING, Verdict.STARTING):
            self._next_round.append(address)


class _Attempt(Attempt[T]):
    def __init__(
        self, addresses: Addresses[T], address: str, call: Any, begins: ResumeState[T] | None, *, started: bool
    ) -> None:
        super().__init__(call)
        self._begins = begins
        self._addresses = addresses
        self._address = address
        self._started = started

    async def __anext__(self) -> T:
        item = await super().__anext__()
        if self._begins is not None:
            state, self._begins = self._begins, None
            for key, value in await self._call.initial_metadata() or ():
                if key == FINGERPRINT:
                    state.begins_where("", str(value))
        return item

    def cancelled(self) -> FastChatError:
        return ClientClosed("the client was closed during the call")

    def answered(self) -> None:
        self._addresses.answered(self._address)

    def failed(self, error: FastChatError, verdict: Verdict) -> FastChatError:
        self._addresses.failed(self._address, error, verdict, started=self._started)
        return error
