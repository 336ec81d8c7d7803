"""Settings of a worker, its backend and its models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fastchat_grpc.config.addresses import CONTROLLER_PORT, WORKER_PORT, split_address
from fastchat_grpc.config.checks import require, require_seconds, require_some_seconds, require_within
from fastchat_grpc.config.servers import SSE_PING_S, ListenConfig, MetricsConfig, TlsConfig, require_reachable

REASONING_PARSERS = ("auto", "none", "qwen3", "deepseek_r1", "mistral", "seed_oss", "gemma4")
"""How a model may mark its reasoning; all but the first two are names of vLLM's."""
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6
"""Messages carry weights as 32-bit floats: a much smaller one would arrive as 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """How much a worker takes on. `max_running` None: what the backend can batch."""

    max_running: int | None = None
    max_waiting: int = 256

    def __post_init__(self) -> None:
        require(
            self.max_running is None or self.max_running >= 1,
            f"--limit-worker-concurrency must be at least 1, got {self.max_running}",
        )
        require(self.max_waiting >= 0, f"--max-queue must be at least 0, got {self.max_waiting}")


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
        require(bool(self.path), "--model-path must name a folder, a hub id, or smollm2-135m-instruct")
        for name in self.names:
            require(bool(name.strip()), "--model-names must not hold an empty name")
        require(len(set(self.names)) == len(self.names), f"--model-names must differ, got {','.join(self.names)}")
        require(
            self.device in ("auto", "cpu", "cuda", "mps", "xpu", "npu"),
            f"--device must be one of auto, cpu, cuda, mps, xpu, npu, got {self.device}",
        )
        require(
            self.dtype in ("auto", "float32", "float16", "bfloat16"),
            f"--dtype must be one of auto, float32, float16, bfloat16, got {self.dtype}",
        )
        require(
            self.reasoning_parser in REASONING_PARSERS,
            f"--reasoning-parser must be one of {', '.join(REASONING_PARSERS)}, got {self.reasoning_parser}",
        )
        require(self.num_gpus >= 1, f"--num-gpus must be at least 1, got {self.num_gpus}")
        require(
            not self.gpus or len(self.gpus) >= self.num_gpus,
            f"--num-gpus ({self.num_gpus}) must not exceed the number of --gpus ({len(self.gpus)})",
        )
        require(
            self.max_gpu_memory is None or re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]i?B)", self.max_gpu_memory) is not None,
            f"--max-gpu-memory must look like 13GiB, got {self.max_gpu_memory}",
        )
        require(
            self.context_length is None or self.context_length >= 2,
            f"--context-length must be at least 2, got {self.context_length}",
        )
        require(
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
        require(self.stream_interval >= 1, f"--stream-interval must be at least 1, got {self.stream_interval}")

    def refuse_unknown_options(self, known: frozenset[str]) -> None:
        """Raise ConfigError for an option that the backend does not have."""
        for key in self.options:
            offered = ", ".join(sorted(known)) or "none"
            require(key in known, f"backend {self.name} has no option {key!r}; its options: {offered}")


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
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """A worker process."""

    backend: BackendConfig
    listen: ListenConfig = ListenConfig(port=WORKER_PORT)  # noqa: RUF009  # it is frozen
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
    metrics: MetricsConfig = MetricsConfig()  # noqa: RUF009  # it is frozen
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
        require_reachable(self.advertised_address, self.listen, self.controller_addresses)
        require(len(self.worker_id) <= 128, f"--worker-id must have at most 128 characters, got {len(self.worker_id)}")
        require_within("--weight", self.weight, MIN_WEIGHT, MAX_WEIGHT)
        require_seconds("--drain-timeout", self.drain_timeout_s)
        require_seconds("--sse-ping-interval", self.sse_ping_s)
        require_some_seconds("--stall-timeout", self.stall_timeout_s)
        require_some_seconds("--send-timeout", self.send_timeout_s)
        if self.heartbeat_interval_s is not None:
            require_some_seconds("--heartbeat-interval", self.heartbeat_interval_s)
