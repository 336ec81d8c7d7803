"""A controller that has just started, over real sockets: what it says of what it does not know yet."""

from __future__ import annotations

import asyncio
from time import monotonic

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fastchat_grpc import errors
from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import FailoverConfig, LeaseConfig
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.rpc.status import error_from_rpc
from fastchat_grpc.v1 import generation_pb2, generation_pb2_grpc, registry_pb2_grpc
from fastchat_grpc.v1 import registry_pb2 as pb
from tests.conftest import StartWorker, eventually
from tests.integration.controllers import QUICK, running_controller

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LONG = LeaseConfig(time_to_live_s=90.0, heartbeat_interval_s=30.0)
IMPATIENT = FailoverConfig(wait_s=0.2)


async def health_of(channel: grpc.aio.Channel) -> int:
    return int((await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status)


async def test_what_it_does_not_know_is_refused_as_starting_by_every_method() -> None:
    async with (
        running_controller(young=True, lease=LONG, failover=IMPATIENT) as controller,
        open_channel(controller.address) as channel,
    ):
        fleet = registry_pb2_grpc.ControllerServiceStub(channel)
        workers = generation_pb2_grpc.GenerationServiceStub(channel)
        for call in (
            fleet.PickWorker(pb.PickWorkerRequest(model="m")),
            fleet.PickWorker(pb.PickWorkerRequest()),
            workers.CountTokens(generation_pb2.CountTokensRequest(model="m", prompt="p")),
            workers.Embed(generation_pb2.EmbedRequest(model="m")),
            workers.Generate(generation_pb2.GenerateRequest(model="m", prompt="p")).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            error = error_from_rpc(caught.value)
            assert isinstance(error, errors.Starting), error
            assert error.retry_after_s


async def test_it_serves_what_it_knows_and_says_that_it_serves_once_workers_have_come(
    start_worker: StartWorker,
) -> None:
    async with (
        running_controller(young=True, lease=LONG) as controller,
        open_channel(controller.address) as channel,
        AsyncClient(controller.address) as client,
    ):
        assert await health_of(channel) == NOT_SERVING
        await start_worker("m", controllers=(controller.address,))
        await eventually(lambda: len(controller.registry) == 1)
        assert (await client.complete("text", model="m")).text == "text"
        async with asyncio.timeout(10):
            while await health_of(channel) != SERVING:
                await asyncio.sleep(0.02)
        assert not controller.registry.settled


async def test_a_request_that_came_too_early_is_served_when_its_worker_comes(start_worker: StartWorker) -> None:
    async with (
        running_controller(young=True, lease=LONG) as controller,
        AsyncClient(controller.address) as client,
    ):
        early = asyncio.create_task(client.complete("text", model="m"))
        await eventually(lambda: controller.registry.room.waiting("m") == 1)
        await start_worker("m", controllers=(controller.address,))
        assert (await early).text == "text"


async def test_a_wrong_name_is_refused_as_soon_as_the_controller_has_settled() -> None:
    async with (
        running_controller(young=True, lease=QUICK) as controller,
        AsyncClient(controller.address) as client,
        open_channel(controller.address) as channel,
    ):
        started = monotonic()
        with pytest.raises(errors.NoLiveWorker):
            await client.complete("text", model="nope")
        assert monotonic() - started < FailoverConfig().wait_s, "it did not wait until its patience ran out"
        assert controller.registry.settled
        await eventually(lambda: controller._serving)
        assert await health_of(channel) == SERVING


async def test_a_model_whose_only_worker_is_away_while_all_controllers_restart_is_not_unknown(
    start_worker: StartWorker,
) -> None:
    async with (
        running_controller(young=True, lease=QUICK, failover=IMPATIENT) as one,
        running_controller(young=True, lease=QUICK, failover=IMPATIENT) as two,
        AsyncClient([one.address, two.address], failover=IMPATIENT) as client,
    ):
        both = (one.address, two.address)
        await start_worker("other", controllers=both)
        await eventually(lambda: one.registry.settled and two.registry.settled)
        for _ in range(2):
            with pytest.raises(errors.NoLiveWorker):
                await client.complete("text", model="m")
        await start_worker("m", controllers=both)
        await eventually(lambda: len(one.registry) == len(two.registry) == 2)
        assert (await client.complete("text", model="m")).text == "text"


async def test_a_client_that_knows_another_controller_never_hears_of_a_restart(start_worker: StartWorker) -> None:
    async with running_controller(lease=LONG) as steady:
        async with running_controller(lease=LONG) as first:
            port = first.port
            await start_worker("m", controllers=(steady.address, first.address))
            await eventually(lambda: len(steady.registry) == len(first.registry) == 1)
        async with (
            running_controller(port, young=True, lease=LONG, failover=IMPATIENT) as again,
            AsyncClient([again.address, steady.address]) as client,
        ):
            for _ in range(20):
                assert (await client.complete("text", model="m")).text == "text"
