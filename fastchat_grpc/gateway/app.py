"""The gateway: Envoy under supervision."""

from __future__ import annotations

import asyncio
import logging

from fastchat_grpc.config import GatewayConfig, GatewayMode, join_address
from fastchat_grpc.errors import ConfigError
from fastchat_grpc.gateway.listeners import HTTP, HTTPS
from fastchat_grpc.gateway.process import EnvoyProcess

logger = logging.getLogger(__name__)

MIN_PAUSE_S, MAX_PAUSE_S = 0.5, 15.0
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
        self._envoy = EnvoyProcess(config)
        self._watcher: asyncio.Task[None] | None = None
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
    def mode(self) -> GatewayMode:
        """How requests reach their workers."""
        return self._config.mode

    @property
    def pid(self) -> int:
        """Envoy's process; 0 while there is none."""
        return self._envoy.pid

    async def start(self) -> None:
        """Start Envoy. Raises ConfigError."""
        await self._start()
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Let running requests end, then stop Envoy."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._envoy.stop(self._config.drain_timeout_s)
        logger.info("gateway stopped")

    async def _start(self) -> None:
        await self._envoy.start()
        host, ports = self._config.host, self._envoy.ports
        plain, tls = (join_address(host, ports[name]) if name in ports else "" for name in (HTTP, HTTPS))
        self._address = (plain, tls)
        logger.info("gateway (%s) listens on %s", self._config.mode.value, " and ".join(filter(None, self._address)))

    async def _watch(self) -> None:
        """Start Envoy again whenever it ends by itself."""
        pause_s = MIN_PAUSE_S
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            status = await self._envoy.wait()
            pause_s = MIN_PAUSE_S if loop.time() - started > STEADY_S else min(2 * pause_s, MAX_PAUSE_S)
            logger.error("Envoy ended with status %d; starting it again in %g s", status, pause_s)
            await self._envoy.kill()
            while True:
                await asyncio.sleep(pause_s)
                try:
                    self._envoy = EnvoyProcess(self._config)
                    await self._start()
                    break
                except ConfigError as error:
                    pause_s = min(2 * pause_s, MAX_PAUSE_S)
                    logger.error("%s; trying again in %g s", error, pause_s)
