"""The gRPC server that controllers and workers share: our services, health, reflection, channelz."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fastchat_grpc.config import ListenConfig, dial_host, join_address
from fastchat_grpc.errors import ConfigError
from fastchat_grpc.rpc.access import Access, PeerNames
from fastchat_grpc.rpc.border import Border
from fastchat_grpc.rpc.channels import SERVER_OPTIONS, server_credentials, size_options
from fastchat_grpc.rpc.ended import be_quiet_about_ended_calls
from fastchat_grpc.rpc.limits import MAX_STREAMS_PER_CONNECTION, CallBounds
from fastchat_grpc.rpc.metering import Meter
from fastchat_grpc.rpc.reflection import add_reflection

UNWIND_S = 1.0
"""Most time for calls that were cancelled to give back what they hold."""
UNWIND_LOOK_S = 0.01

LIVENESS, READINESS = "liveness", "readiness"
"""Services of the health protocol alone, for orchestrators: whether the process lives, and whether to send it work."""
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class RpcServer:
    """One listening server. Build it on the event loop, `start` it, and `stop` it once.

    Args:
        listen: where to listen, TLS, and the bound on messages.
        services: for each service its full name and the function that adds it to a server.
        access: what callers must show; None: this server has neither keys nor a token.
        bounds: how many calls may be open; None: the usual.
        meter: counts the calls; None: nobody does.
    """

    def __init__(
        self,
        listen: ListenConfig,
        services: Sequence[tuple[str, Callable[[Any], None]]],
        access: Access | None = None,
        bounds: CallBounds | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._listen = listen
        self._names = [name for name, _ in services]
        peers = PeerNames(listen.peer_sans).admit if listen.peer_sans else None
        self._border = border = Border((access or Access()).admit, bounds, peers, listen.max_message_bytes, meter)
        for _, add in services:
            add(border)
        be_quiet_about_ended_calls()
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, border)
        channelz_pb2_grpc.add_ChannelzServicer_to_server(channelz.aio.ChannelzServicer(), border)
        add_reflection([*self._names, health.SERVICE_NAME, "grpc.channelz.v1.Channelz"], border)
        streams = ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION)
        self._server = grpc.aio.server(options=[*SERVER_OPTIONS, streams, *size_options(listen.max_message_bytes)])
        self._server.add_generic_rpc_handlers((border,))
        self.port = listen.port

    @property
    def address(self) -> str:
        """host:port where this machine reaches the server."""
        return join_address(dial_host(self._listen.host), self.port)

    @property
    def listens_on(self) -> str:
        """host:port as it was asked for; the host may stand for all of this machine."""
        return join_address(self._listen.host, self.port)

    async def start(self) -> None:
        """Listen. Health says NOT_SERVING until `set_serving`. Raises ConfigError if the port is taken."""
        address = self._listen.address
        try:
            if self._listen.tls is not None and self._listen.tls.cert is not None:
                self.port = self._server.add_secure_port(address, server_credentials(self._listen.tls))
            else:
                self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {address}: the port is in use or the host is not of this machine; "
                "choose another --host or --port"
            ) from error
        await self.set_serving(False)
        await self._server.start()

    async def set_serving(self, serving: bool, *, ready: bool | None = None) -> None:
        """Tell health checks, and those who watch, whether new requests are taken.

        Args:
            ready: whether one of them could be answered now, which the service READINESS tells; None: as `serving`.
        """
        states = dict.fromkeys(("", *self._names), serving)
        states |= {LIVENESS: True, READINESS: serving if ready is None else ready}
        for name, good in states.items():
            await self._health.set(name, _SERVING if good else _NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, wait up to `grace_s` seconds for running ones, then cancel the rest.

        Grpc does not wait for what it cancels: without a moment to unwind, what calls hold is not given back
        before the process ends, and grpc logs each as an error.
        """
        await self._health.enter_graceful_shutdown()
        self._border.close()
        await self._server.stop(grace_s)
        until = monotonic() + UNWIND_S
        while self._border.open_calls and monotonic() < until:  # noqa: ASYNC110  # once in a life
            await asyncio.sleep(UNWIND_LOOK_S)

    async def wait(self) -> None:
        """Return when the server has stopped."""
        await self._server.wait_for_termination()
