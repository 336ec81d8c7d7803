"""The HTTP server of a process's metrics.

It answers from threads of its own: what takes long to write, such as the state of ten thousand workers, holds the
event loop no longer than Python lets one thread run while another waits.
"""

from __future__ import annotations

import gzip
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, ThreadingWSGIServer, generate_latest

from fastchat_grpc import __version__
from fastchat_grpc.config import MetricsConfig, dial_host, join_address
from fastchat_grpc.errors import ConfigError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse

logger = logging.getLogger(__name__)

PATH = "/metrics"
SLOW_S = 10.0
"""A caller that neither asks nor reads for so long is left."""
GZIP_LEVEL = 1
"""Ten thousand workers are five megabytes of text, which better compression would take half a second for."""

Text = Callable[[], bytes]

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # half of all series, which nobody reads


class Exposition:
    """The registry of one process, and its server. `start` it once, `stop` it once.

    Args:
        component: controller, worker or gateway.
    """

    def __init__(self, config: MetricsConfig, component: str) -> None:
        self._config = config
        self._component = component
        self._texts: list[Text] = []
        self._writing = threading.Lock()
        self._server: Any = None
        self.rewrite: Callable[[Text], bytes] = lambda own: own()
        """Makes what is told of what this process tells by itself."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Gauge("fastchat_grpc_build_info", "Version.", ["component", "version"], registry=self.registry)
        build.labels(component, __version__).set(1)

    def add(self, text: Text) -> None:
        """Tell this, too: families in the text format, none of which the registry has. Called in other threads."""
        self._texts.append(text)

    @property
    def address(self) -> str:
        """host:port where this machine reaches the server; empty before the start."""
        if self._server is None:
            return ""
        return join_address(dial_host(self._config.host), self._server.server_port)

    def start(self) -> None:
        """Listen. Raises ConfigError where that cannot be."""
        host, port = self._config.host, self._config.port or 0
        try:
            family, address = _family(host, port)
            kind = type("Server", (ThreadingWSGIServer,), {"address_family": family})
            self._server = make_server(address, port, self._answer, kind, _Handler)
        except OSError as error:
            raise ConfigError(
                f"cannot listen for metrics on {join_address(host, port)}: {error.strerror or error}; "
                "choose another --metrics-host or --metrics-port"
            ) from error
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()
        logger.info("metrics of this %s are at http://%s%s", self._component, self.address, PATH)

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()

    def render(self) -> bytes:
        """All that is told, in the text format of Prometheus."""
        with self._writing:  # whoever asks twice at once is no reason to work on both at once
            return self.rewrite(self._own)

    def _own(self) -> bytes:
        return b"".join([generate_latest(self.registry), *(_whole(text) for text in self._texts)])

    def _answer(self, environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != PATH:
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [f"metrics are at {PATH}\n".encode()]
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            start("405 Method Not Allowed", [("Allow", "GET, HEAD")])
            return []
        body = self.render()
        headers = [("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)]
        if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            body = gzip.compress(body, GZIP_LEVEL)
            headers.append(("Content-Encoding", "gzip"))
        start("200 OK", [*headers, ("Content-Length", str(len(body)))])
        return [body] if environ["REQUEST_METHOD"] == "GET" else []


class _Handler(WSGIRequestHandler):
    timeout = SLOW_S

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: everybody who scrapes comes again and again."""


def _family(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return found[0][0], str(found[0][4][0])


def _whole(text: Text) -> bytes:
    """A text that ends with its last line; nothing where it cannot be had, which must not hide the rest."""
    try:
        found = text()
    except Exception:
        logger.exception("a part of the metrics is left out")
        return b""
    return found if found.endswith(b"\n") or not found else found + b"\n"
