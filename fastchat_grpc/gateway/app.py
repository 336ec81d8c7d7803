"""The gateway: Envoy under supervision."""

from __future__ import annotations

import asyncio
import logging
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastchat_grpc.config import GatewayConfig, GatewayMode, join_address
from fastchat_grpc.errors import ConfigError
from fastchat_grpc.gateway.binary import find_envoy
from fastchat_grpc.gateway.listeners import HTTP, HTTPS
from fastchat_grpc.gateway.process import EnvoyProcess
from fastchat_grpc.gateway.resume_module import WITHOUT, resume_module
from fastchat_grpc.rpc.supervise import Supervised, Supervisor

if TYPE_CHECKING:
    from fastchat_grpc.gateway.metrics import GatewayMetrics

logger = logging.getLogger(__name__)

MIN_PAUSE_S, MAX_PAUSE_S = 0.5, 15.0
CRASHES = frozenset({-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE, -signal.SIGABRT})
"""Ends of Envoy for which its module may be to blame."""
STEADY_S = 60.0
"""An Envoy that ran this long before it ended is started again without further delay."""


async def run(config: GatewayConfig, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then let running requests end. Raises ConfigError if Envoy cannot start.

    Call it on the main thread.
    """
    app = GatewayApp(config)
    try:
        await app.start()
        await stop.wait()
    finally:
        await app.stop()


class GatewayApp:
    """One Envoy, started again when it ends by itself. `start` once, `stop` once."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._supervisor = Supervisor()
        self._metrics: GatewayMetrics | None = None
        self._envoy = EnvoyProcess(config, self._supervisor)
        self._module: Path | None = None
        self._watcher: Supervised | None = None
        self._pause_s = MIN_PAUSE_S
        self._address = ("", "")

    @property
    def address(self) -> str:
        """host:port of the plaintext listener; empty without one."""
        return self._address[0]

    @property
    def tls_address(self) -> str:
        """host:port of the TLS listener; empty without one."""
        return self._address[1]

    @property
    def metrics_address(self) -> str:
        """host:port of the metrics; empty where there are none."""
        return self._metrics.address if self._metrics is not None else ""

    @property
    def mode(self) -> GatewayMode:
        """How requests reach their workers."""
        return self._config.mode

    @property
    def resumes(self) -> bool:
        """Whether a stream that loses its worker goes on at another."""
        return self._module is not None or self._config.mode is GatewayMode.RELAY

    @property
    def pid(self) -> int:
        """Envoy's process; 0 while there is none."""
        return self._envoy.pid

    async def start(self) -> None:
        """Start Envoy. Raises ConfigError."""
        self._module = await resume_module(self._config, find_envoy(self._config.envoy))
        self._start_metrics()
        await self._start()
        self._watcher = self._supervisor.spawn("keeping Envoy", self._watch)

    async def stop(self) -> None:
        """Let running requests end, then stop Envoy."""
        if self._watcher is not None:
            self._watcher.cancel()
            await self._watcher.ended()
        await self._envoy.stop(self._config.drain_timeout_s)
        await self._supervisor.close()
        if self._metrics is not None:
            self._metrics.stop()
        logger.info("gateway stopped")

    def _start_metrics(self) -> None:
        """They come first, since Envoy may have to lead to them."""
        if self._config.metrics.port is None:
            return
        from fastchat_grpc.gateway.metrics import GatewayMetrics

        self._metrics = GatewayMetrics(self._config, lambda: self._envoy.admin_path)
        self._metrics.start()
        if self._config.public_metrics:
            self._config = replace(self._config, metrics_address=self._metrics.address)
            self._envoy = EnvoyProcess(self._config, self._supervisor)

    async def _start(self) -> None:
        try:
            await self._envoy.start(self._module)
        except ConfigError as error:
            if self._module is None or "in use" in str(error):
                raise
            # Whether the module is why, a start without it shows.
            self._envoy = EnvoyProcess(self._config, self._supervisor)
            await self._envoy.start()
            self._leave_out(f"Envoy does not start with it: {error}")
        host, ports = self._config.host, self._envoy.ports
        plain, tls = (join_address(host, ports[name]) if name in ports else "" for name in (HTTP, HTTPS))
        self._address = (plain, tls)
        logger.info("gateway (%s) listens on %s", self._config.mode.value, " and ".join(filter(None, self._address)))

    def _leave_out(self, why: str) -> None:
        """Do without the module from now on."""
        logger.error(WITHOUT, why)
        self._module = None

    async def _watch(self) -> None:
        """Start Envoy again whenever it ends by itself."""
        while True:
            if self._envoy.pid:
                await self._ended()
            await self._start_again()

    async def _ended(self) -> None:
        """Wait until it has ended, and choose a pause."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        status = await self._envoy.wait()
        steady = loop.time() - started > STEADY_S
        self._pause_s = MIN_PAUSE_S if steady else min(2 * self._pause_s, MAX_PAUSE_S)
        logger.error("Envoy ended with status %d; starting it again in %g s", status, self._pause_s)
        if status in CRASHES and self._module is not None:
            self._leave_out("Envoy crashed with it")
        await self._envoy.kill()

    async def _start_again(self) -> None:
        while True:
            await asyncio.sleep(self._pause_s)
            try:
                self._envoy = EnvoyProcess(self._config, self._supervisor)
                if self._metrics is not None:
                    self._metrics.restarts.inc()
                await self._start()
            except ConfigError as error:
                self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
                logger.error("%s; trying again in %g s", error, self._pause_s)
            else:
                return
