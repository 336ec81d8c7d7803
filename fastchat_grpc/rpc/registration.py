"""The client side of a lease: register, heartbeat, register again, deregister.

One `Registration` keeps one server registered with one controller for as long as it runs. It never
gives up: a controller that is away, or that forgot the lease, is tried again with jittered backoff.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fastchat_grpc.config import TlsConfig
from fastchat_grpc.core import Load
from fastchat_grpc.errors import FastChatError, LeaseNotFound
from fastchat_grpc.rpc import convert
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.rpc.status import error_from_rpc
from fastchat_grpc.v1 import registry_pb2 as pb
from fastchat_grpc.v1 import registry_pb2_grpc

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
MIN_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
JITTER = 0.1
RECONNECT_OPTION = ("grpc.max_reconnect_backoff_ms", 1000)
"""A controller that restarts shall know its workers again within two intervals."""
MIN_PUSH_GAP_S = 0.1
"""Early heartbeats, sent because the load changed, keep at least this distance."""


_ANY = health_pb2.HealthCheckRequest()
"""Asks for the health of the whole server."""


@dataclass(frozen=True, slots=True)
class _Lease:
    id: str
    interval_s: float


class Registration:
    """Keeps one server registered with one controller.

    Args:
        controller_address: host:port of the controller.
        describe: builds the RegisterRequest; called at every registration, so it may change.
        load: reads the load, for registrations and heartbeats.
        on_drain: called with the time left, in seconds (None: the server's own), when the controller
            asks the server to drain.
        interval_s: overrides the heartbeat interval that the controller asks for.
        heartbeats: whether to send them; without, the server registers again whenever the controller was lost.
        metadata: sent with every call; carries the join token.
        server_name: the name that the controller's certificate is for, where the address is another.
    """

    def __init__(
        self,
        controller_address: str,
        *,
        describe: Callable[[], pb.RegisterRequest],
        load: Callable[[], Load],
        on_drain: Callable[[float | None], None] = lambda timeout_s: None,
        interval_s: float | None = None,
        heartbeats: bool = True,
        tls: TlsConfig | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        server_name: str = "",
        rng: random.Random | None = None,
    ) -> None:
        self.controller_address = controller_address
        self._describe = describe
        self._load = load
        self._on_drain = on_drain
        self._interval_s = interval_s
        self._heartbeats = heartbeats
        self._tls = tls
        self._metadata = tuple(metadata)
        self.server_name = server_name
        self._rng = rng or random.Random()
        self._lease: _Lease | None = None
        self._push = asyncio.Event()
        self._stale = False
        self._complaint = ""

    @property
    def registered(self) -> bool:
        """Whether the controller holds a lease of this server, as far as is known here."""
        return self._lease is not None

    def push(self) -> None:
        """Send the next heartbeat soon: the load has changed much."""
        self._push.set()

    def renew(self) -> None:
        """Register again soon, with the same identity: the description has changed."""
        self._stale = True
        self._push.set()

    async def run(self) -> None:
        """Register and stay registered until cancelled; then deregister."""
        options: list[tuple[str, Any]] = [RECONNECT_OPTION]
        if self._tls and self.server_name:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        async with open_channel(self.controller_address, self._tls, options=options) as channel:
            stub = registry_pb2_grpc.ControllerServiceStub(channel)
            try:
                while True:
                    self._lease = await self._register(stub)
                    if self._heartbeats:
                        await self._keep(stub, self._lease)
                    else:
                        await self._until_lost(channel)
                    self._lease = None
            finally:
                await self._deregister(stub)

    async def _register(self, stub: registry_pb2_grpc.ControllerServiceStub) -> _Lease:
        backoff_s = MIN_BACKOFF_S
        while True:
            self._stale = False
            request = self._describe()
            request.load.CopyFrom(convert.load_to_pb(self._load()))
            try:
                response = await stub.Register(request, timeout=CALL_TIMEOUT_S, metadata=self._metadata)
            except grpc.aio.AioRpcError as rpc_error:
                self._complain(error_from_rpc(rpc_error))
            else:
                self._complaint = ""
                logger.info("registered with controller %s", self.controller_address)
                return _Lease(response.lease_id, convert.seconds(response.heartbeat_interval))
            await asyncio.sleep(backoff_s * self._rng.uniform(0.5, 1.0))
            backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)

    async def _keep(self, stub: registry_pb2_grpc.ControllerServiceStub, lease: _Lease) -> None:
        """Heartbeat until the controller no longer knows the lease."""
        interval_s = lease.interval_s
        while True:
            await self._pause((self._interval_s or interval_s) * self._rng.uniform(1 - JITTER, 1 + JITTER))
            if self._stale:
                return
            request = pb.HeartbeatRequest(lease_id=lease.id, load=convert.load_to_pb(self._load()))
            try:
                response = await stub.Heartbeat(request, timeout=CALL_TIMEOUT_S, metadata=self._metadata)
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error)
                if isinstance(error, LeaseNotFound):
                    logger.info("controller %s does not know this worker; registering again", self.controller_address)
                    return
                self._complain(error)
                # A controller that is away may be back soon without its leases: ask faster than usual.
                interval_s = min(interval_s, 1.0)
                continue
            if self._complaint:
                logger.info("controller %s is back", self.controller_address)
                self._complaint = ""
            interval_s = convert.seconds(response.heartbeat_interval)
            if response.HasField("drain"):
                timed = response.drain.HasField("timeout")
                self._on_drain(convert.seconds(response.drain.timeout) if timed else None)

    async def _until_lost(self, channel: grpc.aio.Channel) -> None:
        """Without heartbeats: wait until the controller has gone, since it may come back without the lease.

        A health watch lasts as long as the controller and the connection to it; that costs nothing meanwhile.
        """
        watch = asyncio.create_task(_read_out(health_pb2_grpc.HealthStub(channel).Watch(_ANY)))
        try:
            while not watch.done() and not self._stale:
                push = asyncio.create_task(self._push.wait())
                await asyncio.wait({watch, push}, return_when=asyncio.FIRST_COMPLETED)
                push.cancel()
                self._push.clear()
        finally:
            watch.cancel()
        await asyncio.sleep(MIN_BACKOFF_S * self._rng.uniform(0.5, 1.0))

    async def _pause(self, seconds: float) -> None:
        """Wait for the next heartbeat's time, or less if a push comes."""
        await asyncio.sleep(min(MIN_PUSH_GAP_S, seconds))
        # Not wait_for: in Python 3.11 it loses a cancel that comes together with the push.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds - MIN_PUSH_GAP_S):
                await self._push.wait()
        self._push.clear()

    async def _deregister(self, stub: registry_pb2_grpc.ControllerServiceStub) -> None:
        if self._lease is None:
            return
        request = pb.DeregisterRequest(lease_id=self._lease.id)
        self._lease = None
        try:
            await stub.Deregister(request, timeout=1.0, metadata=self._metadata)
        except grpc.aio.AioRpcError as rpc_error:
            # The lease runs out by itself.
            logger.info("cannot deregister from %s: %s", self.controller_address, error_from_rpc(rpc_error).message)

    def _complain(self, error: FastChatError) -> None:
        """Say why the controller cannot be had, once for each reason."""
        if error.message != self._complaint:
            self._complaint = error.message
            logger.warning("controller %s: %s; still trying", self.controller_address, error.message)


async def _read_out(call: AsyncIterable[object]) -> None:
    """Read a call to its end, whatever that is."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass
