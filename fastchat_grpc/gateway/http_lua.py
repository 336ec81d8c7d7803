"""The Lua filter of the gateway: `http.lua`, under the tables by which the services themselves shape errors.

So errors of Envoy, of the services and within streams read alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from fastchat_grpc import __version__
from fastchat_grpc.config import GatewayConfig, GatewayMode, is_loopback
from fastchat_grpc.gateway.routes import PICKED
from fastchat_grpc.rpc.http_errors import CODE_BY_REASON, PARAM_BY_REASON, TYPE_BY_STATUS

MESSAGES: Mapping[int | str, str] = {
    400: "this is not a valid HTTP request",
    404: "no such path, or not with this HTTP method; see the API's documentation",
    405: "this path does not take this HTTP method",
    408: "the request did not arrive in time",
    413: "body: must have at most {max_body_bytes} bytes",
    415: "content-type: must be application/json",
    429: "too many requests; try again later",
    431: "the headers are too large",
    500: "the server failed",
    502: "the server's answer was broken",
    503: "no controller or worker can be reached now; try again later",
    504: "the server gave no sign of life in time",
    "misled": "no worker of the model can take a request now; try again",
    "rebound": "origin: pages under this name may not call a gateway of one machine unless --allowed-origin names them",
    "gzip": " (as unpacked from gzip, which must be of one piece and unpack to at most a hundred times its size)",
}
"""What is said where Envoy says nothing that helps, by HTTP status or name."""


def source(config: GatewayConfig) -> str:
    """The filter's Lua code."""
    messages = {key: text.format(max_body_bytes=config.max_body_bytes) for key, text in MESSAGES.items()}
    tables: dict[str, Mapping[Any, str]] = {
        "TYPES": TYPE_BY_STATUS,
        "CODES": CODE_BY_REASON,
        "PARAMS": PARAM_BY_REASON,
        "MESSAGES": messages,
    }
    lines = [f"local {name} = {_table(table)}" for name, table in tables.items()]
    lines.append(f"local VERSION = {_text(__version__)}")
    lines.append(f"local WATCHED = {'false' if config.mode is GatewayMode.SIDECAR else 'true'}")
    # Where picks take whole bodies of gRPC requests, too, their keys are asked for first.
    first = dict.fromkeys(PICKED, "yes") if config.mode is GatewayMode.DIRECT else {}
    lines.append(f"local KEY_FIRST = {_table(first)}")
    lines.append(f"local LOOPBACK = {'true' if is_loopback(config.host) else 'false'}")
    lines.append(
        f"local ORIGINS = {{{', '.join(_text(_origin_pattern(origin)) for origin in config.allowed_origins)}}}"
    )
    return "\n".join(lines) + "\n" + resources.files(__package__).joinpath("http.lua").read_text("utf-8")


def _origin_pattern(origin: str) -> str:
    """Lua's pattern of allowed origins, as `shape.origin_regex`."""
    if origin == "*":
        return ".*"
    host = origin.removesuffix(":*")
    found = "[%w.-]*".join(re.sub(r"([^A-Za-z0-9])", r"%\1", part) for part in host.split("*"))
    return f"^{found}{':?%d*' if host != origin else ''}$"


def _table(table: Mapping[Any, str]) -> str:
    members = (f"[{key if isinstance(key, int) else _text(key)}] = {_text(value)}" for key, value in table.items())
    return "{" + ", ".join(members) + "}"


def _text(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
