"""The metrics of a gateway: Envoy's own, the gateway's, and those of further processes that it is told of."""

from __future__ import annotations

import http.client
import logging
import socket
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prometheus_client import Counter, Gauge

from fastchat_grpc.config import GatewayConfig
from fastchat_grpc.metrics.exposition import PATH, Exposition
from fastchat_grpc.metrics.merging import merged

logger = logging.getLogger(__name__)

TIMEOUT_S = 5.0
"""A process that does not tell its metrics within this time is left out, and told to be down."""
MAX_ASKED = 64
"""So many processes are asked at once: those that hang cost their time together."""
OWN = "gateway"
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class GatewayMetrics:
    """Make it, `start` it before Envoy, `stop` it.

    Args:
        admin: where Envoy's admin interface is now; None: there is no Envoy.
    """

    def __init__(self, config: GatewayConfig, admin: Callable[[], Path | None]) -> None:
        self._targets = config.metrics_targets
        self._admin = admin
        self._exposition = Exposition(config.metrics, "gateway")
        registry = self._exposition.registry
        self.restarts = Counter("fastchat_grpc_envoy_restarts", "Envoys started in place of one.", registry=registry)
        self._up = Gauge("fastchat_grpc_envoy_up", "Whether Envoy tells its figures.", registry=registry)
        self._target_up = Gauge(
            "fastchat_grpc_target_up", "Whether a process tells its metrics.", ["target"], registry=registry
        )
        self._exposition.rewrite = self._whole

    @property
    def address(self) -> str:
        """host:port where they are."""
        return self._exposition.address

    def start(self) -> None:
        """Tell. Raises ConfigError where the port cannot be had."""
        self._exposition.start()

    def stop(self) -> None:
        """Tell nothing more."""
        self._exposition.stop()

    def _whole(self, own: Callable[[], bytes]) -> bytes:
        """All texts as one; called in other threads."""
        parts = list(self._parts())
        return merged([(OWN, own().decode()), *parts]).encode()

    def _parts(self) -> Iterable[tuple[str, str]]:
        admin = self._admin()
        text = _asked(lambda: envoy_stats(admin)) if admin is not None else None
        self._up.set(text is not None)
        if text is not None:
            yield OWN, text
        if not self._targets:
            return
        with ThreadPoolExecutor(min(len(self._targets), MAX_ASKED), "scrape") as threads:
            texts = list(threads.map(lambda target: _asked(lambda: _target(target[1])), self._targets))
        for (name, _), text in zip(self._targets, texts, strict=True):
            self._target_up.labels(name).set(text is not None)
            if text is not None:
                yield name, text


def _asked(ask: Callable[[], str]) -> str | None:
    try:
        return ask()
    except (OSError, http.client.HTTPException, ValueError) as error:
        logger.debug("metrics are left out: %s", error)
        return None


def _target(address: str) -> str:
    with _DIRECT.open(f"http://{address}{PATH}", timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode())


def envoy_stats(admin: Path) -> str:
    """What Envoy counts, in the text format. Raises OSError or HTTPException."""
    connection = http.client.HTTPConnection("envoy", timeout=TIMEOUT_S)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.sock.settimeout(TIMEOUT_S)
        connection.sock.connect(str(admin))
        connection.request("GET", "/stats/prometheus?usedonly")
        answer = connection.getresponse()
        if answer.status != 200:
            raise OSError(f"Envoy's admin interface answers {answer.status}")
        return answer.read().decode()
    finally:
        connection.close()
