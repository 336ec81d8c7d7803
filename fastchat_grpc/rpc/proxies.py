"""Which channels go through a proxy that the environment names.

grpc takes http_proxy, https_proxy and grpc_proxy for every address, loopback and private ones included, which
no proxy outside can reach: a fleet on a machine with such a variable would not find itself. Here a proxy is used
for public addresses alone, and only where grpc_proxy is set: that one can have been meant for nothing but grpc.
Exceptions are listed in no_grpc_proxy or no_proxy, as grpc reads them.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Mapping

from fastchat_grpc.config import split_address
from fastchat_grpc.errors import ConfigError

logger = logging.getLogger(__name__)

GRPC_PROXY = "grpc_proxy"
GENERAL_PROXIES = ("https_proxy", "http_proxy")
LOCAL_SUFFIXES = (".localhost", ".local", ".localdomain", ".internal")

_told: set[str] = set()


def uses_proxy(address: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the channel to host:port goes through a proxy. What is unusual about it is logged, once for all."""
    if environ.get(GRPC_PROXY):
        if is_local(address):
            _tell(f"{GRPC_PROXY} is set; loopback and private addresses, such as {address}, are connected to directly")
            return False
        _tell(f"{GRPC_PROXY} is set: public addresses, such as {address}, are connected to through that proxy")
        return True
    found = next((name for name in GENERAL_PROXIES if environ.get(name)), None)
    if found is not None:
        _tell(f"{found} is set and not used; for grpc to public addresses through a proxy, set {GRPC_PROXY}")
    return False


def is_local(address: str) -> bool:
    """Whether host:port is of this machine or of a private network, as far as its text tells."""
    try:
        host, _ = split_address(address)
    except ConfigError:
        return False
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        name = host.rstrip(".").lower()
        return "." not in name or name.endswith(LOCAL_SUFFIXES)


def _tell(message: str) -> None:
    key = message.split(",", 1)[0]
    if key not in _told:
        _told.add(key)
        logger.info(message)
