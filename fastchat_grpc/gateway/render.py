"""The configuration of a gateway's Envoy, from ours."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from fastchat_grpc.config import GatewayConfig
from fastchat_grpc.errors import ConfigError
from fastchat_grpc.gateway.clusters import clusters
from fastchat_grpc.gateway.listeners import listeners
from fastchat_grpc.gateway.machine import heap_bytes
from fastchat_grpc.gateway.shape import Tree, extension

MAX_CONNECTIONS = 50_000
TOKEN_PLACE = "JOIN-TOKEN"
"""What stands for the join token in a printed configuration."""


def bootstrap(config: GatewayConfig, admin: Tree | None = None, module: Path | None = None) -> Tree:
    """Envoy's bootstrap configuration.

    Args:
        admin: the admin interface's address; None: no admin interface.
        module: what resumes streams (`gateway.resume_module`); None: they end with their workers.
    """
    node_id = config.node_id or f"gateway-{socket.gethostname()}-{os.getpid()}"
    return {
        "node": {"id": node_id, "cluster": "fastchat_grpc"},
        **({"admin": {"address": admin}} if admin is not None else {}),
        "static_resources": {
            "listeners": listeners(config, node_id, descriptor_path(), module),
            "clusters": clusters(config),
        },
        "overload_manager": overload_manager(heap_bytes()),
    }


def overload_manager(max_heap_bytes: int) -> Tree:
    """Bounds of connections and memory: near the bound Envoy frees what it can, ends the requests that hold
    most, and at last takes no new ones."""
    heap = "envoy.resource_monitors.fixed_heap"
    actions = {
        "shrink_heap": {"threshold": {"value": 0.80}},
        "disable_http_keepalive": {"threshold": {"value": 0.90}},
        "reset_high_memory_stream": {"scaled": {"scaling_threshold": 0.90, "saturation_threshold": 0.98}},
        "stop_accepting_requests": {"threshold": {"value": 0.95}},
    }
    return {
        "refresh_interval": "0.25s",
        "resource_monitors": [
            extension(
                "envoy.resource_monitors.global_downstream_max_connections",
                "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                max_active_downstream_connections=MAX_CONNECTIONS,
            ),
            extension(
                heap,
                "envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
                max_heap_size_bytes=max_heap_bytes,
            ),
        ],
        "actions": [
            {"name": f"envoy.overload_actions.{name}", "triggers": [{"name": heap, **trigger}]}
            for name, trigger in actions.items()
        ],
        # Requests that hold less than 1 MiB are not looked at one by one.
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": 20},
    }


def render_config(config: GatewayConfig) -> str:
    """The configuration as YAML, for those who run Envoy themselves. It has no admin interface and no secrets.

    Nor the module that resumes streams, which is made for one machine and one version of Envoy.
    """
    if config.join_token is None:
        return "\n".join(_yaml(bootstrap(config))) + "\n"
    hidden = replace(config, join_token=TOKEN_PLACE)
    note = f"# Put the fleet's join token in place of {TOKEN_PLACE}, and let nobody else read this file.\n"
    return note + "\n".join(_yaml(bootstrap(hidden))) + "\n"


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
