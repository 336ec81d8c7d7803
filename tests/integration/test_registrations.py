"""A worker and the controllers that a name stands for."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from fastchat_grpc.config import ListenConfig
from fastchat_grpc.errors import ConfigError
from fastchat_grpc.rpc.registration import Registration
from fastchat_grpc.rpc.registrations import Registrations, resolve_address
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import echo_config, eventually, running_worker
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
    everywhere = replace(echo_config("m"), controller_addresses=("127.0.0.1:1",))
    with pytest.raises(ConfigError, match="set --worker-address"):
        replace(everywhere, listen=ListenConfig(host="0.0.0.0"))
