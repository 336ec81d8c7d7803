"""A pool of channels by address: opened when needed, watched while open, closed when idle.

A channel carries any number of calls, so there is one per address. Watching its state tells early that
a server is gone: a connection that breaks is tried again at once, and what comes of that is reported.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

import grpc

from fastchat_grpc.config import MAX_MESSAGE_BYTES, TlsConfig
from fastchat_grpc.rpc.channels import open_channel, tls_stamp
from fastchat_grpc.rpc.printable import printable
from fastchat_grpc.rpc.supervise import Supervised, Supervisor

IDLE_S = 300.0
LOOK_S = 30.0
"""Time between two looks for idle channels and changed certificates."""
REMIND_S = 1.0
"""That a server cannot be reached is said again so often, while it is so."""

# A channel of its own connection: one that is opened anew for a server that is back must not wait for
# the end of the old one's backoff, which grpc would share between equal channels. An attempt to connect
# whose packets are lost is given up after the time of the third option, not after 20 s.
CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 5000),
)

State = grpc.ChannelConnectivity


class PooledChannel:
    """A channel and its callables, which carry raw bytes both ways."""

    def __init__(self, address: str, channel: grpc.aio.Channel) -> None:
        self.address = address
        self.channel = channel
        self.calls = 0
        """Calls under way; the user of the pool counts them."""
        self.used_at = monotonic()
        self.reachable = True
        """What was last reported of its server."""
        self.watcher: Supervised | None = None
        self._callables: dict[str, Any] = {}

    def unary_stream(self, method: str) -> Any:
        """The multicallable of a method such as "/package.Service/Method", taking and giving bytes."""
        found = self._callables.get(method)
        if found is None:
            found = self._callables[method] = self.channel.unary_stream(method)
        return found

    def unary_unary(self, method: str) -> Any:
        """As `unary_stream`, for unary methods."""
        found = self._callables.get(method)
        if found is None:
            found = self._callables[method] = self.channel.unary_unary(method)
        return found


class ChannelPool:
    """Channels to many servers with one set of credentials. Use it on one event loop; `run` it, `close` it.

    Args:
        on_reachable: called with an address and whether its server can be reached, when that changes, and
            again and again while it cannot; with None when nobody watches any more who said that it cannot.
        supervisor: of the watches; None: one of the pool's own. Whoever gives one closes it.
    """

    def __init__(
        self,
        tls: TlsConfig | None = None,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        on_reachable: Callable[[str, bool | None], None] = lambda address, reachable: None,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._tls = tls
        self._stamp = tls_stamp(tls)
        self._max_message_bytes = max_message_bytes
        self._on_reachable = on_reachable
        self._supervisor = supervisor or Supervisor()
        self._channels: dict[str, PooledChannel] = {}
        self._leaving: list[PooledChannel] = []
        self._closing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._channels) + len(self._leaving)

    def get(self, address: str) -> PooledChannel:
        """The channel to an address, opened if there is none."""
        pooled = self._channels.get(address)
        if pooled is None:
            pooled = self._channels[address] = PooledChannel(address, self._open(address))
            name = f"watching the connection to {printable(address)}"
            pooled.watcher = self._supervisor.spawn(name, partial(self._watch, pooled))
        pooled.used_at = monotonic()
        return pooled

    async def ask(self, address: str, method: str, request: bytes, timeout_s: float) -> bytes:
        """One unary call, over the channel to the address or, where there is none, over one that is closed after it.

        Raises AioRpcError.
        """
        pooled = self._channels.get(address)
        if pooled is not None:
            pooled.calls += 1  # or the channel might be closed under it, which looks as if this task were cancelled
            try:
                return bytes(await pooled.unary_unary(method)(request, timeout=timeout_s))
            finally:
                pooled.calls -= 1
        async with self._open(address) as channel:
            call: Any = channel.unary_unary(method)
            return bytes(await call(request, timeout=timeout_s))

    def forget(self, address: str) -> None:
        """Close the channel to a server that left, or was replaced by another, once its calls have ended."""
        pooled = self._channels.pop(address, None)
        if pooled is not None:
            self._retire(pooled)
            if pooled.calls == 0:
                self._leaving.remove(pooled)
                closing = asyncio.create_task(pooled.channel.close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    async def run(self) -> None:
        """Close idle channels, take up changed certificates, and remind of who cannot be reached, until cancelled."""
        look_at = monotonic() + LOOK_S
        while True:
            await asyncio.sleep(REMIND_S)
            for pooled in list(self._channels.values()):
                if not pooled.reachable:
                    self._on_reachable(pooled.address, False)
            if monotonic() >= look_at:
                await self.look()
                look_at = monotonic() + LOOK_S

    async def look(self) -> None:
        """Look once for idle channels and changed certificates."""
        stamp = tls_stamp(self._tls)
        renewed = stamp != self._stamp
        self._stamp = stamp
        oldest = monotonic() - IDLE_S
        for address, pooled in list(self._channels.items()):
            # Who cannot be reached stays watched, or nobody would hear when that is over.
            idle = pooled.calls == 0 and pooled.used_at < oldest and pooled.reachable
            if renewed or idle:
                del self._channels[address]
                self._retire(pooled)
        await self._close_leaving()

    async def close(self) -> None:
        """Close everything; calls under way end."""
        await asyncio.gather(*self._closing)
        for pooled in [*self._channels.values(), *self._leaving]:
            self._stop_watching(pooled)
            await pooled.channel.close()
        self._channels.clear()
        self._leaving.clear()

    def _open(self, address: str) -> grpc.aio.Channel:
        return open_channel(address, self._tls, max_message_bytes=self._max_message_bytes, options=CHANNEL_OPTIONS)

    def _retire(self, pooled: PooledChannel) -> None:
        self._stop_watching(pooled)
        if not pooled.reachable:
            pooled.reachable = True
            # Not at once: the pool is told of changes by those whom this tells.
            asyncio.get_running_loop().call_soon(self._on_reachable, pooled.address, None)
        self._leaving.append(pooled)

    def _stop_watching(self, pooled: PooledChannel) -> None:
        if pooled.watcher is not None:
            pooled.watcher.cancel()
            pooled.watcher = None

    async def _close_leaving(self) -> None:
        done = [pooled for pooled in self._leaving if pooled.calls == 0]
        self._leaving = [pooled for pooled in self._leaving if pooled.calls > 0]
        for pooled in done:
            await pooled.channel.close()

    async def _watch(self, pooled: PooledChannel) -> None:
        """Report when the server becomes unreachable, and when it is back."""
        with contextlib.suppress(grpc.aio.UsageError):  # the channel was closed
            state = pooled.channel.get_state()
            while state is not State.SHUTDOWN:
                self._heard(pooled, state)
                await pooled.channel.wait_for_state_change(state)
                was, state = state, pooled.channel.get_state()
                if state is State.IDLE and was is State.READY:
                    # The connection broke. Without calls grpc would wait for the next one to find out more.
                    state = pooled.channel.get_state(try_to_connect=True)

    def _heard(self, pooled: PooledChannel, state: grpc.ChannelConnectivity) -> None:
        """Report what a state says of the server, where it is news."""
        now = state is not State.TRANSIENT_FAILURE if pooled.reachable else state is State.READY
        if now is not pooled.reachable:
            self._on_reachable(pooled.address, now)
            pooled.reachable = now  # no sooner: who fails to hear of it is told again when the watch is
