"""A worker and the controllers that a name stands for."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from time import monotonic
from typing import Any

import grpc
import pytest

from fastchat_grpc.config import ListenConfig
from fastchat_grpc.core import Load
from fastchat_grpc.errors import ConfigError, LeaseNotFound
from fastchat_grpc.rpc.channels import SERVER_OPTIONS
from fastchat_grpc.rpc.registration import Registration
from fastchat_grpc.rpc.registrations import Registrations, resolve_address
from fastchat_grpc.rpc.status import abort
from fastchat_grpc.v1 import registry_pb2 as pb
from fastchat_grpc.v1 import registry_pb2_grpc
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import StartWorker, echo_config, eventually, running_worker
from tests.e2e.processes import free_port
from tests.integration.controllers import running_controller


async def test_a_worker_follows_the_addresses_of_a_name() -> None:
    async with running_controller() as first, running_controller() as second, running_controller() as third:
        answers = {"fleet:1": [first.address, second.address]}
        async with running_worker(echo_config("m")) as app:
            registrations = Registrations(["fleet:1"], app._registration, lambda name: answers[name], interval_s=0.05)
            following = asyncio.create_task(registrations.run())
            await eventually(lambda: registrations.registered)
            assert len(first.registry.workers()) == len(second.registry.workers()) == 1
            answers["fleet:1"] = [second.address, third.address]
            await eventually(lambda: len(third.registry.workers()) == 1 and not first.registry.workers())
            answers["fleet:1"] = []  # the name server is away: nothing changes
            await asyncio.sleep(0.2)
            assert len(second.registry.workers()) == len(third.registry.workers()) == 1
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await eventually(lambda: not second.registry.workers() and not third.registry.workers())


def test_an_address_stays_itself_and_a_name_is_resolved_in_one_family() -> None:
    assert resolve_address("10.1.2.3:5") == ["10.1.2.3:5"]
    assert resolve_address("[::1]:5") == ["[::1]:5"]
    assert resolve_address("localhost:5") in (["127.0.0.1:5"], ["[::1]:5"])
    assert resolve_address("name.invalid:5") == []


async def test_an_early_push_brings_a_heartbeat_long_before_its_time(worker: WorkerApp) -> None:
    async with running_controller() as controller:
        registration = Registration(
            controller.address, describe=worker._describe, load=worker._monitor.load, interval_s=60
        )
        task = asyncio.create_task(registration.run())
        await eventually(lambda: registration.registered)
        (seen,) = controller.registry.workers()
        before = seen.heartbeat_at
        registration.push()
        await eventually(lambda: seen.heartbeat_at > before, timeout_s=5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_a_worker_that_listens_everywhere_must_say_where_it_is() -> None:
    """Of a controller on another machine; one beside it finds it on the loopback address."""
    everywhere = ListenConfig(host="0.0.0.0")
    with pytest.raises(ConfigError, match="set --worker-address"):
        replace(echo_config("m"), controller_addresses=("controller.test:1",), listen=everywhere)
    assert replace(echo_config("m"), controller_addresses=("127.0.0.1:1",), listen=everywhere).listen is everywhere


@asynccontextmanager
async def _running(registrations: Registrations | Registration) -> AsyncIterator[None]:
    task = asyncio.create_task(registrations.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_name_that_is_slow_or_malformed_holds_up_no_other_address(
    worker: WorkerApp, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    def resolve(address: str) -> list[str]:
        if address.startswith("slow"):
            release.wait(30)
        if address.startswith("broken"):
            raise RuntimeError("the resolver of the test fails")
        return resolve_address(address)

    async with running_controller() as controller:
        addresses = ["slow:1", "a..b:1", "broken:1", controller.address]
        registrations = Registrations(addresses, worker._registration, resolve)
        try:
            async with _running(registrations):
                await eventually(lambda: len(controller.registry.workers()) == 1)
                assert not registrations.registered, "not with all of them"
        finally:
            release.set()
    assert "the resolver of the test fails" in caplog.text
    assert "Task exception was never retrieved" not in caplog.text


def test_a_name_that_is_none_resolves_to_nothing() -> None:
    assert resolve_address("a..b:80") == []
    assert resolve_address(f"{'x' * 64}.example:80") == []


async def test_a_fault_in_what_is_reported_neither_ends_nor_gives_up_the_lease(
    worker: WorkerApp, caplog: pytest.LogCaptureFixture
) -> None:
    """Of FastChat it is known that one failed registration ends the thread that sends heartbeats."""
    broken: set[str] = {"describe"}

    def describe() -> Any:
        if "describe" in broken:
            raise ValueError("cannot describe")
        return worker._describe()

    def load() -> Load:
        if "load" in broken:
            raise OSError("cannot read the load")
        return worker._monitor.load()

    async with running_controller() as controller:
        registration = Registration(controller.address, describe=describe, load=load)
        async with _running(registration):
            await eventually(lambda: "cannot describe" in caplog.text)
            broken.clear()
            await eventually(lambda: registration.registered)
            broken.add("load")
            await eventually(lambda: "cannot read the load" in caplog.text)
            assert registration.registered, "it does not deregister"
            await eventually(lambda: not controller.registry.workers())
            broken.clear()
            await eventually(lambda: len(controller.registry.workers()) == 1)
    assert "Traceback" in caplog.text


async def test_an_interval_that_would_lose_the_lease_is_lowered_with_one_warning(
    start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_controller() as controller:
        worker = await start_worker(controllers=(controller.address,), heartbeat_interval_s=45)
        await eventually(lambda: worker.registered)
        (seen,) = controller.registry.workers()
        for _ in range(3):
            before = seen.heartbeat_at
            await eventually(lambda before=before: seen.heartbeat_at > before)  # type: ignore[misc]
        assert controller.registry.workers() == [seen]
    assert caplog.text.count("a heartbeat each 45 s would lose the lease of 0.9 s") == 1


class _Silent(registry_pb2_grpc.ControllerServiceServicer):
    """A controller of another make: it names no times, and counts."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:
        self.calls["Register"] += 1
        return pb.RegisterResponse(lease_id="lease")

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
        self.calls["Heartbeat"] += 1
        return pb.HeartbeatResponse()

    async def Deregister(self, request: pb.DeregisterRequest, context: Any) -> pb.DeregisterResponse:
        return pb.DeregisterResponse()


@asynccontextmanager
async def _controller(servicer: _Silent, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    registry_pb2_grpc.add_ControllerServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def test_a_controller_that_names_no_interval_is_not_flooded(worker: WorkerApp) -> None:
    servicer = _Silent()
    async with _controller(servicer) as port:
        registration = Registration(f"127.0.0.1:{port}", describe=worker._describe, load=worker._monitor.load)
        async with _running(registration):
            await eventually(lambda: registration.registered)
            await asyncio.sleep(1.0)  # thousands of heartbeats, were there no pause
            assert servicer.calls["Heartbeat"] <= 2


async def test_early_heartbeats_are_bounded_and_urgent_ones_are_not(worker: WorkerApp) -> None:
    servicer = _Silent()
    async with _controller(servicer) as port:
        registration = Registration(f"127.0.0.1:{port}", describe=worker._describe, load=worker._monitor.load)
        async with _running(registration):
            await eventually(lambda: registration.registered)
            until = monotonic() + 1.5
            while monotonic() < until:
                registration.push(urgent=False)
                await asyncio.sleep(0.01)
            assert servicer.calls["Heartbeat"] <= 6  # a burst of four, one more, and a regular one
            sent = servicer.calls["Heartbeat"]
            registration.push()
            await eventually(lambda: servicer.calls["Heartbeat"] > sent, timeout_s=1.5)


async def test_a_fleet_registers_as_soon_as_its_controller_is_back(worker: WorkerApp) -> None:
    """The connections tell: the time of a heartbeat is a minute away. And nobody registers twice."""
    first, second, port = _Forgetful(), _Forgetful(), free_port()
    async with AsyncExitStack() as stack:
        async with _controller(first, port):
            fleet = [
                Registration(f"127.0.0.1:{port}", describe=worker._describe, load=worker._monitor.load, interval_s=60.0)
                for _ in range(50)
            ]
            for registration in fleet:
                await stack.enter_async_context(_running(registration))
            await eventually(lambda: all(registration.registered for registration in fleet))
        await asyncio.sleep(1.0)  # long enough for the backoff to be at its longest
        back_at = monotonic()
        async with _controller(second, port):
            await eventually(lambda: all(registration._answered_at > back_at for registration in fleet))
            assert second.calls["Register"] == 50


class _Forgetful(_Silent):
    """As after a restart: no lease is known but one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._leases: set[str] = set()

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:
        self.calls["Register"] += 1
        lease = f"{id(self)} {self.calls['Register']}"
        self._leases.add(lease)
        response = pb.RegisterResponse(lease_id=lease)
        response.time_to_live.FromSeconds(600)
        response.heartbeat_interval.FromSeconds(2)
        return response

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
        if request.lease_id not in self._leases:
            await abort(context, LeaseNotFound("no such lease"))
        return await super().Heartbeat(request, context)
