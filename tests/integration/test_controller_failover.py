"""Workers that die, hang, fill up or fail under a controller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from fastchat_grpc import errors
from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import BreakerConfig, FailoverConfig, LeaseConfig
from fastchat_grpc.controller.app import ControllerApp
from fastchat_grpc.controller.fleet import WorkerSpec
from fastchat_grpc.controller.health import Tier
from fastchat_grpc.core import Capability, Completion, Delta, Load, ModelInfo, PromptEcho
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import StartWorker, eventually
from tests.integration.controllers import QUICK, in_use, running_controller, silence, vanish

TEXT = "The quick brown fox j\u00fcmps over the lazy dog \U0001f98a. " * 3
SLOW = {"delay_ms": "5"}


@pytest.fixture
async def controller() -> AsyncIterator[ControllerApp]:
    async with running_controller(lease=LeaseConfig()) as app:
        yield app


@pytest.fixture
async def client(controller: ControllerApp) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(controller.address) as client:
        yield client


async def fleet_of(
    controller: ControllerApp, start_worker: StartWorker, count: int, **config: object
) -> dict[str, WorkerApp]:
    """So many registered workers, by address."""
    config.setdefault("options", SLOW)
    workers = [await start_worker(controllers=(controller.address,), **config) for _ in range(count)]
    await eventually(lambda: len(controller.registry) == count)
    return {worker.address: worker for worker in workers}


def plain(events: list[object]) -> tuple[object, ...]:
    """What must not differ between a disturbed and an undisturbed generation."""
    deltas = [event for event in events if isinstance(event, Delta)]
    indices = sorted({event.index for event in deltas})
    return (
        [event for event in events if isinstance(event, PromptEcho)],
        ["".join(event.text for event in deltas if event.index == i) for i in indices],
        [[t for event in deltas if event.index == i for t in event.token_ids] for i in indices],
        [[t for event in deltas if event.index == i for t in event.logprobs] for i in indices],
        sorted(
            (event.index, event.finish_reason.value, event.usage.completion_tokens, event.usage.prompt_tokens)
            for event in events
            if isinstance(event, Completion)
        ),
    )


class TestResume:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"n": 3, "stream_interval": 1},
            {"logprobs": 2, "stream_interval": 5},
            {"echo": True, "prompt_logprobs": 1},
            {"stop": ["lazy dog \U0001f98a. The quick brown f"], "stream_interval": 1},
            {"ignore_eos": True, "max_new_tokens": 222},
            {"cumulative_text": True},
        ],
        ids=lambda options: "+".join(options) or "plain",
    )
    async def test_a_stream_whose_worker_dies_goes_on_without_a_seam(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker, options: dict[str, object]
    ) -> None:
        workers = await fleet_of(controller, start_worker, 2)
        expected = [event async for event in client.generate(TEXT, **options)]  # type: ignore[arg-type]
        events: list[object] = []
        async with aclosing(client.generate(TEXT, **options)) as stream:  # type: ignore[arg-type]
            async for event in stream:
                events.append(event)
                if len(events) == 8:
                    await vanish(workers[await in_use(controller)])
        assert plain(events) == plain(expected)
        assert controller.relay.failover.resumed == 1
        if options.get("cumulative_text"):
            deltas = [event for event in events if isinstance(event, Delta)]
            assert deltas[-1].cumulative_text == TEXT

    async def test_a_stream_survives_several_deaths(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        workers = await fleet_of(controller, start_worker, 4)
        text = ""
        async with aclosing(client.generate(TEXT, stream_interval=1)) as stream:
            count = 0
            async for event in stream:
                text += event.text if isinstance(event, Delta) else ""
                count += 1
                if count in (10, 40, 70):
                    await vanish(workers[await in_use(controller)])
        assert text == TEXT
        assert controller.relay.failover.resumed == 3

    async def test_an_unseeded_random_request_is_resumed_with_its_seed(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        workers = await fleet_of(controller, start_worker, 2)
        seeds: list[int | None] = []
        for worker in workers.values():
            backend, real = worker._backend, worker._backend.generate

            def spy(request, real=real):  # type: ignore[no-untyped-def]
                seeds.append(request.sampling.seed)
                return real(request)

            backend.generate = spy  # type: ignore[method-assign]
        async with aclosing(client.generate(TEXT)) as stream:
            await anext(stream)
            await vanish(workers[await in_use(controller)])
            async for _ in stream:
                pass
        assert len(seeds) == 2
        assert seeds[0] is not None
        assert seeds[0] == seeds[1]

    async def test_a_frozen_workers_streams_go_on_elsewhere_when_its_lease_ends(
        self, start_worker: StartWorker
    ) -> None:
        async with running_controller(lease=QUICK) as controller, AsyncClient(controller.address) as client:
            workers = await fleet_of(controller, start_worker, 1, options={"hang_after": "20"})
            running = asyncio.create_task(client.complete(TEXT))
            frozen = workers[await in_use(controller)]
            silence(frozen)
            await start_worker(controllers=(controller.address,), options=SLOW)
            assert (await asyncio.wait_for(running, 20)).text == TEXT
            assert controller.relay.failover.resumed == 1

    async def test_a_wedged_workers_streams_go_on_elsewhere(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        await fleet_of(controller, start_worker, 1, options={"hang_after": "20"}, stall_timeout_s=0.5)
        running = asyncio.create_task(client.complete(TEXT))
        wedged = await in_use(controller)
        await start_worker(controllers=(controller.address,), options=SLOW)
        assert (await asyncio.wait_for(running, 20)).text == TEXT
        (worker,) = controller.registry.at(wedged)
        assert worker.reserved_count == 0

    async def test_no_resume_breaks_the_stream_with_its_worker(self, start_worker: StartWorker) -> None:
        async with (
            running_controller(failover=FailoverConfig(max_resumes=0)) as controller,
            AsyncClient(controller.address, failover=FailoverConfig(max_resumes=0)) as client,
        ):
            workers = await fleet_of(controller, start_worker, 2)
            async with aclosing(client.generate(TEXT)) as stream:
                await anext(stream)
                await vanish(workers[await in_use(controller)])
                with pytest.raises(errors.WorkerUnavailable):
                    async for _ in stream:
                        pass

    async def test_a_lost_stream_waits_for_a_worker_to_come_back(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        workers = await fleet_of(controller, start_worker, 1)
        running = asyncio.create_task(client.complete(TEXT))
        address = await in_use(controller)
        await asyncio.sleep(0.1)
        await vanish(workers[address])
        await start_worker(controllers=(controller.address,), options=SLOW, port=int(address.rpartition(":")[2]))
        assert (await asyncio.wait_for(running, 20)).text == TEXT

    async def test_it_fails_when_none_comes_back_in_time(self, start_worker: StartWorker) -> None:
        async with (
            running_controller(failover=FailoverConfig(wait_s=0.5)) as controller,
            AsyncClient(controller.address, failover=FailoverConfig(max_resumes=0)) as client,
        ):
            workers = await fleet_of(controller, start_worker, 1)
            running = asyncio.create_task(client.complete(TEXT))
            await vanish(workers[await in_use(controller)])
            with pytest.raises(errors.NoLiveWorker):
                await running
            assert all(worker.reserved_count == 0 for worker in controller.registry.workers())


class TestBeforeTheFirstEvent:
    async def test_a_dead_worker_costs_one_dispatch_and_gets_no_more(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        workers = await fleet_of(controller, start_worker, 2)
        dead = next(iter(workers))
        await vanish(workers[dead])
        for _ in range(10):
            assert (await client.complete("x")).text == "x"
        assert controller.relay.failover.retried <= 1
        (worker,) = controller.registry.at(dead)
        assert worker.tier is Tier.NONE

    async def test_a_broken_idle_connection_tells_before_any_dispatch(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        workers = await fleet_of(controller, start_worker, 1)
        (address,) = workers
        await client.complete("x")
        await vanish(workers[address])
        (worker,) = controller.registry.at(address)
        await eventually(lambda: worker.health.unreachable)
        assert controller.relay.failover.retried == 0

    async def test_a_full_worker_passes_its_request_on(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        full = await start_worker(
            controllers=(controller.address,), max_running=1, max_waiting=0, options={"delay_ms": "20"}, weight=1000.0
        )
        await eventually(lambda: len(controller.registry) == 1)
        running = asyncio.create_task(client.complete(TEXT))
        await eventually(lambda: full._generation.admission.running == 1)
        with pytest.raises(errors.QueueFull) as caught:
            await client.complete("x")
        assert caught.value.retry_after_s is not None
        await start_worker(controllers=(controller.address,))
        await eventually(lambda: len(controller.registry) == 2)
        assert (await client.complete("x")).text == "x"
        running.cancel()

    async def test_back_pressure_does_not_open_the_breaker(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        await fleet_of(controller, start_worker, 1, max_running=1, max_waiting=0, options={"delay_ms": "20"})
        running = asyncio.create_task(client.complete(TEXT))
        await in_use(controller)
        results = await asyncio.gather(*(client.complete("x") for _ in range(20)), return_exceptions=True)
        assert all(isinstance(result, errors.QueueFull) for result in results)
        (worker,) = controller.registry.workers()
        assert worker.tier is Tier.READY
        running.cancel()

    async def test_client_errors_do_not_open_the_breaker(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        await fleet_of(controller, start_worker, 1, context_length=3)
        for _ in range(20):
            with pytest.raises(errors.PromptTooLong):
                await client.complete("too long")
        (worker,) = controller.registry.workers()
        assert worker.tier is Tier.READY

    async def test_a_worker_that_keeps_failing_is_left_alone_and_probed(self, start_worker: StartWorker) -> None:
        breaker = BreakerConfig(min_failures=3, cooldown_s=0.3)
        async with running_controller(breaker=breaker) as controller, AsyncClient(controller.address) as client:
            workers = await fleet_of(controller, start_worker, 1, options={"fail_after": "1"})
            (worker,) = controller.registry.workers()
            for _ in range(3):
                with pytest.raises(errors.BackendFailed):
                    await client.complete("abc")
            with pytest.raises(errors.NoLiveWorker):
                await client.complete("abc")
            workers[worker.spec.address]._backend._fail_after = 1e9  # type: ignore[attr-defined]
            await eventually(lambda: worker.tier is Tier.READY)
            assert (await client.complete("abc")).text == "abc"
            assert (await client.complete("abc")).text == "abc"

    async def test_a_long_probe_keeps_nobody_out_once_it_answers(self, start_worker: StartWorker) -> None:
        breaker = BreakerConfig(min_failures=3, cooldown_s=0.3)
        async with running_controller(breaker=breaker) as controller, AsyncClient(controller.address) as client:
            workers = await fleet_of(controller, start_worker, 1, options={"fail_after": "1", "delay_ms": "20"})
            (worker,) = controller.registry.workers()
            for _ in range(3):
                with pytest.raises(errors.BackendFailed):
                    await client.complete("abc")
            workers[worker.spec.address]._backend._fail_after = 1e9  # type: ignore[attr-defined]
            await eventually(lambda: worker.tier is Tier.READY)
            async with aclosing(client.generate(TEXT, stream_interval=1)) as probe:
                await anext(probe)
                assert (await client.complete("abc")).text == "abc"
                await anext(probe)  # it runs still

    async def test_unary_calls_move_on_too(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        workers = await fleet_of(controller, start_worker, 2)
        await vanish(workers[next(iter(workers))])
        for _ in range(4):
            assert await client.count_tokens("abc") == 3
            assert len((await client.embed(["a"])).embeddings) == 1

    async def test_a_restarted_worker_at_the_same_address_is_used_at_once(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        workers = await fleet_of(controller, start_worker, 1)
        (address,) = workers
        await client.complete("x")
        await vanish(workers[address])
        await eventually(lambda: controller.registry.at(address)[0].health.unreachable)
        await asyncio.sleep(1.0)  # grpc's backoff has grown meanwhile
        again = await start_worker(controllers=(controller.address,), port=int(address.rpartition(":")[2]))
        await eventually(lambda: controller.registry.at(address)[0].spec.instance_id == again.instance_id)
        assert (await asyncio.wait_for(client.complete("x"), 0.5)).text == "x"


class TestSeveralControllers:
    async def test_each_serves_alone_and_any_may_die(self, start_worker: StartWorker) -> None:
        async with running_controller() as first, running_controller() as second:
            worker = await start_worker(controllers=(first.address, second.address))
            for controller in (first, second):
                await eventually(lambda c=controller: len(c.registry) == 1)  # type: ignore[misc]
            await first.stop()
            async with AsyncClient(second.address) as client:
                assert (await client.complete("x")).text == "x"
            assert worker.address

    async def test_a_controller_serves_its_fleet_to_a_parent(self, start_worker: StartWorker) -> None:
        async with (
            running_controller() as parent,
            running_controller(parent_addresses=(parent.address,), worker_id="child") as child,
            AsyncClient(parent.address) as client,
        ):
            await start_worker("a", controllers=(child.address,), weight=2.0, max_running=3)
            await eventually(lambda: len(parent.registry) == 1)
            await start_worker("b", controllers=(child.address,), weight=3.0, max_running=4)
            await eventually(lambda: [m.name for m in parent.generation.models()] == ["a", "b"])
            await eventually(lambda: parent.registry.workers()[0].load.max_running == 7)
            (seen,) = parent.registry.workers()
            assert (seen.spec.worker_id, seen.weight) == ("child", 5.0)
            assert (await client.complete("x", model="b")).text == "x"

    async def test_a_parent_takes_a_fleet_of_thousands_of_models(self) -> None:
        async with (
            running_controller() as parent,
            running_controller(parent_addresses=(parent.address,), worker_id="child") as child,
        ):
            for i in range(2):
                models = tuple(ModelInfo(name=f"m{i}-{j:04}", context_length=9) for j in range(1000))
                spec = WorkerSpec(
                    worker_id=f"w{i}",
                    instance_id=f"i{i}",
                    address="127.0.0.1:1",
                    models=models,
                    weight=1e6,
                    check_heartbeat=False,
                )
                child.registry.register(spec, Load())
            await eventually(lambda: len(parent.registry.models()) == 2000)
            assert parent.registry.workers()[0].weight == 1e6  # what is more is no weight

    async def test_a_parent_sees_an_empty_child_leave(self, start_worker: StartWorker) -> None:
        async with (
            running_controller() as parent,
            running_controller(parent_addresses=(parent.address,)) as child,
        ):
            worker = await start_worker(controllers=(child.address,))
            await eventually(lambda: len(parent.registry) == 1)
            await worker.stop()
            await eventually(lambda: len(parent.registry) == 0)

    async def test_controllers_in_a_circle_are_noticed(self) -> None:
        async with running_controller() as controller:
            controller.registry.register(
                WorkerSpec(
                    worker_id="me",
                    instance_id="i",
                    address=controller.address,
                    models=(ModelInfo(name="m", context_length=9, capabilities=frozenset({Capability.GENERATE})),),
                    check_heartbeat=False,
                ),
                Load(),
            )
            async with AsyncClient(controller.address) as client:
                with pytest.raises(errors.RelayLoop):
                    await client.complete("x")


async def test_nothing_is_left_after_a_crowd_with_deaths_and_departures(
    controller: ControllerApp, start_worker: StartWorker
) -> None:
    """Ends, errors, cancels and deadlines all give back what they held."""
    workers = await fleet_of(controller, start_worker, 3)
    tasks_before = len(asyncio.all_tasks())
    async with AsyncClient(controller.address) as client, AsyncClient(controller.address, timeout_s=0.2) as hasty:
        calls = [asyncio.create_task(client.complete(TEXT)) for _ in range(20)]
        calls += [asyncio.create_task(hasty.complete(TEXT)) for _ in range(10)]
        left = [asyncio.create_task(client.complete(TEXT)) for _ in range(10)]
        await asyncio.sleep(0.15)
        await vanish(workers[await in_use(controller)])
        for call in left:
            call.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(not isinstance(result, BaseException) and result.text == TEXT for result in results[:20])
    assert all(isinstance(result, errors.DeadlineExceeded) for result in results[20:])
    await eventually(lambda: all(worker.reserved_count == 0 for worker in controller.registry.workers()))
    assert all(not worker.watched for worker in controller.registry.workers())
    assert all(pooled.calls == 0 for pooled in controller.pool._channels.values())
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks_before + 5)
