"""Settings, as validated frozen dataclasses. Flags and environment variables are read in `cli` alone.

Durations are seconds, sizes are bytes. A wrong value raises ConfigError with one line for its author.
"""

from __future__ import annotations

from fastchat_grpc.config.addresses import (
    CONTROLLER_PORT,
    GATEWAY_PORT,
    GATEWAY_TLS_PORT,
    WORKER_PORT,
    dial_host,
    is_loopback,
    is_wildcard,
    join_address,
    split_address,
)
from fastchat_grpc.config.checks import MAX_SECONDS, require_seconds
from fastchat_grpc.config.controller import (
    ApiKeyConfig,
    BreakerConfig,
    ControllerConfig,
    DispatchMethod,
    FailoverConfig,
    LeaseConfig,
)
from fastchat_grpc.config.gateway import GatewayConfig, GatewayMode
from fastchat_grpc.config.servers import MAX_MESSAGE_BYTES, SSE_PING_S, ListenConfig, MetricsConfig, TlsConfig
from fastchat_grpc.config.worker import (
    MAX_WEIGHT,
    REASONING_PARSERS,
    AdmissionConfig,
    BackendConfig,
    EngineConfig,
    ModelConfig,
    WorkerConfig,
)

__all__ = [
    "CONTROLLER_PORT",
    "GATEWAY_PORT",
    "GATEWAY_TLS_PORT",
    "MAX_MESSAGE_BYTES",
    "MAX_SECONDS",
    "MAX_WEIGHT",
    "REASONING_PARSERS",
    "SSE_PING_S",
    "WORKER_PORT",
    "AdmissionConfig",
    "ApiKeyConfig",
    "BackendConfig",
    "BreakerConfig",
    "ControllerConfig",
    "DispatchMethod",
    "EngineConfig",
    "FailoverConfig",
    "GatewayConfig",
    "GatewayMode",
    "LeaseConfig",
    "ListenConfig",
    "MetricsConfig",
    "ModelConfig",
    "TlsConfig",
    "WorkerConfig",
    "dial_host",
    "is_loopback",
    "is_wildcard",
    "join_address",
    "require_seconds",
    "split_address",
]
