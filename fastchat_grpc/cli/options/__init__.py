"""Flags, grouped as the config is, and their way into config. FastChat's names where it has them."""

from __future__ import annotations

from fastchat_grpc.cli.options.controller import controller_config, controller_options
from fastchat_grpc.cli.options.gateway import gateway_config, gateway_options
from fastchat_grpc.cli.options.servers import (
    bare_address,
    drain_option,
    listen_config,
    listen_options,
    listening_ip,
    log_level_option,
    ping_option,
    send_option,
    strict_option,
)
from fastchat_grpc.cli.options.types import CommaList, KeyValue
from fastchat_grpc.cli.options.worker import backend_config, model_options, worker_config, worker_options

__all__ = [
    "CommaList",
    "KeyValue",
    "backend_config",
    "bare_address",
    "controller_config",
    "controller_options",
    "drain_option",
    "gateway_config",
    "gateway_options",
    "listen_config",
    "listen_options",
    "listening_ip",
    "log_level_option",
    "model_options",
    "ping_option",
    "send_option",
    "strict_option",
    "worker_config",
    "worker_options",
]
