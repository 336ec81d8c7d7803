"""The endpoint service without Envoy: what a subscription is told, and what it costs to know it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from envoy.config.core.v3 import base_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2

from fastchat_grpc.config import join_address, split_address
from fastchat_grpc.controller.envoy import eds, names
from fastchat_grpc.controller.envoy.eds import Endpoints
from fastchat_grpc.controller.fleet import Worker, WorkerSpec
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.core import Load, ModelInfo
from tests.conftest import eventually


class Context:
    def invocation_metadata(self) -> Any:
        return ()


class Site:
    """A registry, the service over it, and one gateway that subscribes to it."""

    def __init__(self, settle_s: float = 0.0) -> None:
        self.registry = Registry()
        self.lookups: Counter[str] = Counter()
        self.names: dict[str, str] = {}
        self.service = Endpoints(self.registry, settle_s, self._resolve)
        self._requests: asyncio.Queue[discovery_pb2.DiscoveryRequest | None] = asyncio.Queue()

    async def _resolve(self, address: str) -> str | None:
        self.lookups[address] += 1
        host, port = split_address(address)
        return join_address(self.names[host], port) if host in self.names else None

    def add(self, number: int, address: str = "", instance: str = "1") -> Worker:
        spec = WorkerSpec(
            worker_id=f"w{number}",
            instance_id=f"i{number}-{instance}",
            address=address or f"10.0.{number // 250}.{number % 250}:21002",
            models=(ModelInfo(name="m", context_length=10),),
        )
        return self.registry.register(spec, Load())

    def ask(self, *clusters: str, version: str = "") -> None:
        node = base_pb2.Node(id="gateway")
        self._requests.put_nowait(
            discovery_pb2.DiscoveryRequest(node=node, resource_names=clusters, version_info=version)
        )

    def leave(self) -> None:
        self._requests.put_nowait(None)

    async def _stream(self) -> AsyncIterator[discovery_pb2.DiscoveryRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    @asynccontextmanager
    async def running(self) -> AsyncIterator[AsyncIterator[discovery_pb2.DiscoveryResponse]]:
        """The service at work, and what it sends to the gateway."""
        following = asyncio.gather(self.service.run(), self.service.names.run())
        try:
            async with (
                asyncio.timeout(30),
                aclosing(self.service.StreamEndpoints(self._stream(), Context())) as told,  # type: ignore[arg-type]
            ):
                yield told
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            self.service.close()


def places(response: discovery_pb2.DiscoveryResponse) -> dict[str, set[str]]:
    """The places of each cluster that a response is about."""
    found: dict[str, set[str]] = {}
    for resource in response.resources:
        assignment = endpoint_pb2.ClusterLoadAssignment()
        assert resource.Unpack(assignment)
        sockets = [e.endpoint.address.socket_address for group in assignment.endpoints for e in group.lb_endpoints]
        found[assignment.cluster_name] = {join_address(place.address, place.port_value) for place in sockets}
    return found


@pytest.fixture
def site() -> Site:
    return Site()


async def test_an_empty_fleet_is_told_at_once(site: Site) -> None:
    site.ask("workers")
    # Nobody runs the service: the answer waits for nothing.
    async with asyncio.timeout(30), aclosing(site.service.StreamEndpoints(site._stream(), Context())) as told:  # type: ignore[arg-type]
        assert places(await anext(told)) == {"workers": set()}


async def test_a_cluster_that_is_asked_for_later_is_answered_too(site: Site) -> None:
    async with site.running() as told:
        site.ask("workers")
        assert places(await anext(told)) == {"workers": set()}
        site.ask("workers", "unheard-of")
        assert places(await anext(told)) == {"workers": set(), "unheard-of": set()}


async def test_workers_that_come_and_go_are_told(site: Site) -> None:
    async with site.running() as told:
        site.ask("workers")
        await anext(told)
        first, second = site.add(1), site.add(2)
        assert places(await anext(told)) == {"workers": {"10.0.0.1:21002", "10.0.0.2:21002"}}
        site.registry.deregister(first.lease_id)
        assert places(await anext(told)) == {"workers": {"10.0.0.2:21002"}}
        moved = site.add(2, "10.9.9.9:1", instance="1")  # the same process, at another address
        assert moved is second
        site.registry.drain("w2", None)  # a change of state is when it is looked at
        assert places(await anext(told)) == {"workers": {"10.9.9.9:1"}}


async def test_what_a_gateway_has_confirmed_is_what_it_can_be_sent_to(site: Site) -> None:
    worker = site.add(1)
    async with site.running() as told:
        assert site.service.location(worker, "gateway") is None  # it is not connected here
        site.ask("workers")
        await anext(told)
        second = await anext(told)
        assert site.service.location(worker, "gateway") is None
        waiting = asyncio.create_task(site.service.acked())
        await asyncio.sleep(0)
        site.ask("workers", version=second.version_info)
        await waiting
        assert site.service.location(worker, "gateway") == "10.0.0.1:21002"
        assert site.service.location(site.add(2), "gateway") is None
        site.leave()
        with pytest.raises(StopAsyncIteration):
            while True:
                await anext(told)
        assert site.service._gateways == {}


async def test_each_name_is_looked_up_once_however_many_batches_follow(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eds, "GATHER_S", 0.0)
    monkeypatch.setattr(eds, "GATHER_PER_WORKER_S", 0.0)
    site.names = {f"host{i}": f"10.1.0.{i}" for i in range(40)}
    async with site.running() as told:
        site.ask("workers")
        await anext(told)
        for i in range(40):
            site.add(i, f"host{i}:21002")
            response = await anext(told)
            assert len(places(response)["workers"]) == i + 1
            site.ask("workers", version=response.version_info)
        assert set(site.lookups.values()) == {1}
        site.add(100)
        await anext(told)
        assert sum(site.lookups.values()) == 40  # an address that is an IP already is not looked up


async def test_names_are_looked_up_again_from_time_to_time_and_keep_what_they_had(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "RESOLVE_S", 0.01)
    site.names = {"here": "10.1.0.1"}
    worker = site.add(1, "here:5")
    async with site.running() as told:
        site.ask("workers")
        while places(await anext(told))["workers"] != {"10.1.0.1:5"}:
            pass
        site.names = {"here": "10.1.0.2"}
        assert places(await anext(told)) == {"workers": {"10.1.0.2:5"}}
        site.names = {}
        before = site.lookups["here:5"]
        while site.lookups["here:5"] < before + 2:
            await asyncio.sleep(0.01)
        assert site.service.names.get(worker.spec.address) == "10.1.0.2:5"


async def test_a_place_stays_while_one_of_its_workers_does(site: Site) -> None:
    first, second = site.add(1, "10.0.0.1:5"), site.add(2, "10.0.0.1:5")
    site.registry.deregister(first.lease_id)
    assert site.service.names.get(second.spec.address) == "10.0.0.1:5"
    site.registry.deregister(second.lease_id)
    assert site.service.names.get(second.spec.address) is None


async def test_a_gateway_that_has_endpoints_keeps_them_while_a_restarted_controller_settles() -> None:
    site = Site(settle_s=1.0)
    async with site.running() as told:
        site.ask("workers", version="of the controller before")
        site.add(1)
        assert places(await anext(told)) == {"workers": {"10.0.0.1:21002"}}  # never the empty set of the start


async def test_a_slow_or_malformed_name_holds_no_other_worker_up(site: Site) -> None:
    async def hang(address: str) -> str | None:
        await asyncio.sleep(3600)
        return None

    site.service.names._resolve = hang
    async with site.running() as told:
        site.ask("workers")
        await anext(told)
        site.add(1, "slow:1")
        site.add(2, "10.0.0.2:5")
        assert places(await anext(told)) == {"workers": {"10.0.0.2:5"}}


async def test_many_names_that_hang_again_hold_up_their_like_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "LOOKUPS", 2)
    monkeypatch.setattr(names, "FIRST_RETRY_S", 0.01)
    hanging: Counter[str] = Counter()

    async def hang(address: str) -> str | None:
        if address.startswith("good"):
            return "10.0.0.9:5"
        hanging[address] += 1
        if hanging[address] > 1:  # at first it is unknown at once
            await asyncio.sleep(3600)
        return None

    site.service.names._resolve = hang
    async with site.running() as told:
        site.ask("workers")
        await anext(told)
        for i in range(5):
            site.add(i, f"slow-{i}:1")
        await eventually(lambda: sorted(hanging.values()) == [1, 1, 1, 2, 2])  # no more at once than they may
        site.add(9, "good:5")
        assert places(await anext(told)) == {"workers": {"10.0.0.9:5"}}


@pytest.mark.parametrize("address", ["a..b:80", "x" * 300 + ":80", "no-port", ":1", "\udc80:1", "[::1:5", "a b:70000"])
async def test_an_address_that_is_none_ends_nothing(site: Site, address: str) -> None:
    site.service.names._resolve = site.service.names._ask_resolver
    async with site.running() as told:
        site.ask("workers")
        await anext(told)
        bad = site.add(1, address)
        site.add(2, "10.0.0.2:5")
        assert places(await anext(told)) == {"workers": {"10.0.0.2:5"}}
        site.registry.deregister(bad.lease_id)
        site.add(3, "10.0.0.3:5")
        assert places(await anext(told)) == {"workers": {"10.0.0.2:5", "10.0.0.3:5"}}


async def test_a_name_that_resolves_late_is_found_soon(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "FIRST_RETRY_S", 0.01)
    async with site.running() as told:
        site.ask("workers")
        await anext(told)
        site.add(1, "late:5")
        while site.lookups["late:5"] < 3:
            await asyncio.sleep(0.005)
        site.names["late"] = "10.0.0.9"
        assert places(await anext(told)) == {"workers": {"10.0.0.9:5"}}


async def test_confirmations_that_come_late_count_while_the_fleet_changes(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that is always some versions behind still has what it confirmed."""
    monkeypatch.setattr(eds, "GATHER_S", 0.0)
    async with site.running() as told:
        site.ask("workers")
        versions = [(await anext(told)).version_info]
        workers = []
        for number in range(1, 7):
            workers.append(site.add(number))
            versions.append((await anext(told)).version_info)
            if number > 2:  # two versions behind
                site.ask("workers", version=versions[number - 2])
                await site.service.acked()
                assert site.service.location(workers[number - 3], "gateway") is not None
                assert site.service.location(workers[number - 1], "gateway") is None


async def test_a_gateway_that_confirms_nothing_is_not_sent_more_and_more(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eds, "GATHER_S", 0.0)
    monkeypatch.setattr(eds, "IN_FLIGHT", 3)
    async with site.running() as told:
        site.ask("workers")
        last = await anext(told)
        for number in range(1, 3):
            site.add(number)
            last = await anext(told)
        waiting = asyncio.ensure_future(anext(told))
        site.add(3)
        site.add(4)
        await asyncio.sleep(0.05)
        assert not waiting.done()
        site.ask("workers", version=last.version_info)
        assert len(places(await waiting)["workers"]) == 4


async def test_what_many_gateways_are_told_is_built_once(site: Site) -> None:
    site.add(1)
    async with site.running() as told:
        site.ask("workers")
        first = await anext(told)
        site.ask("workers", version=first.version_info)
        stream = next(iter(site.service._streams))
        assert site.service._answer(stream) is site.service._answer(stream)


async def test_an_endpoint_says_the_name_that_its_certificate_must_have(site: Site) -> None:
    site.names["w1.example"] = "10.0.0.1"
    site.add(1, "w1.example:5")
    site.add(2, "10.0.0.2:5")
    async with site.running() as told:
        site.ask("workers")
        response = await anext(told)
        while len(places(response)["workers"]) < 2:
            response = await anext(told)
        assignment = endpoint_pb2.ClusterLoadAssignment.FromString(response.resources[0].value)
        found = {
            host.endpoint.hostname: "envoy.transport_socket_match" in host.metadata.filter_metadata
            for host in assignment.endpoints[0].lb_endpoints
        }
        assert found == {"w1.example": True, "10.0.0.2": False}
