"""Several addresses of one service, for a client: the router of its failover.

The addresses are those of controllers, or of workers; any of them will do. A call goes to the address
that answered last, and when that fails to the others in turn. Unlike a worker that a relay picked, an
address may be tried again: what is lost behind it comes back, or others are picked there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any, Generic, TypeVar

import grpc

from fastchat_grpc.config import TlsConfig, split_address
from fastchat_grpc.errors import ClientClosed, DeadlineExceeded, FastChatError, NoLiveWorker
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.rpc.progress import Progress
from fastchat_grpc.rpc.retry import Verdict

MIN_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0

T = TypeVar("T")
Start = Callable[[grpc.aio.Channel, Progress[Any], float | None], Any]
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


class AddressRouter(Generic[T]):
    """The router of one call, streaming or not, for `Failover` with the PARSED codec.

    Args:
        book: the addresses.
        start: starts the call.
        timeout_s: the caller's deadline, from now.
        wait_s: how long to go on when every address is lost.
    """

    def __init__(self, book: AddressBook, start: Start, timeout_s: float | None, wait_s: float) -> None:
        self._book = book
        self._start = start
        self._deadline = None if timeout_s is None else monotonic() + timeout_s
        self._patience_s = wait_s
        self._pause_s = MIN_PAUSE_S
        self._round = book.order()
        self._lost: list[str] = []
        self._current = ""
        self._error: FastChatError = NoLiveWorker("there is no server to ask")

    async def next(self, progress: Progress[Any], last: Verdict | None) -> _Attempt[T]:
        """The call at the next address. Raises the last attempt's error where there is none."""
        if last is Verdict.LOST:
            self._lost.append(self._current)
        if not self._round:
            await self._next_round()
        self._current = self._round.pop(0)
        return _Attempt(self, self._start(self._book.channel(self._current), progress, self._remaining_s()))

    def answered(self) -> None:
        """The present attempt has had its first event."""
        self._book.answered(self._current)

    def failed(self, error: FastChatError) -> None:
        """The present attempt has ended with an error."""
        self._error = error

    async def _next_round(self) -> None:
        """Wait a little, then try again those that were lost; the others have said no."""
        if not self._lost or self._patience_s <= 0:
            raise self._error
        pause_s = min(self._pause_s, self._patience_s, self._remaining_s() or self._pause_s)
        await asyncio.sleep(pause_s)
        self._patience_s -= pause_s
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        self._round, self._lost = self._lost, []

    def _remaining_s(self) -> float | None:
        if self._deadline is None:
            return None
        left_s = self._deadline - monotonic()
        if left_s <= 0:
            raise DeadlineExceeded("the deadline passed before a server could answer")
        return left_s


class _Attempt(Generic[T]):
    def __init__(self, router: AddressRouter[T], call: Any) -> None:
        self._router = router
        self._call = call
        self.read: Callable[[], Awaitable[Any]] = call.read if hasattr(call, "read") else lambda: call

    def cancelled(self) -> FastChatError:
        return ClientClosed("the client was closed during the call")

    def answered(self) -> None:
        self._router.answered()

    def failed(self, error: FastChatError, verdict: Verdict) -> FastChatError:
        self._router.failed(error)
        return error

    def close(self) -> None:
        self._call.cancel()
