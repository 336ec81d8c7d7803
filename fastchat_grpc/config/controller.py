"""Settings of a controller."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from fastchat_grpc.config.addresses import CONTROLLER_PORT, split_address
from fastchat_grpc.config.checks import require, require_above, require_seconds, require_some_seconds, require_within
from fastchat_grpc.config.servers import SSE_PING_S, ListenConfig, MetricsConfig, TlsConfig, require_reachable
from fastchat_grpc.errors import ConfigError


class DispatchMethod(Enum):
    """How a controller picks among the workers of a model."""

    SHORTEST_QUEUE = "shortest_queue"
    LOTTERY = "lottery"
    POWER_OF_TWO = "power_of_two"
    PREFIX_AFFINITY = "prefix_affinity"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseConfig:
    """How long a worker counts as alive."""

    time_to_live_s: float = 6.0
    heartbeat_interval_s: float = 2.0
    max_heartbeats_per_s: float = 1000.0
    """Above this rate, interval and time to live grow with the fleet, in proportion."""
    max_workers: int = 100_000
    """More are refused: whoever may register must not be able to fill the controller's memory."""
    expect_workers: int = 0
    """Workers with which the fleet is whole, so that what they do not serve does not exist; 0: not known."""
    expect_worker_ids: tuple[str, ...] = ()
    """The same by their ids: so many others do not make it whole."""

    def __post_init__(self) -> None:
        require(self.expect_workers >= 0, f"--expect-workers must be at least 0, got {self.expect_workers}")
        require(self.max_workers >= 1, f"--max-workers must be at least 1, got {self.max_workers}")
        require_some_seconds("--heartbeat-expiration", self.time_to_live_s)
        require_some_seconds("heartbeat interval", self.heartbeat_interval_s)
        require(
            self.time_to_live_s > self.heartbeat_interval_s,
            f"heartbeat expiration ({self.time_to_live_s:g} s) must exceed the heartbeat interval "
            f"({self.heartbeat_interval_s:g} s)",
        )
        require_above("max heartbeats", self.max_heartbeats_per_s, 0, 1e9, " per s")


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerConfig:
    """When a worker that fails is left alone, and for how long."""

    window_s: float = 10.0
    min_failures: int = 5
    failure_ratio: float = 0.5
    """Share of failures in the window, at least `min_failures` of them, that opens the breaker."""
    cooldown_s: float = 2.0
    """Time until one probe is let through; doubled at each failed probe."""
    max_cooldown_s: float = 30.0

    def __post_init__(self) -> None:
        require_some_seconds("breaker window", self.window_s)
        require(self.min_failures >= 1, f"breaker failures must be at least 1, got {self.min_failures}")
        require_above("breaker ratio", self.failure_ratio, 0, 1)
        require_some_seconds("longest breaker cooldown", self.max_cooldown_s)
        require_above("breaker cooldown", self.cooldown_s, 0, self.max_cooldown_s, " s")


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverConfig:
    """How far a request is carried past failing workers, by a controller's relay or by a client."""

    max_attempts: int = 5
    """Workers tried until the first event."""
    max_resumes: int = 5
    """Further workers after the first event; 0: streams break with their worker (--no-resume)."""
    max_cached_tokens: int = 262_144
    """Output tokens kept per request in order to resume it; a longer output breaks with its worker."""
    wait_s: float = 10.0
    """Most time that a request waits, at each outage, for a worker to come back or to have room for it."""
    retry_ratio: float = 0.2
    """Retries allowed per request, on average, beside the reserve."""
    retry_reserve_per_s: float = 20.0
    """Retries allowed per second whatever the traffic."""

    def __post_init__(self) -> None:
        require(self.max_attempts >= 1, f"--max-attempts must be at least 1, got {self.max_attempts}")
        require(self.max_resumes >= 0, f"--max-resumes must be at least 0, got {self.max_resumes}")
        require(self.max_cached_tokens >= 0, f"max_cached_tokens must be at least 0, got {self.max_cached_tokens}")
        require_seconds("--failover-wait", self.wait_s)
        require_within("retry_ratio", self.retry_ratio, 0, 1e9)
        require_within("retry_reserve_per_s", self.retry_reserve_per_s, 0, 1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKeyConfig:
    """API keys that callers must show one of. Neither keys nor a file: none is asked for."""

    keys: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Name and key; hashed at once. The name stands in logs and metrics."""
    file: Path | None = None
    """Lines of NAME sha256:DIGEST, followed by "admin" for those who may see and move workers; read again when it
    changes."""
    admins: frozenset[str] = frozenset()
    """Names of the keys among `keys` that may do that."""

    def __post_init__(self) -> None:
        for number, (name, key) in enumerate(self.keys, 1):
            # Neither is quoted: what is taken for a name may be a key.
            require(
                re.fullmatch(r"[A-Za-z0-9_.@-]{1,64}", name) is not None,
                f"--api-keys: the name of key {number} must be 1 to 64 letters, digits and _.@-",
            )
            require(
                len(key) >= 8 and key.isprintable() and " " not in key,
                f"--api-keys: key {number} must have at least 8 printable characters and no spaces",
            )
        require(self.file is None or self.file.is_file(), f"--api-key-file not found: {self.file}")

    @classmethod
    def parse(cls, text: str, file: Path | None = None) -> ApiKeyConfig:
        """Read "name=key,name:admin=key"; a key without a name is called key1, key2, ... Raises ConfigError."""
        parts = [part.strip() for part in text.split(",") if part.strip()]
        named = [
            # Keys may end in "=" themselves, as base64 does.
            part.partition("=") if part.partition("=")[2].strip("=") else (f"key{number}", "=", part)
            for number, part in enumerate(parts, 1)
        ]
        names = [name.strip() for name, _, _ in named]
        return cls(
            keys=tuple(
                (name.removesuffix(":admin"), key.strip()) for name, (_, _, key) in zip(names, named, strict=True)
            ),
            file=file,
            admins=frozenset(name.removesuffix(":admin") for name in names if name.endswith(":admin")),
        )

    @property
    def required(self) -> bool:
        """Whether callers must show a key."""
        return bool(self.keys) or self.file is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """A controller process."""

    listen: ListenConfig = ListenConfig(port=CONTROLLER_PORT)  # noqa: RUF009  # it is frozen
    dispatch: DispatchMethod = DispatchMethod.SHORTEST_QUEUE
    lease: LeaseConfig = LeaseConfig()
    breaker: BreakerConfig = BreakerConfig()
    failover: FailoverConfig = FailoverConfig()
    drain_timeout_s: float = 30.0
    send_timeout_s: float = 60.0
    """Seconds that what is relayed may stay unread by its caller before the request is ended."""
    join_token: str | None = field(default=None, repr=False)
    """Shared secret that members of the fleet and those who move workers then show (authorization: Bearer)."""
    other_join_tokens: tuple[str, ...] = field(default=(), repr=False)
    """Further secrets that are accepted, while one is changed."""
    insecure_join: bool = False
    """Whether anybody may register workers although callers need keys."""
    allowed_networks: tuple[str, ...] = ()
    """Networks (CIDR) that advertised worker addresses must lie in; empty: any."""
    worker_tls: TlsConfig | None = None
    """TLS towards workers; None: plaintext."""
    worker_id: str = ""
    """Identity towards a parent; empty: the advertised address."""
    advertised_address: str = ""
    """host:port that a parent is told; empty: the listening address."""
    parent_addresses: tuple[str, ...] = ()
    """Controllers to register with, as a worker that serves the whole fleet."""
    parent_tls: TlsConfig | None = None
    parent_join_token: str | None = field(default=None, repr=False)
    metrics: MetricsConfig = MetricsConfig()  # noqa: RUF009  # it is frozen
    strict_fields: bool = False
    """Members of OpenAI requests that nobody knows are refused; else they are ignored and named to the caller."""
    sse_ping_s: float = SSE_PING_S
    """Seconds of silence after which an OpenAI stream says that it lives; 0: never."""
    api_keys: ApiKeyConfig = ApiKeyConfig()
    """Keys that callers of generation, models and worker lists must show, directly or through a gateway."""

    def __post_init__(self) -> None:
        require_seconds("--drain-timeout", self.drain_timeout_s)
        require_seconds("--sse-ping-interval", self.sse_ping_s)
        require_some_seconds("--send-timeout", self.send_timeout_s)
        require(self.join_token is None or bool(self.join_token), "--join-token must not be empty")
        require(
            not self.api_keys.required or self.join_token is not None or self.insecure_join,
            "API keys without a join token: anybody could register a worker and be sent the prompts; "
            "set --join-token-file, or --insecure-join where the network lets nobody else in",
        )
        for network in self.allowed_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ConfigError(f"--allowed-networks must hold networks such as 10.0.0.0/8: {error}") from None
        require_reachable(self.advertised_address, self.listen, self.parent_addresses)
        for address in self.parent_addresses:
            split_address(address)
        require(len(self.worker_id) <= 128, f"--worker-id must have at most 128 characters, got {len(self.worker_id)}")
