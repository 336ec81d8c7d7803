"""Flags of all servers."""

from __future__ import annotations

import re
import socket
from typing import Any

import click

from fastchat_grpc.cli.credentials import (
    FILE,
    Option,
    group,
    identity_options,
    tls_config,
)
from fastchat_grpc.config import (
    SSE_PING_S,
    ControllerConfig,
    ListenConfig,
    MetricsConfig,
)
from fastchat_grpc.errors import ConfigError

log_level_option = click.option(
    "--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning"])
)
strict_option = click.option(
    "--strict-fields", is_flag=True, help="Refuse unknown members of OpenAI requests; else they are ignored and named."
)
ping_option = click.option(
    "--sse-ping-interval",
    type=float,
    default=SSE_PING_S,
    show_default=True,
    help="Seconds of silence after which an OpenAI stream says that it lives; 0 for never.",
)
drain_option = click.option(
    "--drain-timeout",
    type=float,
    default=ControllerConfig().drain_timeout_s,
    show_default=True,
    help="Seconds for requests to end on shutdown.",
)
send_option = click.option(
    "--send-timeout",
    type=float,
    default=ControllerConfig().send_timeout_s,
    show_default=True,
    help="Seconds that output may stay unread before its request loses its slot.",
)


metrics_options = group(
    click.option(
        "--metrics-port",
        type=int,
        help="Tell Prometheus what is counted, at /metrics on this port; 0 takes a free one.  [default: count nothing]",
    ),
    click.option("--metrics-host", default="127.0.0.1", show_default=True, help="Address of that port."),
)


def metrics_config(flags: dict[str, Any]) -> MetricsConfig:
    """The MetricsConfig of `metrics_options`."""
    return MetricsConfig(port=flags["metrics_port"], host=flags["metrics_host"].strip("[]"))


def listen_options(port: int, whose: str = "Port to listen on") -> Option:
    """Where a server listens; `whose`: what its port is, where there are several."""
    return group(
        click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
        click.option("--port", default=port, show_default=True, type=int, help=f"{whose}; 0 takes a free one."),
        click.option("--tls-cert", type=FILE, help="PEM certificate chain of this server."),
        click.option("--tls-key", type=FILE, help="PEM private key of this server."),
        click.option("--tls-ca", type=FILE, help="PEM authority that clients must have (mTLS)."),
        click.option(
            "--tls-peer-san",
            multiple=True,
            help="Name in the certificates of callers (DNS, IP, or URI such as spiffe://fleet/*); may be repeated.  "
            "[default: any certificate of --tls-ca]",
        ),
        identity_options,
        log_level_option,
    )


def listen_config(flags: dict[str, Any]) -> ListenConfig:
    """The ListenConfig of `listen_options`."""
    cert, key, ca = flags["tls_cert"], flags["tls_key"], flags["tls_ca"]
    tls = tls_config(cert, key, ca) if cert or key or ca else None
    return ListenConfig(
        host=flags["host"].strip("[]"), port=flags["port"], tls=tls, peer_sans=tuple(flags["tls_peer_san"])
    )


def listening_ip(host: str) -> str:
    """The IP address that a host stands for: Envoy listens on nothing else."""
    host = host.strip("[]")
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0])
    except (OSError, UnicodeError):
        raise ConfigError(f"--host {host} is no address of this machine") from None


def bare_address(address: str) -> str:
    """host:port without the scheme that FastChat's addresses have."""
    return re.sub(r"^(https?|grpc)://", "", address).rstrip("/")
