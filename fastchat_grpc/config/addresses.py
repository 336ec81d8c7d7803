"""Ports, and addresses of the form host:port."""

from __future__ import annotations

import ipaddress
import re

from fastchat_grpc.errors import ConfigError

CONTROLLER_PORT = 21001
WORKER_PORT = 21002
GATEWAY_PORT = 8000
GATEWAY_TLS_PORT = 8443


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
