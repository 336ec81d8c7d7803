"""What all servers have: an address, TLS, bounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastchat_grpc.config.addresses import is_loopback, is_wildcard, join_address, split_address
from fastchat_grpc.config.checks import require
from fastchat_grpc.errors import ConfigError

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
SSE_PING_S = 15.0
"""Well below the 60 s after which most proxies give up, and above the time in which refusals are known, failover
included: with its first ping a stream has its status, 200, and no gateway tries it elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """PEM files of one side of a connection. `ca` verifies the other side; with it, a server asks for mTLS."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    server_name: str = ""
    """Name that the other side's certificate must have; empty: the one by which it is reached."""

    def __post_init__(self) -> None:
        require((self.cert is None) == (self.key is None), "a TLS certificate and its key go together")
        for path in (self.cert, self.key, self.ca):
            require(path is None or path.is_file(), f"TLS file not found: {path}")

    def check(self) -> None:
        """Load the files, since grpc would say of wrong ones no more than that no connection comes about.

        Raises ConfigError.
        """
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.cert is not None and self.key is not None:
                context.load_cert_chain(self.cert, self.key, password=lambda: "")  # a key that has one is refused
        except (OSError, ValueError) as error:
            raise ConfigError(f"TLS certificate {self.cert} with key {self.key} cannot be used: {error}") from None
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
        except (OSError, ValueError) as error:
            raise ConfigError(f"TLS authority {self.ca} cannot be used: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """Where and how a gRPC server listens. Port 0 takes a free one."""

    host: str = "127.0.0.1"
    port: int = 0
    tls: TlsConfig | None = None
    peer_sans: tuple[str, ...] = ()
    """Names, one of which a caller's certificate must have: DNS names, IP addresses or URIs such as spiffe://fleet/*,
    where "*" stands for anything. Empty: any certificate of the authority. Health checks are open to all of those."""
    max_message_bytes: int = MAX_MESSAGE_BYTES

    def __post_init__(self) -> None:
        require(bool(self.host), "--host must not be empty")
        require(
            self.tls is None or self.tls.cert is not None,
            "--tls-ca asks callers for certificates and needs --tls-cert and --tls-key of this server",
        )
        require(
            not self.peer_sans or (self.tls is not None and self.tls.ca is not None), "--tls-peer-san needs --tls-ca"
        )
        require(0 <= self.port <= 65535, f"--port must be from 0 to 65535, got {self.port}")
        require(
            self.max_message_bytes >= 1024, f"max_message_bytes must be at least 1024, got {self.max_message_bytes}"
        )

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """Where a process tells what it counts (Prometheus). `port` None: it counts nothing; 0 takes a free port."""

    port: int | None = None
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        require(bool(self.host), "--metrics-host must not be empty")
        require(
            self.port is None or 0 <= self.port <= 65535, f"--metrics-port must be from 0 to 65535, got {self.port}"
        )


def require_reachable(advertised: str, listen: ListenConfig, controllers: tuple[str, ...]) -> None:
    """Check that callers can be told where a server is."""
    if advertised:
        host, port = split_address(advertised)
        require(port > 0 and not is_wildcard(host), f"--worker-address must be reachable, got {advertised}")
    elif any(not is_loopback(split_address(address)[0]) for address in controllers):
        require(
            not is_wildcard(listen.host),
            f"--host {listen.host} listens everywhere, so callers need a name for this server: "
            "set --worker-address host:port",
        )
