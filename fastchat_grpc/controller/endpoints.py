"""EDS: tells a gateway's Envoy where the workers are.

Envoy wants IP addresses, so names are resolved here, and again from time to time. The set of a restarted
controller is empty until heartbeats have refilled its registry: a gateway that has an older set keeps it
until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from time import monotonic, time_ns
from typing import Any

import grpc
from envoy.config.core.v3 import address_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2
from envoy.service.endpoint.v3 import eds_pb2_grpc
from google.protobuf import any_pb2

from fastchat_grpc.config import join_address, split_address
from fastchat_grpc.controller.fleet import Change, ChangeKind, Worker
from fastchat_grpc.controller.registry import Registry

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE_NAME = "envoy.service.endpoint.v3.EndpointDiscoveryService"
TYPE_URL = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
GATHER_S = 0.02
"""Changes are gathered this long before they are sent, so that a fleet's start is a few messages, not one each."""
RESOLVE_S = 30.0
"""Names of workers are resolved again this often."""


class Gateway:
    """What one gateway's Envoy has: `acked` are the "ip:port" it has confirmed, None before the first time."""

    def __init__(self) -> None:
        self.acked: frozenset[str] | None = None
        self.streams = 0


class Endpoints(eds_pb2_grpc.EndpointDiscoveryServiceServicer):  # type: ignore[misc]
    """The endpoint discovery service (state of the world).

    Args:
        registry: the workers.
        settle_s: time from the start in which a gateway that has endpoints already keeps them.
        authorize: raises for callers that do not belong to the fleet; gets the call's metadata.
    """

    def __init__(self, registry: Registry, settle_s: float, authorize: Callable[[Any], None]) -> None:
        self._registry = registry
        self._authorize = authorize
        self._settled_at = monotonic() + settle_s
        self._epoch = time_ns()
        self._version = 0
        self._endpoints: frozenset[str] = frozenset()
        self._resolved: dict[str, str] = {}
        self._changed = asyncio.Condition()
        self._dirty = asyncio.Event()
        self._gateways: dict[str, Gateway] = {}
        self._acked = asyncio.Event()
        self._unsubscribe = registry.subscribe(self._on_change)

    def close(self) -> None:
        """Hear of no more changes."""
        self._unsubscribe()

    def location(self, worker: Worker, gateway: str) -> str | None:
        """The worker's "ip:port" for a gateway; None where its name is not resolved or the gateway lacks it yet."""
        place = self._resolved.get(worker.spec.address)
        known = self._gateways.get(gateway)
        if place is None or known is None or known.acked is None:
            return place
        return place if place in known.acked else None

    async def acked(self) -> None:
        """Return at the next confirmation of a gateway."""
        await self._acked.wait()

    async def run(self) -> None:
        """Follow the registry until cancelled."""
        while True:
            await self._refresh()
            with contextlib.suppress(TimeoutError):
                # Not wait_for: in Python 3.11 it loses a cancel that comes together with its result.
                async with asyncio.timeout(RESOLVE_S):
                    await self._dirty.wait()
                await asyncio.sleep(GATHER_S)
            self._dirty.clear()

    def _on_change(self, change: Change) -> None:
        if change.kind is ChangeKind.ADDED:
            self._resolve_literal(change.worker.spec.address)
        if change.kind in (ChangeKind.ADDED, ChangeKind.REMOVED):
            self._dirty.set()

    def _resolve_literal(self, address: str) -> None:
        """An address that is an IP already can be used at once."""
        host, port = split_address(address)
        with contextlib.suppress(ValueError):
            self._resolved[address] = join_address(str(ipaddress.ip_address(host)), port)

    async def _refresh(self) -> None:
        addresses = {worker.spec.address for worker in self._registry.workers()}
        resolved = dict(zip(addresses, await asyncio.gather(*map(_resolve, addresses)), strict=True))
        # A name that does not resolve now keeps the address that it had.
        self._resolved = {a: place for a in addresses if (place := resolved[a] or self._resolved.get(a)) is not None}
        endpoints = frozenset(self._resolved.values())
        if endpoints != self._endpoints or not self._version:
            async with self._changed:
                self._endpoints = endpoints
                self._version += 1
                self._changed.notify_all()

    async def StreamEndpoints(
        self, requests: AsyncIterator[discovery_pb2.DiscoveryRequest], context: Context
    ) -> AsyncIterator[discovery_pb2.DiscoveryResponse]:
        self._authorize(context.invocation_metadata())
        first = await anext(requests, None)
        if first is None:
            return
        gateway = self._gateways.setdefault(first.node.id, Gateway())
        gateway.streams += 1
        sent: dict[str, frozenset[str]] = {}
        reader = asyncio.create_task(self._read_acks(requests, sent, gateway))
        try:
            await self._settle(has_endpoints=bool(first.version_info))
            last = 0
            while not reader.done():
                version, endpoints = await self._next(last, reader)
                if version == last:
                    break
                last = version
                label = f"{self._epoch}.{version}"
                sent.clear()
                sent[label] = endpoints
                yield _response(label, first.resource_names, endpoints)
        finally:
            reader.cancel()
            gateway.streams -= 1
            if not gateway.streams:
                self._gateways.pop(first.node.id, None)

    async def _read_acks(
        self, requests: AsyncIterator[discovery_pb2.DiscoveryRequest], sent: dict[str, frozenset[str]], gateway: Gateway
    ) -> None:
        """Note what the gateway confirms, until it leaves."""
        async for request in requests:
            if request.HasField("error_detail"):
                logger.error("a gateway refused the endpoints: %s", request.error_detail.message[:500])
            elif request.version_info in sent:
                gateway.acked = sent[request.version_info]
                self._acked.set()
                self._acked = asyncio.Event()

    async def _settle(self, *, has_endpoints: bool) -> None:
        left_s = self._settled_at - monotonic()
        if has_endpoints and left_s > 0:
            await asyncio.sleep(left_s)

    async def _next(self, last: int, reader: asyncio.Task[None]) -> tuple[int, frozenset[str]]:
        """The next version after `last`; `last` itself when the gateway has left."""

        async def newer() -> None:
            async with self._changed:
                await self._changed.wait_for(lambda: self._version > last)

        waiter = asyncio.create_task(newer())
        try:
            await asyncio.wait({waiter, reader}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()
        return (last if reader.done() else self._version), self._endpoints


def _response(version: str, clusters: Iterable[str], endpoints: frozenset[str]) -> discovery_pb2.DiscoveryResponse:
    hosts = [_endpoint(place) for place in sorted(endpoints)]
    response = discovery_pb2.DiscoveryResponse(version_info=version, type_url=TYPE_URL, nonce=version)
    for cluster in clusters:
        packed = any_pb2.Any()
        packed.Pack(
            endpoint_pb2.ClusterLoadAssignment(
                cluster_name=cluster, endpoints=[endpoint_components_pb2.LocalityLbEndpoints(lb_endpoints=hosts)]
            )
        )
        response.resources.append(packed)
    return response


def _endpoint(place: str) -> endpoint_components_pb2.LbEndpoint:
    host, port = split_address(place)
    address = address_pb2.Address(socket_address=address_pb2.SocketAddress(address=host, port_value=port))
    return endpoint_components_pb2.LbEndpoint(endpoint=endpoint_components_pb2.Endpoint(address=address))


async def _resolve(address: str) -> str | None:
    """The "ip:port" of "host:port", IPv4 first; None where the name does not resolve."""
    host, port = split_address(address)
    with contextlib.suppress(ValueError):
        return join_address(str(ipaddress.ip_address(host)), port)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        logger.warning("the worker address %s does not resolve", address)
        return None
    family, *_, place = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return join_address(str(place[0]), port) if family in (socket.AF_INET, socket.AF_INET6) else None
