"""A controller over real sockets, with echo workers."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fastchat_grpc import errors
from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import DispatchMethod, FailoverConfig, LeaseConfig
from fastchat_grpc.controller.app import ControllerApp
from fastchat_grpc.core import Capability, Completion, Delta, PromptEcho, WorkerState
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.rpc.status import error_from_rpc
from fastchat_grpc.v1 import generation_pb2, generation_pb2_grpc, registry_pb2_grpc
from fastchat_grpc.v1 import registry_pb2 as pb
from tests.conftest import StartWorker, eventually
from tests.integration.controllers import running_controller

NO_TOKENS = (b"5", b"null", b"[" * 100_000, b"\xff", b" ", b"[1, 2]")


@pytest.fixture
async def controller() -> AsyncIterator[ControllerApp]:
    async with running_controller(lease=LeaseConfig()) as app:
        yield app


@pytest.fixture
async def client(controller: ControllerApp) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(controller.address) as client:
        yield client


@pytest.fixture
async def channel(controller: ControllerApp) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(controller.address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> registry_pb2_grpc.ControllerServiceStub:
    return registry_pb2_grpc.ControllerServiceStub(channel)


def registration(**fields: object) -> pb.RegisterRequest:
    """A good registration, with some fields changed."""
    good: dict[str, object] = {
        "worker_id": "w",
        "instance_id": "i",
        "address": "127.0.0.1:9",
        "models": [generation_pb2.ModelInfo(name="m", context_length=10)],
        "load": generation_pb2.WorkerLoad(state=generation_pb2.WORKER_STATE_SERVING),
    }
    return pb.RegisterRequest(**{**good, **fields})  # type: ignore[arg-type]


def _model(**fields: object) -> generation_pb2.ModelInfo:
    return generation_pb2.ModelInfo(**{"name": "m", "context_length": 10, **fields})  # type: ignore[arg-type]


async def fails(call: object, error: type[errors.FastChatError], match: str = "") -> errors.FastChatError:
    """Await a call that must fail with a domain error."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    found = error_from_rpc(caught.value)
    assert isinstance(found, error), found
    assert match in found.message
    return found


async def joined(controller: ControllerApp, count: int) -> None:
    await eventually(lambda: len(controller.registry) == count)


class TestRelay:
    async def test_a_generation_passes_through_unchanged(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        worker = await start_worker(controllers=(controller.address,))
        await joined(controller, 1)

        def plain(event: object) -> object:
            return event if not isinstance(event, Completion) else (event.finish_reason, event.usage, event.matched)

        async with AsyncClient(worker.address) as direct:
            expected = [plain(e) async for e in direct.generate("h\u00e9llo", echo=True, logprobs=1, n=2, seed=1)]
        relayed = [plain(e) async for e in client.generate("h\u00e9llo", echo=True, logprobs=1, n=2, seed=1)]
        assert relayed == expected
        assert isinstance(relayed[0], PromptEcho)

    async def test_the_empty_model_name_is_the_only_model(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        await start_worker("one", controllers=(controller.address,))
        await joined(controller, 1)
        assert (await client.complete("a")).text == "a"
        assert await client.count_tokens("abc") == 3
        assert len((await client.embed(["a", "b"])).embeddings) == 2
        assert (await client.model_info()).model.name == "one"
        await start_worker("two,three", controllers=(controller.address,))
        await joined(controller, 2)
        with pytest.raises(errors.InvalidArgument, match="3 models"):
            await client.complete("a")
        assert (await client.complete("a", model="three")).text == "a"

    async def test_errors_of_the_worker_come_through_whole(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        worker = await start_worker(controllers=(controller.address,), context_length=4)
        await joined(controller, 1)
        found = []
        async with AsyncClient(worker.address) as direct:
            for asked in (direct, client):
                with pytest.raises(errors.PromptTooLong) as caught:
                    await asked.complete("much too long")
                found.append((caught.value.message, caught.value.field, caught.value.metadata))
        assert found[0] == found[1]
        assert controller.relay.failover.retried == 0

    async def test_a_fault_in_what_is_resumed_is_told_at_once(
        self, controller: ControllerApp, channel: grpc.aio.Channel, start_worker: StartWorker
    ) -> None:
        """Nobody is waited for who could go on with it."""
        await start_worker(controllers=(controller.address,))
        await joined(controller, 1)
        generate = generation_pb2_grpc.GenerationServiceStub(channel).Generate
        begun = generation_pb2.Resume(choices=[generation_pb2.ResumedChoice(output_token_ids=[97], text_length=1)])
        for field, request in {
            "resume.choices.index": {"resume": generation_pb2.Resume(choices=[generation_pb2.ResumedChoice(index=-1)])},
            "sampling.temperature": {"resume": begun, "sampling": generation_pb2.SamplingParams(temperature=-1)},
        }.items():
            asked = generate(generation_pb2.GenerateRequest(prompt="abc", **request), timeout=5)  # type: ignore[arg-type]
            await fails(asked.read(), errors.InvalidArgument, field)

    async def test_models_unknown_and_gone_are_told_apart(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        worker = await start_worker(controllers=(controller.address,))
        await start_worker("other", controllers=(controller.address,))
        await joined(controller, 2)
        with pytest.raises(errors.ModelNotFound):
            await client.complete("a", model="never-seen")
        await worker.stop()
        await joined(controller, 1)
        with pytest.raises(errors.NoLiveWorker):
            await client.complete("a", model="echo")

    async def test_a_client_that_leaves_frees_the_worker(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        worker = await start_worker(controllers=(controller.address,), options={"delay_ms": "20"})
        await joined(controller, 1)
        (registered,) = controller.registry.workers()
        async with aclosing(client.generate("abc" * 100, ignore_eos=True, max_new_tokens=1000)) as events:
            await anext(events)
            assert registered.reserved_count == 1
        await eventually(lambda: registered.reserved_count == 0 and worker._generation.admission.running == 0)

    async def test_the_callers_deadline_reaches_the_worker(
        self, controller: ControllerApp, start_worker: StartWorker
    ) -> None:
        worker = await start_worker(controllers=(controller.address,), options={"first_delay_ms": "60000"})
        await joined(controller, 1)
        (registered,) = controller.registry.workers()
        async with AsyncClient(controller.address, timeout_s=0.3) as client:
            with pytest.raises(errors.DeadlineExceeded):
                await client.complete("a")
        await eventually(lambda: registered.reserved_count == 0 and worker._generation.admission.running == 0)

    async def test_requests_spread_over_the_workers(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        workers = [await start_worker(controllers=(controller.address,), options={"delay_ms": "20"}) for _ in range(3)]
        await joined(controller, 3)
        calls = [asyncio.create_task(client.complete("abcdefghij")) for _ in range(9)]
        await eventually(lambda: all(w._generation.admission.running == 3 for w in workers))
        await asyncio.gather(*calls)

    async def test_prefix_affinity_keeps_a_session_at_one_worker(self, start_worker: StartWorker) -> None:
        async with running_controller(dispatch=DispatchMethod.PREFIX_AFFINITY) as controller:
            workers = [await start_worker(controllers=(controller.address,)) for _ in range(4)]
            await joined(controller, 4)
            async with AsyncClient(controller.address) as client:
                for i in range(8):
                    await client.complete(f"turn {i}", session_key="conversation")
                before = [worker._generation.output_tokens for worker in workers]
                assert sum(count > 0 for count in before) == 1
                for i in range(12):
                    await client.complete(f"{i} begins differently")
            assert sum(worker._generation.output_tokens > 0 for worker in workers) > 1

    async def test_status_sums_the_fleet(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        for _ in range(2):
            await start_worker(controllers=(controller.address,), max_running=5)
        await joined(controller, 2)
        status = await client.status()
        assert status.load.max_running_count == 10
        assert [model.name for model in status.models] == ["echo"]

    async def test_a_message_that_is_too_large_is_refused_once(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        for _ in range(2):
            await start_worker(controllers=(controller.address,))
        await joined(controller, 2)
        with pytest.raises(errors.FastChatError) as caught:
            await client.complete("a" * 17_000_000)
        assert caught.value.code is errors.Code.RESOURCE_EXHAUSTED
        assert controller.relay.failover.retried == 0

    async def test_traces_and_request_ids_go_on_to_the_worker(
        self, controller: ControllerApp, start_worker: StartWorker, channel: grpc.aio.Channel
    ) -> None:
        await start_worker(controllers=(controller.address,))
        await joined(controller, 1)
        seen: list[tuple[str, object]] = []
        pooled = controller.pool.get(controller.registry.workers()[0].spec.address)
        real = pooled.unary_stream("/fastchat_grpc.v1.GenerationService/Generate")

        def spy(message: bytes, timeout: float | None, metadata: list[tuple[str, object]]) -> object:
            seen.extend(metadata)
            return real(message, timeout=timeout, metadata=metadata)

        pooled._callables["/fastchat_grpc.v1.GenerationService/Generate"] = spy
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(
            generation_pb2.GenerateRequest(prompt="a"),
            metadata=(("x-request-id", "r1"), ("traceparent", "t1"), ("authorization", "secret")),
        )
        async for _ in call:
            pass
        assert ("x-request-id", "r1") in seen
        assert ("traceparent", "t1") in seen
        assert not any(key == "authorization" for key, _ in seen)


class TestRegistryService:
    async def test_a_worker_is_listed_as_it_registered(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        await start_worker(controllers=(controller.address,), worker_id="w1", weight=2.5, labels={"zone": "x"})
        await joined(controller, 1)
        (listed,) = await client.workers()
        assert (listed.worker_id, listed.weight, dict(listed.labels)) == ("w1", 2.5, {"zone": "x"})
        assert listed.check_heartbeat
        assert await client.workers("other") == []
        (model,) = await client.models()
        assert (model.model.name, model.worker_count) == ("echo", 1)

    async def test_models_that_differ_are_listed_by_what_they_share(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        await start_worker(controllers=(controller.address,), context_length=100)
        await start_worker(controllers=(controller.address,), context_length=50)
        await joined(controller, 2)
        (model,) = await client.models()
        assert (model.model.context_length, model.worker_count) == (50, 2)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"worker_id": ""}, "worker_id"),
            ({"worker_id": "x" * 129}, "worker_id"),
            ({"instance_id": ""}, "instance_id"),
            ({"address": ""}, "address"),
            ({"address": "host"}, "address"),
            ({"address": "host:0"}, "address"),
            ({"address": "ho st:1"}, "address"),
            ({"models": []}, "models"),
            ({"models": [generation_pb2.ModelInfo(name="")]}, "models[0].name"),
            ({"models": [generation_pb2.ModelInfo(name="m")] * 2}, "models"),
            ({"weight": 0.0}, "weight"),
            ({"weight": float("nan")}, "weight"),
            ({"labels": {str(i): "" for i in range(33)}}, "labels"),
            ({"labels": {"k": "v" * 257}}, "labels"),
            ({"worker_id": "w\nx"}, r"worker_id: must hold no line breaks and other control characters, got 'w\nx'"),
            ({"instance_id": "\x1b[2J"}, "instance_id"),
            ({"version": "1\r"}, "version"),
            ({"labels": {"a\tb": ""}}, "labels key"),
            ({"labels": {"k": "\u202e"}}, "labels[k]"),
            ({"weight": float("inf")}, "weight: must be above 0 and at most 1e+06, got inf"),
            ({"weight": -1.0}, "got -1"),
            ({"address": "0.0.0.0:1"}, "address: must be one at which the worker is reached, got 0.0.0.0:1"),
            ({"address": "[::]:1"}, "address"),
            ({"address": "[::ffff:0.0.0.0]:1"}, "address"),
            ({"address": "224.0.0.1:1"}, "address"),
            ({"address": "a@b:1"}, "address: address must look like host:port, got 'a@b:1'"),
            ({"address": "999.1.1.1:1"}, "address"),
            ({"address": "0:1"}, "address"),
            ({"address": "a..b:1"}, "address"),
            ({"address": "h:65536"}, "from 0 to 65535, got 'h:65536'"),
            ({"address": "h:" + "1" * 5000}, "address"),
            ({"models": [_model(name="m\n")]}, "models[0].name"),
            ({"models": [_model(context_length=-1)]}, "models[0].context_length: must be at least 0, got -1"),
            ({"models": [_model(embedding_size=-1)]}, "models[0].embedding_size"),
            ({"models": [_model(vocabulary_size=-1)]}, "models[0].vocabulary_size"),
            ({"models": [_model(max_output_length=-1)]}, "models[0].max_output_length"),
            ({"models": [_model(fingerprint="x" * 129)]}, "models[0].fingerprint"),
            ({"models": [_model(backend="b\x00")]}, "models[0].backend"),
            ({"models": [_model(name=str(i)) for i in range(16_385)]}, "must hold 1 to 16384 models, got 16385"),
            ({"models": [_model(capabilities=[1] * 65)]}, "models[0].capabilities: must be at most 64, got 65"),
        ],
    )
    async def test_a_bad_registration_is_refused_by_field(
        self,
        stub: registry_pb2_grpc.ControllerServiceStub,
        controller: ControllerApp,
        fields: dict[str, object],
        message: str,
    ) -> None:
        await fails(stub.Register(registration(**fields)), errors.InvalidArgument, message)
        assert len(controller.registry) == 0

    async def test_what_a_newer_worker_says_of_itself_is_taken_as_far_as_it_is_known(
        self, stub: registry_pb2_grpc.ControllerServiceStub, controller: ControllerApp
    ) -> None:
        load = generation_pb2.WorkerLoad(state=99)  # type: ignore[arg-type]
        await stub.Register(registration(models=[_model(capabilities=[1, 99])], load=load))
        (worker,) = controller.registry.workers()
        assert worker.spec.models[0].capabilities == {Capability.GENERATE}
        assert worker.load.state is WorkerState.SERVING

    async def test_a_heartbeat_on_an_unknown_lease_asks_to_register(
        self, stub: registry_pb2_grpc.ControllerServiceStub
    ) -> None:
        await fails(stub.Heartbeat(pb.HeartbeatRequest(lease_id="?")), errors.LeaseNotFound, "register")

    async def test_the_terms_of_a_lease_are_told(self, stub: registry_pb2_grpc.ControllerServiceStub) -> None:
        lease = await stub.Register(registration())
        assert (lease.time_to_live.seconds, lease.heartbeat_interval.seconds) == (6, 2)
        beat = await stub.Heartbeat(pb.HeartbeatRequest(lease_id=lease.lease_id))
        assert (beat.time_to_live.seconds, beat.heartbeat_interval.seconds) == (6, 2)
        assert not beat.HasField("drain")

    async def test_addresses_are_given_out_by_load_and_without_the_excluded(
        self, stub: registry_pb2_grpc.ControllerServiceStub
    ) -> None:
        for name in "ab":
            await stub.Register(registration(worker_id=name, instance_id=name, address=f"{name}:1"))
        picks = [await stub.PickWorker(pb.PickWorkerRequest(model="m")) for _ in range(6)]
        assert sorted(pick.worker_id for pick in picks) == ["a"] * 3 + ["b"] * 3, "every pick counts as load"
        pick = await stub.PickWorker(pb.PickWorkerRequest(excluded_worker_ids=["a"]))
        assert (pick.address, pick.worker_id, pick.instance_id) == ("b:1", "b", "b")
        everybody = pb.PickWorkerRequest(excluded_worker_ids=["a", "b"])
        await fails(stub.PickWorker(everybody), errors.NoLiveWorker)
        await fails(stub.PickWorker(pb.PickWorkerRequest(model="x")), errors.ModelNotFound)
        able = _model(capabilities=[generation_pb2.CAPABILITY_SEED])
        await stub.Register(registration(worker_id="able", instance_id="able", models=[able]))
        seeded = pb.PickWorkerRequest(capabilities=[generation_pb2.CAPABILITY_SEED])
        assert [(await stub.PickWorker(seeded)).worker_id for _ in range(4)] == ["able"] * 4
        nobodys = pb.PickWorkerRequest(capabilities=[generation_pb2.CAPABILITY_VISION])
        assert (await stub.PickWorker(nobodys)).worker_id in {"a", "b", "able"}
        for bad in (
            pb.PickWorkerRequest(capabilities=[99]),  # type: ignore[list-item]
            pb.PickWorkerRequest(capabilities=[1] * 65),
            pb.PickWorkerRequest(excluded_worker_ids=["w"] * 1025),
        ):
            await fails(stub.PickWorker(bad), errors.InvalidArgument)

    async def test_a_released_pick_is_load_no_more(self, stub: registry_pb2_grpc.ControllerServiceStub) -> None:
        await stub.Register(registration(worker_id="a", instance_id="a", address="a:1"))

        async def reserved() -> int:
            return (await stub.GetWorker(pb.GetWorkerRequest(worker_id="a"))).worker.reserved_count

        pick = await stub.PickWorker(pb.PickWorkerRequest(model="m"))
        other = await stub.PickWorker(pb.PickWorkerRequest(model="m"))
        assert pick.pick_id != other.pick_id
        assert await reserved() == 2
        for _ in range(2):
            await stub.ReleasePick(pb.ReleasePickRequest(pick_id=pick.pick_id))
            assert await reserved() == 1, "and its end counts once"
        await stub.ReleasePick(pb.ReleasePickRequest(pick_id="guessed"))
        assert await reserved() == 1

    async def test_a_watch_tells_what_is_and_what_changes(self, stub: registry_pb2_grpc.ControllerServiceStub) -> None:
        first = await stub.Register(registration(worker_id="a"))
        watch = stub.WatchWorkers(pb.WatchWorkersRequest())

        async def told() -> list[tuple[int, str]]:
            message = await asyncio.wait_for(watch.read(), 5)
            return [(change.type, change.worker.worker_id) for change in message.changes]

        assert await told() == [(pb.WORKER_CHANGE_TYPE_ADDED, "a")]
        second = await stub.Register(registration(worker_id="b", instance_id="j"))
        assert await told() == [(pb.WORKER_CHANGE_TYPE_ADDED, "b")]
        await stub.Heartbeat(
            pb.HeartbeatRequest(lease_id=second.lease_id, load=generation_pb2.WorkerLoad(running_count=3))
        )
        assert await told() == [(pb.WORKER_CHANGE_TYPE_LOAD, "b")]
        await stub.Deregister(pb.DeregisterRequest(lease_id=first.lease_id))
        assert await told() == [(pb.WORKER_CHANGE_TYPE_REMOVED, "a")]
        watch.cancel()

    async def test_a_watch_of_an_empty_fleet_begins_at_once(
        self, stub: registry_pb2_grpc.ControllerServiceStub
    ) -> None:
        watch = stub.WatchWorkers(pb.WatchWorkersRequest())
        message = await asyncio.wait_for(watch.read(), 5)
        assert (list(message.changes), message.snapshot) == ([], True)
        assert message.version
        watch.cancel()

    async def test_a_watch_goes_on_where_it_was(self, stub: registry_pb2_grpc.ControllerServiceStub) -> None:
        leases = {
            name: (await stub.Register(registration(worker_id=name, instance_id=name))).lease_id for name in "abc"
        }
        watch = stub.WatchWorkers(pb.WatchWorkersRequest(exclude_load=True))
        version = (await asyncio.wait_for(watch.read(), 5)).version
        watch.cancel()
        await stub.Deregister(pb.DeregisterRequest(lease_id=leases["a"]))
        await stub.Register(registration(worker_id="d", instance_id="d"))
        gone = await stub.Register(registration(worker_id="e", instance_id="e"))
        await stub.Deregister(pb.DeregisterRequest(lease_id=gone.lease_id))
        busy = generation_pb2.WorkerLoad(running_count=3)
        await stub.Heartbeat(pb.HeartbeatRequest(lease_id=leases["b"], load=busy))

        watch = stub.WatchWorkers(pb.WatchWorkersRequest(exclude_load=True, resume_version=version))
        stands = await asyncio.wait_for(watch.read(), 5)
        assert (stands.snapshot, list(stands.changes), stands.version) == (False, [], version)
        missed = await asyncio.wait_for(watch.read(), 5)
        assert not missed.snapshot
        assert [(change.type, change.worker.worker_id) for change in missed.changes] == [
            (pb.WORKER_CHANGE_TYPE_REMOVED, "a"),
            (pb.WORKER_CHANGE_TYPE_ADDED, "d"),
        ]
        watch.cancel()
        for unknown in ("", "x.1", version + "0", "nonsense"):
            watch = stub.WatchWorkers(pb.WatchWorkersRequest(resume_version=unknown))
            message = await asyncio.wait_for(watch.read(), 5)
            assert message.snapshot
            assert [change.worker.worker_id for change in message.changes] == ["b", "c", "d"]
            watch.cancel()

    async def test_lists_come_in_pages(self, stub: registry_pb2_grpc.ControllerServiceStub) -> None:
        for i in range(7):
            zone = {"zone": "even" if i % 2 == 0 else "odd"}
            models = [generation_pb2.ModelInfo(name=name, context_length=8) for name in ("m", f"m-{i}")]
            spec = registration(worker_id=f"w{i}", instance_id=f"w{i}", address=f"h{i}:1", labels=zone)
            del spec.models[:]
            spec.models.extend(models)
            await stub.Register(spec)

        async def ids(**filters: Any) -> list[list[str]]:
            pages, token = [], ""
            while True:
                page = await stub.ListWorkers(pb.ListWorkersRequest(page_token=token, **filters))
                pages.append([worker.worker_id for worker in page.workers])
                token = page.next_page_token
                if not token:
                    return pages

        assert await ids(page_size=3) == [["w0", "w1", "w2"], ["w3", "w4", "w5"], ["w6"]]
        assert await ids(page_size=7) == [[f"w{i}" for i in range(7)]], "no empty page follows"
        assert await ids(page_size=2, labels={"zone": "odd"}) == [["w1", "w3"], ["w5"]]
        assert await ids(model="m-4") == [["w4"]]
        assert await ids(worker_id_prefix="w6") == [["w6"]]
        assert await ids(states=[generation_pb2.WORKER_STATE_DRAINING]) == [[]]
        token = (await stub.ListWorkers(pb.ListWorkersRequest(page_size=3))).next_page_token
        await stub.Register(registration(worker_id="w20", instance_id="w20", address="h:1"))
        page = await stub.ListWorkers(pb.ListWorkersRequest(page_size=3, page_token=token))
        assert [worker.worker_id for worker in page.workers] == ["w20", "w3", "w4"], "after w2, in order of ids"
        for request in (
            pb.ListWorkersRequest(page_token=token, model="m"),
            pb.ListWorkersRequest(page_token="nonsense"),
            *(pb.ListWorkersRequest(page_token=base64.urlsafe_b64encode(raw).decode()) for raw in NO_TOKENS),
            pb.ListWorkersRequest(page_size=-1),
            pb.ListWorkersRequest(page_size=1001),
        ):
            await fails(stub.ListWorkers(request), errors.InvalidArgument, "page_")
        first = await stub.ListModels(pb.ListModelsRequest(page_size=5, name_prefix="m-"))
        rest = await stub.ListModels(
            pb.ListModelsRequest(page_size=5, name_prefix="m-", page_token=first.next_page_token)
        )
        assert [entry.model.name for entry in (*first.models, *rest.models)] == [f"m-{i}" for i in range(7)]
        assert not rest.next_page_token

    async def test_nobody_takes_the_id_of_a_worker_that_answers(
        self,
        controller: ControllerApp,
        stub: registry_pb2_grpc.ControllerServiceStub,
        start_worker: StartWorker,
    ) -> None:
        worker = await start_worker(controllers=(controller.address,), worker_id="taken")
        await joined(controller, 1)
        for address in ("127.0.0.1:9", worker.address):
            other = registration(worker_id="taken", instance_id="other", address=address)
            await fails(stub.Register(other), errors.WorkerIdInUse, "--worker-id")
        assert controller.registry.worker("taken").spec.instance_id == worker.instance_id

    async def test_the_id_of_a_worker_that_is_gone_is_free_before_its_lease_ends(
        self, controller: ControllerApp, stub: registry_pb2_grpc.ControllerServiceStub
    ) -> None:
        await stub.Register(registration(worker_id="moves", instance_id="before", address="127.0.0.1:1"))
        await stub.Register(registration(worker_id="moves", instance_id="after", address="127.0.0.1:9"))
        assert controller.registry.worker("moves").spec.instance_id == "after"

    async def test_nor_does_another_process_at_its_address_keep_it(
        self,
        controller: ControllerApp,
        stub: registry_pb2_grpc.ControllerServiceStub,
        start_worker: StartWorker,
    ) -> None:
        another = await start_worker()
        await stub.Register(registration(worker_id="moves", instance_id="before", address=another.address))
        await stub.Register(registration(worker_id="moves", instance_id="after", address="127.0.0.1:9"))
        assert controller.registry.worker("moves").spec.instance_id == "after"

    async def test_refreshing_drops_who_does_not_answer(
        self,
        controller: ControllerApp,
        stub: registry_pb2_grpc.ControllerServiceStub,
        start_worker: StartWorker,
    ) -> None:
        worker = await start_worker(controllers=(controller.address,), worker_id="alive")
        await joined(controller, 1)
        silent = {"check_heartbeat": False}  # nothing but asking tells of them
        await stub.Register(registration(worker_id="dead", address="127.0.0.1:1", **silent))
        await stub.Register(registration(worker_id="impostor", instance_id="k", address=worker.address, **silent))
        result = await stub.RefreshWorkers(pb.RefreshWorkersRequest())
        assert list(result.live_worker_ids) == ["alive"]
        assert list(result.removed_worker_ids) == ["dead", "impostor"]
        assert [w.spec.worker_id for w in controller.registry.workers()] == ["alive"]


class TestDrain:
    @pytest.fixture
    async def controller(self) -> AsyncIterator[ControllerApp]:
        """Its orders travel with the answers to heartbeats, which come often."""
        async with running_controller(lease=LeaseConfig(heartbeat_interval_s=0.3)) as app:
            yield app

    async def test_a_drained_worker_ends_its_streams_and_leaves(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        old = await start_worker(
            controllers=(controller.address,), worker_id="old", options={"delay_ms": "30"}, drain_timeout_s=30.0
        )
        await joined(controller, 1)
        text = "0123456789" * 5
        running = asyncio.create_task(client.complete(text))
        (worker,) = controller.registry.workers()
        await eventually(lambda: worker.reserved_count == 1)
        await start_worker(controllers=(controller.address,), worker_id="new")
        await joined(controller, 2)
        assert await client.drain_worker("old") == 1
        for _ in range(3):
            await client.complete("x")
        assert worker.reserved_count == 1, "nothing new goes there"
        await eventually(old._ordered.is_set)
        await old.stop()
        assert (await running).text == text
        assert controller.relay.failover.resumed == 0
        await joined(controller, 1)

    async def test_an_order_reaches_the_controller_that_has_the_worker(
        self, controller: ControllerApp, start_worker: StartWorker
    ) -> None:
        worker = await start_worker(controllers=(controller.address,), worker_id="w")
        await joined(controller, 1)
        async with running_controller() as other, AsyncClient([other.address, controller.address]) as client:
            assert await client.drain_worker("w") == 0
            await eventually(worker._ordered.is_set)
            with pytest.raises(errors.WorkerNotFound):
                await client.drain_worker("nobody")

    async def test_what_outlives_the_drain_goes_on_elsewhere(
        self,
        controller: ControllerApp,
        client: AsyncClient,
        start_worker: StartWorker,
        stub: registry_pb2_grpc.ControllerServiceStub,
    ) -> None:
        old = await start_worker(controllers=(controller.address,), worker_id="old", options={"delay_ms": "30"})
        await joined(controller, 1)
        text = "0123456789" * 15
        running = asyncio.create_task(client.complete(text))
        await eventually(lambda: controller.registry.workers()[0].reserved_count == 1)
        await start_worker(controllers=(controller.address,), worker_id="new")
        await joined(controller, 2)
        await stub.DrainWorker(pb.DrainWorkerRequest(worker_id="old", timeout=duration_pb2.Duration()))
        await eventually(old._ordered.is_set)
        await old.stop()
        assert (await running).text == text
        assert controller.relay.failover.resumed == 1

    async def test_a_drain_that_is_taken_back_lets_the_worker_take_requests_again(
        self, client: AsyncClient, controller: ControllerApp, start_worker: StartWorker
    ) -> None:
        stays = await start_worker(
            controllers=(controller.address,), worker_id="stays", options={"delay_ms": "30"}, drain_timeout_s=60.0
        )
        serving = asyncio.create_task(stays.serve())
        await joined(controller, 1)
        (worker,) = controller.registry.workers()
        text = "0123456789" * 100
        running = asyncio.create_task(client.complete(text))
        await eventually(lambda: worker.reserved_count == 1)
        await client.drain_worker("stays")
        await eventually(lambda: worker.health.state is WorkerState.DRAINING)
        await client.undrain_worker("stays")
        await eventually(lambda: worker.health.state is WorkerState.SERVING)
        assert (await client.complete("x")).text == "x"
        assert not serving.done()
        running.cancel()
        serving.cancel()

    async def test_draining_an_unknown_worker_is_not_found(self, stub: registry_pb2_grpc.ControllerServiceStub) -> None:
        await fails(stub.DrainWorker(pb.DrainWorkerRequest(worker_id="?")), errors.WorkerNotFound)
        await fails(stub.UndrainWorker(pb.UndrainWorkerRequest(worker_id="?")), errors.WorkerNotFound)
        await fails(stub.GetWorker(pb.GetWorkerRequest(worker_id="?")), errors.WorkerNotFound)


class TestLife:
    async def test_health_follows_the_controllers_life(self, controller: ControllerApp) -> None:
        async with open_channel(controller.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            stopping = asyncio.create_task(controller.stop())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await stopping

    async def test_stopping_lets_streams_end_and_refuses_new_ones(self, start_worker: StartWorker) -> None:
        impatient = FailoverConfig(wait_s=0)  # others wait until there is another controller at the address
        async with (
            running_controller(drain_timeout_s=30.0) as controller,
            AsyncClient(controller.address, failover=impatient) as client,
        ):
            await start_worker(controllers=(controller.address,), options={"delay_ms": "20"})
            await joined(controller, 1)
            async with aclosing(client.generate("abcdefghijklmnopqrst")) as events:
                first = await anext(events)
                stopping = asyncio.create_task(controller.stop())
                await eventually(lambda: controller.generation.draining)
                with pytest.raises(errors.Draining):
                    await client.complete("x")
                rest = [event async for event in events]
            await stopping
            deltas = [event for event in [first, *rest] if isinstance(event, Delta)]
            assert "".join(event.text for event in deltas) == "abcdefghijklmnopqrst"

    async def test_stopping_ends_watches_at_once(self, controller: ControllerApp) -> None:
        async with open_channel(controller.address) as channel:
            watch = registry_pb2_grpc.ControllerServiceStub(channel).WatchWorkers(pb.WatchWorkersRequest())
            await watch.read()
            await asyncio.wait_for(controller.stop(), 5)
            assert await watch.read() is grpc.aio.EOF

    async def test_a_port_in_use_is_said_in_one_line(self, controller: ControllerApp) -> None:
        with pytest.raises(errors.ConfigError, match="in use"):
            async with running_controller(port=controller.port):
                pass

    async def test_a_restarted_controller_soon_knows_its_workers_again(self, start_worker: StartWorker) -> None:
        async with running_controller() as controller:
            port = controller.port
            await start_worker(controllers=(controller.address,))
            await start_worker(controllers=(controller.address,))
            await joined(controller, 2)
        async with running_controller(port=port) as again:
            await joined(again, 2)
