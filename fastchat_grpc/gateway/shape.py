"""Small pieces of Envoy configuration, as Python structures."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from fastchat_grpc.config import TlsConfig, split_address

Tree = dict[str, Any]

TYPE_PREFIX = "type.googleapis.com/"


def typed(type_name: str, **members: Any) -> Tree:
    """A google.protobuf.Any of a type under envoy.*, by its full name."""
    return {"@type": TYPE_PREFIX + type_name, **members}


def extension(name: str, type_name: str, **members: Any) -> Tree:
    """A named extension with its configuration."""
    return {"name": name, "typed_config": typed(type_name, **members)}


def seconds(value: float) -> str:
    """A duration."""
    return f"{value:.3f}".rstrip("0").rstrip(".") + "s"


def socket_address(host: str, port: int) -> Tree:
    """An address to listen on or to connect to."""
    return {"socket_address": {"address": host, "port_value": port}}


def host_of(address: str) -> Tree:
    """The address of a "host:port"."""
    return socket_address(*split_address(address))


def file(path: object) -> Tree:
    """A data source that is a file, read again when it changes where Envoy watches it."""
    return {"filename": str(path)}


def tls_context(tls: TlsConfig) -> Tree:
    """Certificates of one side, and the authority that the other side must be of."""
    common: Tree = {}
    if tls.cert is not None and tls.key is not None:
        common["tls_certificates"] = [{"certificate_chain": file(tls.cert), "private_key": file(tls.key)}]
    if tls.ca is not None:
        common["validation_context"] = {"trusted_ca": file(tls.ca)}
    return common


def glob_regex(pattern: str) -> str:
    """The regular expression of a pattern in which "*" stands for anything."""
    return ".*".join(re.escape(part) for part in pattern.split("*"))


def origin_regex(pattern: str) -> str:
    """The regular expression of a page's origin. "*" alone is any; at the end, ":*" is any port or the usual one;
    elsewhere "*" is a part of a host's name, and never goes beyond it."""
    if pattern == "*":
        return ".*"
    host = pattern.removesuffix(":*")
    expression = "[A-Za-z0-9.-]*".join(re.escape(part) for part in host.split("*"))
    return expression + ("(:[0-9]+)?" if host != pattern else "")


def name_matcher(name: str) -> Tree:
    """How a certificate's subject alternative name is matched: of which type it is, and "*" for anything."""
    kind = "URI" if "://" in name else "IP_ADDRESS" if _is_ip(name) else "DNS"
    matcher = {"safe_regex": {"regex": glob_regex(name)}} if "*" in name else {"exact": name}
    return {"san_type": kind, "matcher": matcher}


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
