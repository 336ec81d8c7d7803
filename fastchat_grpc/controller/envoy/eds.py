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
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
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
GATHER_PER_WORKER_S = 20e-6
"""And so much longer for each address: about what one batch costs to build and send."""
RESOLVE_S = 30.0
"""Names of workers are resolved again this often."""


class Gateway:
    """What one gateway's Envoy has: `acked` are the "ip:port" it has confirmed, None before the first time."""

    def __init__(self) -> None:
        self.acked: frozenset[str] | None = None
        self.streams = 0


class _Stream:
    """One subscription: the clusters that it asks for, and what it was sent and has not replaced."""

    def __init__(self, gateway: Gateway, first: discovery_pb2.DiscoveryRequest) -> None:
        self.gateway = gateway
        self.clusters = tuple(first.resource_names)
        self.sent: dict[str, frozenset[str]] = {}
        self.open = True
        self.wake = asyncio.Event()
        self.wake.set()


class Endpoints(eds_pb2_grpc.EndpointDiscoveryServiceServicer):  # type: ignore[misc]
    """The endpoint discovery service (state of the world).

    A subscription is answered at once, with an empty assignment where there is no worker: Envoy would wait
    for it otherwise, and warn.

    Args:
        registry: the workers.
        settle_s: time from the start in which a gateway that has endpoints already keeps them.
        authorize: raises for callers that do not belong to the fleet; gets the call's metadata.
        resolve: from "host:port" to "ip:port"; None where the name does not resolve.
    """

    def __init__(
        self,
        registry: Registry,
        settle_s: float,
        authorize: Callable[[Any], None],
        resolve: Callable[[str], Awaitable[str | None]] | None = None,
    ) -> None:
        self._authorize = authorize
        self._resolve = resolve or resolve_name
        self._settled_at = monotonic() + settle_s
        self._epoch = time_ns()
        self._version = 1
        self._endpoints: frozenset[str] = frozenset()
        self._advertised: dict[Worker, str] = {}
        self._users: Counter[str] = Counter()
        self._resolved: dict[str, str] = {}
        self._unresolved: set[str] = set()
        self._dirty = asyncio.Event()
        self._streams: set[_Stream] = set()
        self._gateways: dict[str, Gateway] = {}
        self._acked = asyncio.Event()
        for worker in registry.workers():
            self._follow(worker)
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
        all_at = monotonic() + RESOLVE_S
        while True:
            with contextlib.suppress(TimeoutError):
                # Not wait_for: in Python 3.11 it loses a cancel that comes together with its result.
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(0.0, all_at - monotonic())):
                    await self._dirty.wait()
                # Each batch costs the whole set, so a large fleet's batches are fewer.
                await asyncio.sleep(GATHER_S + len(self._users) * GATHER_PER_WORKER_S)
            self._dirty.clear()
            if monotonic() >= all_at:
                all_at = monotonic() + RESOLVE_S
                self._unresolved.update(address for address in self._users if _literal(address) is None)
            await self._look_up()
            self._publish()

    # ----------------------------------------------------------------------------- the fleet

    def _on_change(self, change: Change) -> None:
        worker = change.worker
        if change.kind is ChangeKind.REMOVED:
            self._unfollow(worker)
        elif change.kind is ChangeKind.ADDED:
            self._follow(worker)
        elif change.kind is ChangeKind.STATE and self._advertised.get(worker) != worker.spec.address:
            self._unfollow(worker)
            self._follow(worker)

    def _follow(self, worker: Worker) -> None:
        address = worker.spec.address
        self._advertised[worker] = address
        self._users[address] += 1
        if self._users[address] > 1:
            return
        if (place := _literal(address)) is not None:
            self._resolved[address] = place  # can be used at once
        else:
            self._unresolved.add(address)
        self._dirty.set()

    def _unfollow(self, worker: Worker) -> None:
        address = self._advertised.pop(worker, None)
        if address is None:
            return
        self._users[address] -= 1
        if not self._users[address]:
            del self._users[address]
            self._resolved.pop(address, None)
            self._unresolved.discard(address)
            self._dirty.set()

    async def _look_up(self) -> None:
        """Resolve the names that are new or due; one that does not resolve now keeps the address that it had."""
        names, self._unresolved = list(self._unresolved), set()
        places = await asyncio.gather(*map(self._resolve, names))
        for name, place in zip(names, places, strict=True):
            if place is not None and name in self._users:
                self._resolved[name] = place

    def _publish(self) -> None:
        endpoints = frozenset(self._resolved.values())
        if endpoints != self._endpoints:
            self._endpoints = endpoints
            self._version += 1
            for stream in self._streams:
                stream.wake.set()

    # -------------------------------------------------------------------------- the gateways

    async def StreamEndpoints(
        self, requests: AsyncIterator[discovery_pb2.DiscoveryRequest], context: Context
    ) -> AsyncIterator[discovery_pb2.DiscoveryResponse]:
        self._authorize(context.invocation_metadata())
        first = await anext(requests, None)
        if first is None:
            return
        gateway = self._gateways.setdefault(first.node.id, Gateway())
        gateway.streams += 1
        stream = _Stream(gateway, first)
        self._streams.add(stream)
        reader = asyncio.create_task(self._read(requests, stream))
        try:
            await self._settle(has_endpoints=bool(first.version_info))
            told: tuple[int, tuple[str, ...]] | None = None
            while True:
                await stream.wake.wait()
                stream.wake.clear()
                if not stream.open:
                    return
                if told != (self._version, stream.clusters):
                    told = (self._version, stream.clusters)
                    yield self._answer(stream)
        finally:
            reader.cancel()
            self._streams.discard(stream)
            gateway.streams -= 1
            if not gateway.streams:
                self._gateways.pop(first.node.id, None)

    def _answer(self, stream: _Stream) -> discovery_pb2.DiscoveryResponse:
        label = f"{self._epoch}.{self._version}"
        stream.sent.clear()
        stream.sent[label] = self._endpoints
        return _response(label, stream.clusters, self._endpoints)

    async def _read(self, requests: AsyncIterator[discovery_pb2.DiscoveryRequest], stream: _Stream) -> None:
        """Note what the gateway asks for and confirms, until it leaves."""
        try:
            async for request in requests:
                if request.HasField("error_detail"):
                    logger.error("a gateway refused the endpoints: %s", request.error_detail.message[:500])
                elif request.version_info in stream.sent:
                    stream.gateway.acked = stream.sent[request.version_info]
                    self._acked.set()
                    self._acked = asyncio.Event()
                if (clusters := tuple(request.resource_names)) != stream.clusters:
                    stream.clusters = clusters
                    stream.wake.set()
        finally:
            stream.open = False
            stream.wake.set()

    async def _settle(self, *, has_endpoints: bool) -> None:
        left_s = self._settled_at - monotonic()
        if has_endpoints and left_s > 0:
            await asyncio.sleep(left_s)


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


def _literal(address: str) -> str | None:
    """An address whose host is an IP already, in its usual form; None for a name."""
    host, port = split_address(address)
    with contextlib.suppress(ValueError):
        return join_address(str(ipaddress.ip_address(host)), port)
    return None


async def resolve_name(address: str) -> str | None:
    """The "ip:port" of "host:port", IPv4 first; None where the name does not resolve."""
    if (place := _literal(address)) is not None:
        return place
    host, port = split_address(address)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        logger.warning("the worker address %s does not resolve", address)
        return None
    family, *_, ip = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return join_address(str(ip[0]), port) if family in (socket.AF_INET, socket.AF_INET6) else None
