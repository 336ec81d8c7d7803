"""The configuration of a gateway's Envoy, from ours."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from importlib import resources
from typing import Any

from fastchat_grpc.config import GatewayConfig
from fastchat_grpc.errors import ConfigError
from fastchat_grpc.gateway.clusters import clusters
from fastchat_grpc.gateway.listeners import listeners
from fastchat_grpc.gateway.shape import Tree, socket_address

ADMIN_PORT = 9901
"""Port of Envoy's admin interface in a printed configuration, on the loopback address."""


def bootstrap(config: GatewayConfig, admin: Tree | None = None) -> Tree:
    """Envoy's bootstrap configuration. `admin`: the admin interface's address; None: the loopback."""
    node_id = config.node_id or f"gateway-{socket.gethostname()}-{os.getpid()}"
    return {
        "node": {"id": node_id, "cluster": "fastchat_grpc"},
        "admin": {"address": admin or socket_address("127.0.0.1", ADMIN_PORT)},
        "static_resources": {
            "listeners": listeners(config, node_id, descriptor_path()),
            "clusters": clusters(config),
        },
        # Without a bound of its own Envoy warns at every start.
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.resource_monitors."
                        "downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": 50_000,
                    },
                }
            ]
        },
    }


def render_config(config: GatewayConfig) -> str:
    """The configuration as YAML, for those who run Envoy themselves. It holds the join token, if there is one."""
    return "\n".join(_yaml(bootstrap(config))) + "\n"


def _yaml(value: Any) -> Iterator[str]:
    """Lines of YAML: blocks for structures and for text of several lines, JSON for everything else."""
    match value:
        case dict() if value:
            for key, item in value.items():
                name = key if re.fullmatch(r"[A-Za-z_][\w.-]*", key) else json.dumps(key)
                yield from _member(f"{name}:", item)
        case list() if value:
            for item in value:
                first, *rest = _yaml(item)
                yield f"- {first}"
                yield from (f"  {line}" for line in rest)
        case _:
            yield json.dumps(value)


def _member(name: str, item: Any) -> Iterator[str]:
    if isinstance(item, str) and "\n" in item:
        yield f"{name} |"
        yield from (f"  {line}" if line else "" for line in item.rstrip("\n").split("\n"))
    elif isinstance(item, (dict, list)) and item:
        yield name
        yield from (f"  {line}" for line in _yaml(item))
    else:
        yield f"{name} {json.dumps(item)}"


def descriptor_path() -> str:
    """The descriptor set of the contracts, which Envoy's transcoder reads. Raises ConfigError."""
    path = str(resources.files("fastchat_grpc.v1").joinpath("descriptors.binpb"))
    if not os.path.isfile(path):
        raise ConfigError(f"the descriptor set {path} is missing; the installation is broken")
    return path
