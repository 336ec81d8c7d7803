"""Who may join: the shared token, and the networks that workers may say they are in."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from typing import Any

from fastchat_grpc.config import split_address
from fastchat_grpc.errors import InvalidArgument, PermissionDenied, Unauthenticated

Metadata = Iterable[tuple[str, Any]] | None


def bearer(token: str | None) -> Sequence[tuple[str, str]]:
    """Metadata that shows a token; none for None."""
    return (("authorization", f"Bearer {token}"),) if token else ()


class JoinToken:
    """Checks the shared secret of a fleet's members. None, or no token: everybody is one.

    Several are accepted at once, so that a token can be changed member by member.
    """

    def __init__(self, *tokens: str | None) -> None:
        self._accepted = tuple(token.encode() for token in tokens if token)

    @property
    def required(self) -> bool:
        """Whether there is a token to show."""
        return bool(self._accepted)

    def check(self, metadata: Metadata) -> None:
        """Raises Unauthenticated. Takes the same time for every wrong token."""
        if not self._accepted:
            return
        given = _bearer_of(metadata)
        if not given:
            raise Unauthenticated(
                "this controller asks for a join token: set --join-token-file, or send authorization: Bearer <token>"
            )
        if not self._accepts(given):
            raise Unauthenticated("the join token is wrong")

    def shown_by(self, metadata: Metadata) -> bool:
        """Whether a call shows an accepted token."""
        return self._accepts(_bearer_of(metadata))

    def _accepts(self, given: bytes) -> bool:
        # All are compared, each in constant time: which of them matches tells nothing either.
        return sum([hmac.compare_digest(given, token) for token in self._accepted]) > 0


def _bearer_of(metadata: Metadata) -> bytes:
    shown = next((value for key, value in metadata or () if key == "authorization"), "")
    scheme, _, given = shown.partition(" ")
    return given.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""


class AllowedNetworks:
    """Checks that an advertised address lies in one of some networks. Empty: any address will do.

    A name is resolved, and all of its addresses must lie inside. It is resolved again whenever it is
    connected to, so names are only as trustworthy as the DNS that answers for them.
    """

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = [ipaddress.ip_network(network) for network in networks]

    async def check(self, address: str) -> None:
        """Raises PermissionDenied for a host:port outside, and InvalidArgument for a name that is none."""
        if not self._networks:
            return
        host, _ = split_address(address)
        for ip in await _addresses(host):
            if not any(ip in network for network in self._networks):
                raise PermissionDenied(
                    f"address {address} is not in an allowed network (see the controller's --allowed-networks)"
                )


async def _addresses(host: str) -> Sequence[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        return [_plain(ipaddress.ip_address(host))]
    except ValueError:
        pass
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InvalidArgument("address", f"host {host[:128]!r} cannot be resolved") from error
    return [_plain(ipaddress.ip_address(entry[4][0])) for entry in found]


def _plain(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IPv4 address that is written as an IPv6 one counts as what it is."""
    return ip.ipv4_mapped or ip if isinstance(ip, ipaddress.IPv6Address) else ip
