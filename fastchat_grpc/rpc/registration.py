"""The client side of a lease: register, heartbeat, register again, deregister.

One `Registration` keeps one server registered with one controller for as long as it runs. It never
gives up: a controller that is away, or that forgot the lease, is tried again with jittered backoff, and its
return is seen on the connection. A path that swallows packets is left for a new connection after one
heartbeat without an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fastchat_grpc.config import TlsConfig
from fastchat_grpc.core import Load
from fastchat_grpc.errors import BackendFailed, DeadlineExceeded, FastChatError, LeaseNotFound
from fastchat_grpc.rpc import convert
from fastchat_grpc.rpc.channels import CONNECT_TIMEOUT_MS, open_channel
from fastchat_grpc.rpc.pacing import JITTER, MAX_CALL_TIMEOUT_S, MIN_PUSH_GAP_S, Pace, PushBudget
from fastchat_grpc.rpc.status import error_from_rpc
from fastchat_grpc.rpc.supervise import ErrorLog
from fastchat_grpc.v1 import registry_pb2 as pb
from fastchat_grpc.v1 import registry_pb2_grpc

logger = logging.getLogger(__name__)

MIN_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
RETRY_S = 1.0
"""A controller that answers heartbeats with errors is asked at least this often."""

State = grpc.ChannelConnectivity
Stub = registry_pb2_grpc.ControllerServiceStub

_ANY = health_pb2.HealthCheckRequest()
"""Asks for the health of the whole server."""


REFUSED = {
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
}


@dataclass(frozen=True, slots=True)
class _Lease:
    id: str


class Registration:
    """Keeps one server registered with one controller.

    Args:
        controller_address: host:port of the controller.
        describe: builds the RegisterRequest; called at every registration, so it may change.
        load: reads the load, for registrations and heartbeats.
        on_drain: called with the time left, in seconds (None: the server's own), when the controller
            asks the server to drain.
        on_undrain: called when the controller takes that back, once or several times.
        interval_s: overrides the heartbeat interval that the controller asks for, unless that would lose the lease.
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
        on_undrain: Callable[[], None] = lambda: None,
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
        self._on_undrain = on_undrain
        self._interval_s = interval_s
        self._heartbeats = heartbeats
        self._tls = tls
        self._metadata = tuple(metadata)
        self.server_name = server_name
        self._rng = rng or random.Random()
        self._lease: _Lease | None = None
        self._pace = self._connected_for = Pace()
        self._backoff_s = MIN_BACKOFF_S
        self._answered_at = 0.0  # monotonic
        self._wake = asyncio.Event()
        self._stale = False  # what was described has changed
        self._back = False  # the connection stands again
        self._urgent = False
        self._pushed = False
        self._budget = PushBudget()
        self._complaint = ""
        self._faults = ErrorLog()
        self._warned = False

    @property
    def registered(self) -> bool:
        """Whether the controller holds a lease of this server, as far as is known here."""
        return self._lease is not None

    def push(self, *, urgent: bool = True) -> None:
        """Send the next heartbeat soon: the state, or (not urgent, and so within bounds) the load has changed."""
        self._pushed = True
        self._urgent = self._urgent or urgent
        self._wake.set()

    def renew(self) -> None:
        """Register again soon, with the same identity: the description has changed."""
        self._stale = True
        self.push()

    async def run(self) -> None:
        """Register and stay registered until cancelled; then deregister."""
        try:
            while True:
                async with self._connection() as channel:
                    await self._serve(channel)
        finally:
            await self._deregister()

    async def _serve(self, channel: grpc.aio.Channel) -> None:
        """Keep a lease over one connection. Returns when another one is needed, with the lease if there is one."""
        stub = Stub(channel)
        while True:
            if self._lease is None:
                self._lease = await self._register(stub, channel)
            if self._lease is None:
                return
            if self._heartbeats:
                kept = await self._keep(stub, self._lease)
                if kept:
                    return
            else:
                await self._until_lost(channel)
            self._lease = None

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[grpc.aio.Channel]:
        """A connection of its own to the controller, and a watch that wakes the lease when it is back."""
        self._connected_for = self._pace
        reconnect_ms = int(self._pace.reconnect_s * 1000)
        options = [
            # Not the connection that another channel to this address holds, which may be the one to leave.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", reconnect_ms),
            ("grpc.min_reconnect_backoff_ms", max(CONNECT_TIMEOUT_MS, reconnect_ms)),
            *self._name_options(),
        ]
        async with (
            open_channel(self.controller_address, self._tls, options=options) as channel,
            asyncio.TaskGroup() as group,
        ):
            watch = group.create_task(self._watch(channel))
            try:
                yield channel
            finally:
                watch.cancel()

    async def _watch(self, channel: grpc.aio.Channel) -> None:
        """Whenever the connection stands again: the controller may be a new one, so wake the lease.

        All workers of the controller see that at once, so each waits for a moment of its own.
        """
        state = channel.get_state(try_to_connect=True)
        while state is not State.SHUTDOWN:
            if state is State.READY:
                connected_at = monotonic()
                await asyncio.sleep(self._rng.uniform(0, self._pace.spread_s))
                if self._answered_at < connected_at:
                    self._back = True
                    self.push()
            await channel.wait_for_state_change(state)
            state = channel.get_state(try_to_connect=True)

    async def _register(self, stub: Stub, channel: grpc.aio.Channel) -> _Lease | None:
        """Register, however long it takes. None: nothing comes back on this connection."""
        while True:
            self._stale = self._back = False
            timeout_s = self._pace.call_timeout_s if self._pace.known else MAX_CALL_TIMEOUT_S
            try:
                response = await self._ask(stub.Register, self._registration, timeout_s)
            except FastChatError as error:
                self._complain(error)
                await self._before_next_try(channel)
                if isinstance(error, DeadlineExceeded):
                    return None
            else:
                self._backoff_s = MIN_BACKOFF_S
                self._complaint = ""
                logger.info("registered with controller %s", self.controller_address)
                self._learn(response)
                return _Lease(response.lease_id)

    async def _before_next_try(self, channel: grpc.aio.Channel) -> None:
        """Wait for the backoff to pass, or, where there is no connection, until the watch says that there is."""
        left_s = self._backoff_s * self._rng.uniform(0.5, 1.0)
        self._backoff_s = min(self._backoff_s * 2, MAX_BACKOFF_S)
        if channel.get_state() is not State.READY:
            left_s = max(MAX_BACKOFF_S, self._pace.spread_s)
        until = monotonic() + left_s
        while (left_s := until - monotonic()) > 0 and not self._back:
            await self._woken(left_s)

    async def _keep(self, stub: Stub, lease: _Lease) -> bool:
        """Heartbeat until the controller no longer knows the lease (False) or it needs another connection (True)."""
        pause_s = self._heartbeat_s()
        while True:
            await self._pause(pause_s * self._rng.uniform(1 - JITTER, 1 + JITTER))
            if self._stale:
                return False
            try:
                response = await self._ask(stub.Heartbeat, lambda: self._heartbeat(lease), self._pace.call_timeout_s)
            except LeaseNotFound:
                logger.info("controller %s does not know this worker; registering again", self.controller_address)
                return False
            except FastChatError as error:
                self._complain(error)
                if isinstance(error, DeadlineExceeded):
                    self.push()  # at once on the next connection: the lease may still stand
                    return True
                # A controller that is away may be back soon without its leases: ask faster than usual, but not
                # before the watch would.
                pause_s = min(self._heartbeat_s(), max(RETRY_S, self._pace.spread_s))
                continue
            if self._complaint:
                logger.info("controller %s is back", self.controller_address)
                self._complaint = ""
            self._learn(response)
            pause_s = self._heartbeat_s()
            if response.HasField("drain"):
                timed = response.drain.HasField("timeout")
                self._on_drain(convert.seconds(response.drain.timeout) if timed else None)
            elif response.undrain:
                self._on_undrain()
            if self._pace.outgrown(self._connected_for):
                return True

    def _registration(self) -> pb.RegisterRequest:
        request = self._describe()
        request.load.CopyFrom(convert.load_to_pb(self._load()))
        return request

    def _heartbeat(self, lease: _Lease) -> pb.HeartbeatRequest:
        return pb.HeartbeatRequest(lease_id=lease.id, load=convert.load_to_pb(self._load()))

    async def _ask(self, method: Callable[..., Any], build: Callable[[], Any], timeout_s: float) -> Any:
        """One call. Raises FastChatError, whatever went wrong, a fault of this server itself included."""
        try:
            response = await method(build(), timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as rpc_error:
            raise error_from_rpc(rpc_error) from None
        except Exception as error:
            if self._faults.report(self.controller_address, error) is not None:
                logger.exception("this server cannot say what it serves, or how busy it is")
            raise BackendFailed(f"cannot tell what to report ({type(error).__name__})") from None
        self._answered_at = monotonic()
        return response

    def _learn(self, response: pb.RegisterResponse | pb.HeartbeatResponse) -> None:
        """Take up what the controller asks for."""
        self._pace = Pace(convert.seconds(response.heartbeat_interval), convert.seconds(response.time_to_live))

    def _heartbeat_s(self) -> float:
        wanted_s = self._interval_s
        slow = wanted_s is not None and self._pace.too_slow(wanted_s)
        if slow and not self._warned:
            logger.warning(
                "a heartbeat each %g s would lose the lease of %g s at controller %s: sending one each %g s",
                wanted_s,
                self._pace.lease_s,
                self.controller_address,
                self._pace.interval_s,
            )
        self._warned = self._warned or slow
        return self._pace.heartbeat_s(wanted_s)

    async def _until_lost(self, channel: grpc.aio.Channel) -> None:
        """Without heartbeats: wait until the controller has gone, since it may come back without the lease.

        A health watch lasts as long as the controller and the path to it; that costs nothing meanwhile. Where the
        controller refuses one, the connection alone is watched.
        """
        watch = asyncio.create_task(_lost(health_pb2_grpc.HealthStub(channel).Watch(_ANY)))
        watch.add_done_callback(lambda _: self._wake.set())
        try:
            while not (self._stale or self._back or (watch.done() and watch.result())):
                await self._woken(None)
        finally:
            watch.cancel()
            await asyncio.wait([watch])
        await asyncio.sleep(MIN_BACKOFF_S * self._rng.uniform(0.5, 1.0))

    async def _pause(self, seconds: float) -> None:
        """Wait for the next heartbeat's time, or less if something calls for one."""
        until = monotonic() + seconds
        await asyncio.sleep(min(MIN_PUSH_GAP_S, seconds))
        interval_s = self._pace.interval_s
        while (left_s := until - monotonic()) > 0 and not self._urgent:
            if self._pushed:
                if self._budget.take(interval_s):
                    break
                left_s = min(left_s, self._budget.wait_s(interval_s))
            await self._woken(left_s)
        self._urgent = self._pushed = False

    async def _woken(self, seconds: float | None) -> None:
        """Return when something has happened, or the time is over."""
        # Not wait_for: in Python 3.11 it loses a cancel that comes together with the event.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()

    async def _deregister(self) -> None:
        """Say goodbye, on a connection of its own: the other may be the reason to leave."""
        if self._lease is None:
            return
        request = pb.DeregisterRequest(lease_id=self._lease.id)
        self._lease = None
        async with open_channel(self.controller_address, self._tls, options=self._name_options()) as channel:
            try:
                await Stub(channel).Deregister(request, timeout=1.0, metadata=self._metadata)
            except grpc.aio.AioRpcError as rpc_error:
                # The lease runs out by itself.
                message = error_from_rpc(rpc_error).message
                logger.info("cannot deregister from %s: %s", self.controller_address, message)

    def _name_options(self) -> list[tuple[str, Any]]:
        """What makes grpc expect a certificate for the controller's name, not for its address."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self._tls and self.server_name else []

    def _complain(self, error: FastChatError) -> None:
        """Say why the controller cannot be had, once for each reason."""
        if error.message != self._complaint:
            self._complaint = error.message
            logger.warning("controller %s: %s; still trying", self.controller_address, error.message)


async def _lost(call: AsyncIterable[object]) -> bool:
    """Read a health watch to its end. False: it was refused, which says nothing of the controller's life."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as rpc_error:
        return rpc_error.code() not in REFUSED
    return True
