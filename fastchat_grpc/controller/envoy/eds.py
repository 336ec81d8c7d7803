"""EDS: tells a gateway's Envoy where the workers are.

Envoy wants IP addresses, so names are resolved here. A gateway has a cluster of workers for each of its
controllers: a controller picks among the workers that it has told of, and that the gateway has confirmed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from time import monotonic, time_ns
from typing import Any

import grpc
from envoy.config.core.v3 import address_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2
from envoy.service.endpoint.v3 import eds_pb2_grpc
from google.protobuf import any_pb2

from fastchat_grpc.config import join_address, split_address
from fastchat_grpc.controller.envoy.names import Names, Resolve, literal
from fastchat_grpc.controller.fleet import Change, ChangeKind, Worker
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.rpc.bridge import NAMED_KEY
from fastchat_grpc.rpc.printable import printable

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE_NAME = "envoy.service.endpoint.v3.EndpointDiscoveryService"
TYPE_URL = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
GATHER_S = 0.02
"""Changes are gathered this long before they are sent, so that a fleet's start is a few messages, not one each."""
GATHER_PER_WORKER_S = 20e-6
"""And so much longer for each address: about what one batch costs to build and send."""
IN_FLIGHT = 16
"""Versions that a gateway may have to confirm yet; then it is sent no more until it does."""

Places = Mapping[str, str]


class Gateway:
    """What one gateway's Envoy has: `acked` are the "ip:port" it has confirmed, None before the first time."""

    def __init__(self) -> None:
        self.acked: Places | None = None
        self.cluster = ""
        self.streams = 0


class _Stream:
    """One subscription: the clusters that it asks for, and the versions that it was sent and has not confirmed."""

    def __init__(self, gateway: Gateway, first: discovery_pb2.DiscoveryRequest) -> None:
        self.gateway = gateway
        self.clusters: tuple[str, ...] = ()
        self.sent: dict[str, Places] = {}
        self.open = True
        self.wake = asyncio.Event()
        self.ask(first)

    def ask(self, request: discovery_pb2.DiscoveryRequest) -> None:
        """Note the clusters that are asked for."""
        if (clusters := tuple(request.resource_names)) != self.clusters:
            self.clusters = clusters
            self.gateway.cluster = clusters[0] if clusters else ""
            self.wake.set()

    def confirm(self, version: str) -> bool:
        """The gateway has a version, and so none before it. False for one that it was not sent, or has confirmed."""
        if version not in self.sent:
            return False
        while True:
            oldest = next(iter(self.sent))
            places = self.sent.pop(oldest)
            if oldest == version:
                self.gateway.acked = places
                self.wake.set()
                return True


class Endpoints(eds_pb2_grpc.EndpointDiscoveryServiceServicer):  # type: ignore[misc]
    """The endpoint discovery service (state of the world).

    A subscription is answered at once, with an empty assignment where there is no worker: Envoy would wait
    for it otherwise, and warn. Only a gateway that has endpoints of before keeps them while this controller
    has just started and knows nobody yet.

    Args:
        registry: the workers.
        settle_s: how long such a gateway keeps them at most.
        resolve: from "host:port" to "ip:port"; None where the name does not resolve.
    """

    def __init__(self, registry: Registry, settle_s: float, resolve: Resolve | None = None) -> None:
        self._settled_at = monotonic() + settle_s
        self._epoch = time_ns()
        self._version = 1
        self._places: Places = {}
        self._hosts: dict[tuple[str, str], endpoint_components_pb2.LbEndpoint] = {}
        self._responses: dict[tuple[str, ...], discovery_pb2.DiscoveryResponse] = {}  # of this version
        self._advertised: dict[Worker, str] = {}
        self._dirty = asyncio.Event()
        self._streams: set[_Stream] = set()
        self._gateways: dict[str, Gateway] = {}
        self._acked = asyncio.Event()
        self.pushed = 0
        """Sets of endpoints sent to gateways since start."""
        self.names = Names(self._dirty.set, resolve)
        for worker in registry.workers():
            self._follow(worker)
        self._unsubscribe = registry.subscribe(self._on_change)

    def close(self) -> None:
        """Hear of no more changes."""
        self._unsubscribe()

    def location(self, worker: Worker, gateway: str) -> str | None:
        """The worker's "ip:port" for a gateway; None where its name is not resolved or the gateway lacks it yet.

        A gateway that is not connected here lacks everybody: what it has, it has of other controllers.
        """
        place = self.names.get(worker.spec.address)
        known = self._gateways.get(gateway)
        if place is None or known is None or known.acked is None:
            return None
        return place if place in known.acked else None

    def cluster(self, gateway: str) -> str:
        """The cluster of a gateway that has this controller's workers; empty for one that is not connected."""
        known = self._gateways.get(gateway)
        return known.cluster if known is not None else ""

    @property
    def gateway_count(self) -> int:
        """Gateways that are connected."""
        return len(self._gateways)

    @property
    def endpoint_count(self) -> int:
        """Endpoints that they are told of."""
        return len(self._places)

    async def acked(self) -> None:
        """Return at the next confirmation of a gateway."""
        await self._acked.wait()

    async def run(self) -> None:
        """Publish changes until cancelled; `names` runs beside it."""
        while True:
            await self._dirty.wait()
            # Each batch costs the whole set, so a large fleet's batches are fewer.
            await asyncio.sleep(GATHER_S + len(self.names) * GATHER_PER_WORKER_S)
            self._dirty.clear()
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
        self._advertised[worker] = worker.spec.address
        self.names.use(worker.spec.address)

    def _unfollow(self, worker: Worker) -> None:
        address = self._advertised.pop(worker, None)
        if address is not None:
            self.names.drop(address)

    def _publish(self) -> None:
        places = self.names.places()
        if places != self._places:
            self._places = places
            before = self._hosts
            self._hosts = {item: before.get(item) or _endpoint(*item) for item in sorted(places.items())}
            self._responses.clear()
            self._version += 1
            for stream in self._streams:
                stream.wake.set()

    # -------------------------------------------------------------------------- the gateways

    async def StreamEndpoints(
        self, requests: AsyncIterator[discovery_pb2.DiscoveryRequest], context: Context
    ) -> AsyncIterator[discovery_pb2.DiscoveryResponse]:
        first = await anext(requests, None)
        if first is None:
            return
        gateway = self._gateways.setdefault(first.node.id, Gateway())
        gateway.streams += 1
        stream = _Stream(gateway, first)
        self._streams.add(stream)
        reader = asyncio.create_task(self._read(requests, stream))
        try:
            if first.version_info:
                await self._settle(stream)
            told: tuple[int, tuple[str, ...]] | None = None
            while stream.open:
                if told != (self._version, stream.clusters) and len(stream.sent) < IN_FLIGHT:
                    told = (self._version, stream.clusters)
                    yield self._answer(stream)
                    continue
                await stream.wake.wait()
                stream.wake.clear()
        finally:
            reader.cancel()
            self._streams.discard(stream)
            gateway.streams -= 1
            if not gateway.streams:
                self._gateways.pop(first.node.id, None)

    def _answer(self, stream: _Stream) -> discovery_pb2.DiscoveryResponse:
        self.pushed += 1
        label = f"{self._epoch}.{self._version}"
        stream.sent.pop(label, None)  # the same for other clusters: it is the last one again
        stream.sent[label] = self._places
        # Many gateways ask for the same.
        response = self._responses.get(stream.clusters)
        if response is None:
            response = self._responses[stream.clusters] = _response(label, stream.clusters, self._hosts.values())
        return response

    async def _read(self, requests: AsyncIterator[discovery_pb2.DiscoveryRequest], stream: _Stream) -> None:
        """Note what the gateway asks for and confirms, until it leaves."""
        try:
            async for request in requests:
                if request.HasField("error_detail"):
                    logger.error("a gateway refused the endpoints: %s", printable(request.error_detail.message))
                    stream.sent.pop(request.response_nonce, None)
                elif stream.confirm(request.version_info):
                    self._acked.set()
                    self._acked = asyncio.Event()
                stream.ask(request)
        finally:
            stream.open = False
            stream.wake.set()

    async def _settle(self, stream: _Stream) -> None:
        """Wait for the first worker, or for the end of the time in which there may be none yet."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._settled_at - monotonic())):
                while stream.open and not self._places:
                    await stream.wake.wait()
                    stream.wake.clear()


def _response(
    version: str, clusters: tuple[str, ...], hosts: Iterable[endpoint_components_pb2.LbEndpoint]
) -> discovery_pb2.DiscoveryResponse:
    group = endpoint_components_pb2.LocalityLbEndpoints(lb_endpoints=hosts)
    response = discovery_pb2.DiscoveryResponse(version_info=version, type_url=TYPE_URL, nonce=version)
    for cluster in clusters:
        packed = any_pb2.Any()
        packed.Pack(endpoint_pb2.ClusterLoadAssignment(cluster_name=cluster, endpoints=[group]))
        response.resources.append(packed)
    return response


def _endpoint(place: str, hostname: str) -> endpoint_components_pb2.LbEndpoint:
    host, port = split_address(place)
    address = address_pb2.Address(socket_address=address_pb2.SocketAddress(address=host, port_value=port))
    found = endpoint_components_pb2.LbEndpoint(
        endpoint=endpoint_components_pb2.Endpoint(address=address, hostname=hostname)
    )
    if literal(join_address(hostname, 1)) is None:
        found.metadata.filter_metadata["envoy.transport_socket_match"].update({NAMED_KEY: True})
    return found
