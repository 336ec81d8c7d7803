"""A controller and workers together, over real sockets: joining, leaving, and what survives what."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from fastchat_grpc import errors
from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import FailoverConfig
from fastchat_grpc.core import Completion, Delta
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import StartWorker, echo_config, eventually, running_worker
from tests.e2e.processes import free_port
from tests.integration.controllers import running_controller, vanish

TEXT = "a text that takes a while to say"


async def test_a_generation_through_the_controller_is_the_workers(start_worker: StartWorker) -> None:
    async with running_controller() as controller:
        app = await start_worker("m", controllers=(controller.address,))
        await eventually(lambda: app.registered)
        async with AsyncClient(controller.address) as client:
            assert (await client.complete(TEXT, model="m")).text == TEXT
            assert [entry.model.name for entry in await client.models()] == ["m"]
            assert list((await client.embed(["x"], model="m")).embeddings[0])
            assert await client.count_tokens("four", model="m") == 4
            with pytest.raises(errors.ModelNotFound):
                await client.complete("x", model="nope")


async def test_a_restarted_controller_knows_its_workers_within_two_intervals(start_worker: StartWorker) -> None:
    async with running_controller() as first:
        port, app = first.port, await start_worker("m", controllers=(first.address,))
        await eventually(lambda: app.registered)
    async with running_controller(port) as second, AsyncClient(second.address) as client:
        await eventually(lambda: len(second.registry.workers()) == 1, timeout_s=5)
        assert (await client.complete(TEXT)).text == TEXT


async def test_a_restarted_controller_knows_workers_that_send_no_heartbeats(start_worker: StartWorker) -> None:
    async with running_controller() as first:
        port, app = first.port, await start_worker("m", controllers=(first.address,), check_heartbeat=False)
        await eventually(lambda: app.registered)
        lease = first.registry.workers()[0].lease_id
    async with running_controller(port) as second:
        await eventually(lambda: len(second.registry.workers()) == 1)
        [worker] = second.registry.workers()
        assert not worker.spec.check_heartbeat
        assert worker.lease_id != lease


async def test_a_worker_without_heartbeats_registers_once_while_its_controller_stays(
    start_worker: StartWorker,
) -> None:
    async with running_controller() as controller:
        app = await start_worker("m", controllers=(controller.address,), check_heartbeat=False)
        await eventually(lambda: app.registered)
        [worker] = controller.registry.workers()
        lease = worker.lease_id
        app._registrations.push()  # the load has changed: nobody asks
        await asyncio.sleep(1.2)  # longer than its lease
        assert worker.lease_id == lease
        app._registrations.renew()  # the description has changed: that is told
        await eventually(lambda: worker.lease_id != lease)


@pytest.mark.parametrize("count", [1, 2])
async def test_a_client_waits_for_its_controllers_and_uses_no_attempts_up_meanwhile(
    start_worker: StartWorker, count: int
) -> None:
    """Each address is asked once; then none of them before it is back."""
    async with AsyncExitStack() as stack:
        before = [await stack.enter_async_context(running_controller()) for _ in range(count)]
        addresses = [controller.address for controller in before]
        app = await start_worker("m", controllers=tuple(addresses), options={"delay_ms": "20"})
        await eventually(lambda: app.registered)
        once = FailoverConfig(max_attempts=count + 1, max_resumes=count)
        client = await stack.enter_async_context(AsyncClient(addresses, failover=once))
        running = asyncio.create_task(client.complete(TEXT, model="m", stream_interval=1))
        await eventually(lambda: app._generation.output_tokens > 3)
        for controller in before:
            await controller._server._server.stop(0)
        new = [asyncio.create_task(client.count_tokens("four", model="m")) for _ in range(2)]
        await asyncio.sleep(1.0)  # longer than any number of quick tries would last
        for controller in before:
            await stack.enter_async_context(running_controller(controller.port, young=True))
        assert (await asyncio.wait_for(running, 20)).text == TEXT
        assert await asyncio.wait_for(asyncio.gather(*new), 20) == [4, 4]


async def test_a_client_that_waits_for_one_controller_hears_of_it_when_the_other_has_a_worker_again(
    start_worker: StartWorker,
) -> None:
    async with running_controller() as there, running_controller() as away:
        worker = await start_worker("m", controllers=(there.address,))
        await eventually(lambda: len(there.registry) == 1)
        await worker.stop()
        await eventually(lambda: len(there.registry) == 0)
        await away._server._server.stop(0)
        async with AsyncClient([there.address, away.address], failover=FailoverConfig(max_attempts=2)) as client:
            asking = asyncio.create_task(client.count_tokens("four", model="m"))
            await asyncio.sleep(1.0)  # longer than any number of quick tries would last
            assert not asking.done()
            await start_worker("m", controllers=(there.address,))
            assert await asyncio.wait_for(asking, 20) == 4


async def test_a_client_that_lost_one_worker_waits_for_room_at_the_other(start_worker: StartWorker) -> None:
    full = await start_worker("m", options={"delay_ms": "20"}, max_running=1, max_waiting=0)
    dying = await start_worker("m", options={"delay_ms": "10000"})
    async with AsyncClient(full.address) as other, AsyncClient([full.address, dying.address]) as client:
        busy = asyncio.create_task(other.complete(TEXT * 2))
        await eventually(lambda: full._generation.admission.running == 1)
        asked = asyncio.create_task(client.complete(TEXT))
        await eventually(lambda: dying._generation.admission.running == 1)
        await vanish(dying)
        assert (await asyncio.wait_for(asked, 20)).text == TEXT
        assert (await busy).text == TEXT * 2


async def test_a_client_that_is_closed_while_a_call_waits_says_so() -> None:
    client = AsyncClient(f"127.0.0.1:{free_port()}")
    waiting = asyncio.create_task(client.count_tokens("x"))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await client.close()
    with pytest.raises(errors.ClientClosed):
        await asyncio.wait_for(waiting, 5)


async def test_a_direct_stream_goes_on_while_the_controller_restarts(start_worker: StartWorker) -> None:
    async with running_controller() as first:
        port = first.port
        app = await start_worker("m", controllers=(first.address,), options={"delay_ms": "20"})
        await eventually(lambda: app.registered)
        async with AsyncClient(app.address) as client:
            running = asyncio.create_task(client.complete(TEXT * 2))
            await eventually(lambda: app._generation.admission.running == 1)
            await first.stop()
            async with running_controller(port):
                assert (await running).text == TEXT * 2
                await eventually(lambda: app.registered)


async def test_a_worker_that_leaves_is_gone_at_once() -> None:
    async with running_controller() as controller, AsyncClient(controller.address) as client:
        async with running_worker(echo_config("m", controllers=(controller.address,), drain_timeout_s=0)) as app:
            await eventually(lambda: app.registered)
        assert await client.workers() == []
        with pytest.raises(errors.NoLiveWorker):
            await client.complete("x", model="m")


async def test_draining_by_the_controller_stops_new_work_and_lets_streams_end() -> None:
    async with running_controller() as controller, AsyncClient(controller.address) as client:
        app = WorkerApp(echo_config("m", controllers=(controller.address,), options={"delay_ms": "20"}))
        await app.start()
        try:
            await eventually(lambda: app.registered)
            running = asyncio.create_task(client.complete(TEXT, model="m"))
            await eventually(lambda: app._generation.admission.running == 1)
            assert await client.drain_worker(app.worker_id) == 1
            await asyncio.wait_for(app._ordered.wait(), 5)
            leaving = asyncio.create_task(app.stop())
            with pytest.raises(errors.NoLiveWorker):
                await client.complete("new", model="m")
            assert (await running).text == TEXT
            await leaving
            assert await client.workers() == []
        finally:
            await app.stop()


async def test_an_evicted_stream_goes_on_elsewhere_without_a_seam(start_worker: StartWorker) -> None:
    async with running_controller() as controller, AsyncClient(controller.address) as client:
        slow = {"delay_ms": "15"}
        first = await start_worker("m", controllers=(controller.address,), options=slow, drain_timeout_s=0.1)
        await eventually(lambda: first.registered)
        running = asyncio.create_task(client.complete(TEXT, model="m", logprobs=0))
        await eventually(lambda: first._generation.output_tokens > 3)
        second = await start_worker("m", controllers=(controller.address,), options=slow)
        await eventually(lambda: second.registered)
        await first.stop()
        result = await running
        assert result.text == TEXT
        assert bytes(result.choices[0].token_ids[:-1]).decode() == TEXT
        assert len(result.choices[0].logprobs) == len(result.choices[0].token_ids)
        assert result.choices[0].usage.completion_tokens == len(TEXT) + 1
        assert second._generation.output_tokens > 0


async def test_a_client_with_two_controllers_outlives_either(start_worker: StartWorker) -> None:
    async with running_controller() as first, running_controller() as second:
        addresses = (first.address, second.address)
        app = await start_worker("m", controllers=addresses, options={"delay_ms": "10"})
        await eventually(lambda: app.registered)
        async with AsyncClient(addresses) as client:
            for doomed in (first, second):
                text = ""
                events = client.generate(TEXT, model="m", stream_interval=1)
                async for event in events:
                    if isinstance(event, Delta):
                        text += event.text
                    if len(text) == 5 and doomed is first:
                        await doomed._server._server.stop(0)
                    if isinstance(event, Completion):
                        assert event.usage.completion_tokens == len(TEXT) + 1
                assert text == TEXT


def test_the_registration_survives_a_push_that_meets_its_cancel() -> None:
    """Stopping must not depend on who is first: the heartbeat's wake-up or the cancel."""

    async def scenario() -> None:
        async with running_controller() as controller:
            async with running_worker(echo_config("m", controllers=(controller.address,), drain_timeout_s=0)) as app:
                await eventually(lambda: app.registered)
                await asyncio.sleep(0.15)  # inside the wait for the next heartbeat
                app._load_changed(True)
                await asyncio.wait_for(app.stop(), 5)

    for _ in range(3):
        asyncio.run(scenario())


async def test_nothing_is_left_open_after_a_fleet_came_and_went() -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async def round_trip() -> None:
        async with running_controller() as controller:
            async with running_worker(echo_config("m", controllers=(controller.address,), drain_timeout_s=0)) as app:
                await eventually(lambda: app.registered)
                async with AsyncClient(controller.address) as client:
                    await client.complete("x", model="m")

    await round_trip()
    await asyncio.sleep(0.2)
    tasks, files = len(asyncio.all_tasks()), open_files()
    for _ in range(3):
        await round_trip()
    await asyncio.sleep(0.2)
    assert len(asyncio.all_tasks()) <= tasks
    assert open_files() <= files + 2
