"""The controller process: a registry, a dispatcher and a relay behind one server."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc

from fastchat_grpc.config import ControllerConfig, is_loopback
from fastchat_grpc.controller.callers import OnBehalf
from fastchat_grpc.controller.dispatch import Dispatcher
from fastchat_grpc.controller.fleet import Change, ChangeKind, Removal
from fastchat_grpc.controller.generation import GenerationServicer, RelayedGeneration
from fastchat_grpc.controller.metrics import ControllerMetrics
from fastchat_grpc.controller.parents import Parents
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.controller.relay import Relay
from fastchat_grpc.controller.servicer import ControllerServicer
from fastchat_grpc.openai.servicer import OpenAIServicer
from fastchat_grpc.rpc import descriptors
from fastchat_grpc.rpc.access import Access
from fastchat_grpc.rpc.api_keys import ApiKeys
from fastchat_grpc.rpc.pool import ChannelPool
from fastchat_grpc.rpc.security import AllowedNetworks, JoinToken
from fastchat_grpc.rpc.server import RpcServer
from fastchat_grpc.rpc.supervise import Supervisor
from fastchat_grpc.v1 import openai_pb2_grpc, registry_pb2_grpc

if TYPE_CHECKING:
    from fastchat_grpc.controller.envoy.services import EnvoyServices

logger = logging.getLogger(__name__)

TICK_S = 0.25
"""Leases are looked at this often; a heartbeat or a pick looks, too."""
YOUNG_TICK_S = 0.05
"""The same while health says that requests had better go elsewhere: that shall end as soon as it may."""
STOP_GRACE_S = 1.0
DESCRIPTORS_PER_WORKER = 2
"""Its own connection, and the one to it."""


async def run(config: ControllerConfig, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, by a signal or by a parent's order to drain; then let what runs end.

    Raises ConfigError if it cannot listen.
    """
    app = ControllerApp(config, stop)
    try:
        await app.start()
        await stop.wait()
    finally:
        await app.stop()


class ControllerApp:
    """The parts of a controller, wired. Build it on the event loop; `start` once, `stop` once."""

    def __init__(self, config: ControllerConfig, stop: asyncio.Event | None = None) -> None:
        self._config = config
        self._stop = stop or asyncio.Event()
        self._drain_timeout_s = config.drain_timeout_s
        self.registry = Registry(config.lease, config.breaker)
        self._metrics = ControllerMetrics.of(config)
        self.dispatcher = (
            Dispatcher(self.registry, config.dispatch)
            if self._metrics is None
            else self._metrics.dispatcher(self.registry, config)
        )
        self._supervisor = Supervisor(self._on_health)
        self.pool = ChannelPool(
            config.worker_tls,
            max_message_bytes=config.listen.max_message_bytes,
            on_reachable=self._on_reachable,
            supervisor=self._supervisor,
        )
        self.relay = Relay(self.dispatcher, self.pool, config.failover, config.send_timeout_s)
        if self._metrics is not None:
            self.relay.attempts.meters = self._metrics.attempts
        self.generation = RelayedGeneration(self.relay)
        self.keys = ApiKeys(config.api_keys)
        self.bridge = _bridge(self.relay, self.keys, config)
        going_on = self.bridge.going_on if self.bridge is not None else None
        networks = AllowedNetworks(config.allowed_networks)
        self._servicer = ControllerServicer(self.dispatcher, self.pool, networks, going_on)
        access = Access(self.keys, JoinToken(config.join_token, *config.other_join_tokens))
        self._server = RpcServer(
            config.listen, self._services(), access, meter=self._metrics.calls if self._metrics is not None else None
        )
        self._parents: Parents | None = None
        self._well = True  # what the supervisor says
        self._draining = False
        self._serving = False  # what health says
        self._ready = False  # and whether there is a model that can be asked
        self._descriptor_limit = descriptors.UNLIMITED
        self._started = False

    @property
    def address(self) -> str:
        """host:port that the server listens on."""
        return self._server.address

    @property
    def metrics_address(self) -> str:
        """host:port of the metrics; empty where there are none."""
        return self._metrics.address if self._metrics is not None else ""

    @property
    def port(self) -> int:
        return self._server.port

    async def start(self) -> None:
        """Listen, then register with parents. Raises ConfigError."""
        self._descriptor_limit = descriptors.raise_limit()
        if self._metrics is not None:
            self._metrics.start(self.relay, self.keys, self.bridge, lambda: self._serving)
        await self._server.start()
        self._started = True
        address = self._config.advertised_address or self.address
        self.generation.identity = (self._config.worker_id or address, uuid.uuid4().hex)
        self.registry.subscribe(self._on_change)
        spawn = self._supervisor.spawn
        spawn("looking at leases", self._tick)
        spawn("looking at channels", self.pool.run)
        spawn("looking at readers", self.relay.run)
        if self.bridge is not None:
            spawn("endpoint discovery", self.bridge.run)
        if self._config.parent_addresses:
            self._parents = Parents(self._config, self.registry, self.generation, address, self._drain_ordered)
            spawn("registration with parents", self._parents.run)
        await self._tell_health()
        logger.info("controller listens on %s", self._server.listens_on)
        if self._config.join_token is None and not is_loopback(self._config.listen.host):
            logger.warning(
                "no join token: whoever reaches %s can register a worker and is sent prompts; set --join-token-file",
                self._server.listens_on,
            )

    async def stop(self) -> None:
        """Refuse new requests, let those under way end, then free everything."""
        if self._started:
            await self._drain()
        await self._supervisor.close()
        self._servicer.close()
        if self.bridge is not None:
            self.bridge.close()
        await self._server.stop(STOP_GRACE_S)
        await self.pool.close()
        if self._metrics is not None:
            self._metrics.stop()
        if self._started:
            logger.info("controller stopped")

    def _services(self) -> list[tuple[str, Callable[[grpc.aio.Server], None]]]:
        return [
            (
                "fastchat_grpc.v1.ControllerService",
                lambda server: registry_pb2_grpc.add_ControllerServiceServicer_to_server(self._servicer, server),
            ),
            ("fastchat_grpc.v1.GenerationService", GenerationServicer(self.relay, self.generation).add_to),
            (
                "fastchat_grpc.v1.OpenAIService",
                lambda server: openai_pb2_grpc.add_OpenAIServiceServicer_to_server(
                    OnBehalf(
                        OpenAIServicer(
                            self.generation, strict_fields=self._config.strict_fields, ping_s=self._config.sse_ping_s
                        ),
                        self.registry,
                        self._config.failover.wait_s,
                    ),
                    server,
                ),
            ),
            *(self.bridge.services() if self.bridge is not None else ()),
        ]

    async def _drain(self) -> None:
        self._draining = True
        await self._tell_health()
        self.generation.close()
        if self._parents is not None:
            self._parents.push()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_timeout_s):
                await self.generation.idle()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S if self._serving else YOUNG_TICK_S)
            self.registry.expire()
            await self._tell_health()

    async def _on_health(self, well: bool) -> None:
        self._well = well
        await self._tell_health()

    async def _tell_health(self) -> None:
        """Tell health checks whether requests had better come here: not to a controller that knows nobody yet."""
        serving = self._well and not self._draining and self.registry.serving
        ready = serving and self.registry.pickable
        if (serving, ready) != (self._serving, self._ready):
            self._serving, self._ready = serving, ready
            await self._server.set_serving(serving, ready=ready)

    def _on_change(self, change: Change) -> None:
        worker = change.worker
        if change.kind is ChangeKind.ADDED:
            logger.info("worker %s registered at %s", worker.spec.worker_id, worker.spec.address)
            # Another process may have been there before: its channel may still wait to connect again.
            self.pool.forget(worker.spec.address)
            self._look_at_descriptors()
        elif change.kind is ChangeKind.REMOVED and change.removal is not None:
            level = logging.INFO if change.removal is Removal.DEREGISTERED else logging.WARNING
            logger.log(level, "worker %s left: %s", worker.spec.worker_id, change.removal.value)
            if change.removal is not Removal.REPLACED:
                self.pool.forget(worker.spec.address)

    def _on_reachable(self, address: str, reachable: bool | None) -> None:
        for worker in self.registry.at(address):
            self.registry.set_reachable(worker, reachable)

    def _look_at_descriptors(self) -> None:
        """Say once when the fleet comes near the limit of open descriptors."""
        if len(self.registry) * DESCRIPTORS_PER_WORKER > 0.8 * self._descriptor_limit:
            logger.warning(
                "%d workers take about %d descriptors each, and this process may open %d: raise the limit (ulimit -n)",
                len(self.registry),
                DESCRIPTORS_PER_WORKER,
                self._descriptor_limit,
            )
            self._descriptor_limit = descriptors.UNLIMITED

    def _drain_ordered(self, timeout_s: float | None) -> None:
        if timeout_s is not None:
            self._drain_timeout_s = timeout_s
        if not self._stop.is_set():
            logger.info("a parent asked this controller to drain")
            self._stop.set()


def _bridge(relay: Relay, keys: ApiKeys, config: ControllerConfig) -> EnvoyServices | None:
    """What a gateway asks of a controller; None where the protos of Envoy are not installed (extra `gateway`)."""
    if importlib.util.find_spec("envoy") is None or importlib.util.find_spec("envoy.service") is None:
        return None
    from fastchat_grpc.controller.envoy.services import EnvoyServices

    return EnvoyServices(relay, keys, settle_s=2 * config.lease.heartbeat_interval_s)
