"""What every server refuses, whoever asks: too many calls at once, and bytes that are no message."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fastchat_grpc import errors
from fastchat_grpc.config import ListenConfig
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.rpc.limits import MAX_STREAMS_PER_CONNECTION, CallBounds
from fastchat_grpc.rpc.registration import Registration
from fastchat_grpc.rpc.server import RpcServer
from fastchat_grpc.rpc.status import error_from_rpc
from fastchat_grpc.v1 import registry_pb2 as pb
from fastchat_grpc.v1 import registry_pb2_grpc
from fastchat_grpc.worker.admission import Admission
from tests.conftest import StartWorker, echo_config, eventually, running_worker
from tests.integration.controllers import running_controller

GARBAGE = b"\xff\xff\xff\xff"
ANY = health_pb2.HealthCheckRequest()


def _methods() -> list[tuple[str, bool, bool]]:
    """Every method of our services, and whether it streams its requests and its responses: from the descriptors."""
    from importlib.resources import files

    protos = descriptor_pb2.FileDescriptorSet.FromString(
        files("fastchat_grpc.v1").joinpath("descriptors.binpb").read_bytes()
    )
    return [
        (f"/{file.package}.{service.name}/{method.name}", method.client_streaming, method.server_streaming)
        for file in protos.file
        for service in file.service
        for method in service.method
    ]


async def _send(
    channel: grpc.aio.Channel, method: str, streams: bool, answers: bool, raw: bytes
) -> errors.FastChatError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if streams:
            call: Any = channel.stream_stream(method)(timeout=10)
            await call.write(raw)
            await call.read()
        elif answers:
            await channel.unary_stream(method)(raw, timeout=10).read()
        else:
            await channel.unary_unary(method)(raw, timeout=10)
    return error_from_rpc(caught.value)


OTHERS = [
    ("/grpc.health.v1.Health/Check", False, False),
    ("/grpc.health.v1.Health/Watch", False, True),
    ("/grpc.channelz.v1.Channelz/GetServers", False, False),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", True, True),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", True, True),
    ("/envoy.service.auth.v3.Authorization/Check", False, False),
    ("/envoy.service.endpoint.v3.EndpointDiscoveryService/StreamEndpoints", True, True),
    ("/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs", True, True),
]


async def test_bytes_that_are_no_message_are_the_callers_fault_in_every_method(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = 0
    async with running_controller() as controller:
        async with running_worker(echo_config("m", controllers=(controller.address,))) as worker:
            await eventually(lambda: worker.registered)
            for address in (controller.address, worker.address):
                async with open_channel(address) as channel:
                    for method, streams, answers in [*_methods(), *OTHERS]:
                        error = await _send(channel, method, streams, answers, GARBAGE)
                        if error.code is errors.Code.UNIMPLEMENTED:
                            continue
                        assert error.code is errors.Code.INVALID_ARGUMENT, (method, error)
                        asked += 1
    assert asked > 25
    # What asyncio says of grpc's events for the loops of earlier tests is none of this one's.
    said = " ".join(record.getMessage() for record in caplog.records if record.name != "asyncio")
    assert "Traceback" not in said
    assert "DecodeError" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info and record.name != "asyncio"]


async def _silent(channel: grpc.aio.Channel, method: str, *, half_closed: bool) -> errors.FastChatError | None:
    """The end of a call that sends no message, and says that it will not or says nothing; None: it ended well."""
    call: Any = channel.stream_stream(method)(timeout=20)
    try:
        if half_closed:
            await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as rpc_error:
        return error_from_rpc(rpc_error)
    return None


async def test_a_call_that_ends_without_a_message_is_answered_in_every_method() -> None:
    async with running_controller() as controller:
        async with running_worker(echo_config("m", controllers=(controller.address,))) as worker:
            await eventually(lambda: worker.registered)
            for address in (controller.address, worker.address):
                async with open_channel(address) as channel:
                    for method, streams, _ in [*_methods(), *OTHERS]:
                        error = await _silent(channel, method, half_closed=True)
                        if streams or (error is not None and error.code is errors.Code.UNIMPLEMENTED):
                            continue  # no message is as good as some
                        assert isinstance(error, errors.InvalidArgument), (method, error)
                        assert "without a request message" in error.message


async def test_a_call_that_never_sends_its_message_counts_and_is_ended() -> None:
    release = asyncio.Event()

    class Controller(registry_pb2_grpc.ControllerServiceServicer):
        async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
            await release.wait()
            return pb.ListModelsResponse()

    services = [
        (
            "fastchat_grpc.v1.ControllerService",
            lambda server: registry_pb2_grpc.add_ControllerServiceServicer_to_server(Controller(), server),
        )
    ]
    bounds = CallBounds(calls_per_peer=1, watches_per_peer=1, first_message_s=0.3)
    server = RpcServer(ListenConfig(), services, bounds=bounds)
    await server.start()
    kinds = (
        "/fastchat_grpc.v1.ControllerService/ListModels",
        "/fastchat_grpc.v1.ControllerService/WatchWorkers",
        "/fastchat_grpc.v1.ControllerService/Heartbeat",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    )
    try:
        async with open_channel(server.address) as channel:
            for method in kinds:
                error = await _silent(channel, method, half_closed=False)
                assert isinstance(error, errors.RequestLate), (method, error)
                assert "no message came within 0.3 s" in error.message
            first, second = await asyncio.gather(*(_silent(channel, kinds[0], half_closed=False) for _ in range(2)))
            assert {type(first), type(second)} == {errors.RequestLate, errors.TooManyCalls}
            # What has sent its message may take its time.
            slow = asyncio.ensure_future(
                registry_pb2_grpc.ControllerServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=20)
            )
            await asyncio.sleep(0.6)
            assert not slow.done()
            release.set()
            await slow
    finally:
        await server.stop(0)


async def _bounded(bounds: CallBounds) -> RpcServer:
    server = RpcServer(ListenConfig(), [], bounds=bounds)
    await server.start()
    return server


async def test_watches_are_bounded_and_refused_clearly() -> None:
    server = await _bounded(CallBounds(watches_per_peer=2))
    try:
        async with open_channel(server.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watches = [stub.Watch(ANY) for _ in range(2)]
            for watch in watches:
                await watch.read()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Watch(ANY).read()
            error = error_from_rpc(caught.value)
            assert isinstance(error, errors.TooManyCalls)
            assert "this peer has 2 calls open" in error.message
            await stub.Check(ANY)  # what ends by itself is counted apart
            watches[0].cancel()

            async def another() -> bool:
                try:
                    await stub.Watch(ANY).read()
                except grpc.aio.AioRpcError:
                    return False
                return True

            async with asyncio.timeout(10):
                while not await another():
                    await asyncio.sleep(0.01)
    finally:
        await server.stop(0)


async def test_a_worker_without_heartbeats_stays_registered_where_its_watch_is_refused(
    start_worker: StartWorker,
) -> None:
    """It watches its connection instead, and does not register again and again."""
    registered = asyncio.Semaphore(0)
    count = 0

    class Controller(registry_pb2_grpc.ControllerServiceServicer):
        async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:
            nonlocal count
            count += 1
            registered.release()
            return pb.RegisterResponse(lease_id="lease")

    worker = await start_worker()
    services = [
        (
            "fastchat_grpc.v1.ControllerService",
            lambda server: registry_pb2_grpc.add_ControllerServiceServicer_to_server(Controller(), server),
        )
    ]
    server = RpcServer(ListenConfig(), services, bounds=CallBounds(watches=0))
    await server.start()
    registration = Registration(server.address, describe=worker._describe, load=worker._monitor.load, heartbeats=False)
    task = asyncio.create_task(registration.run())
    try:
        await asyncio.wait_for(registered.acquire(), 10)
        await asyncio.sleep(1.0)  # some registrations, were the refusal taken for a loss
        assert count == 1
        port = server.port
        await server.stop(0)
        server = RpcServer(ListenConfig(port=port), services, bounds=CallBounds(watches=0))
        await server.start()
        await asyncio.wait_for(registered.acquire(), 10)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop(0)


async def test_a_peer_with_too_many_calls_is_refused_and_keeps_nobody_out_of_the_fleet() -> None:
    release = asyncio.Event()
    inside = 0

    class Controller(registry_pb2_grpc.ControllerServiceServicer):
        async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
            nonlocal inside
            inside += 1
            await release.wait()
            return pb.ListModelsResponse()

        async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
            return pb.HeartbeatResponse()

    services = [
        (
            "fastchat_grpc.v1.ControllerService",
            lambda server: registry_pb2_grpc.add_ControllerServiceServicer_to_server(Controller(), server),
        )
    ]
    server = RpcServer(ListenConfig(), services, bounds=CallBounds(calls_per_peer=3))
    await server.start()
    try:
        async with open_channel(server.address) as channel:
            stub = registry_pb2_grpc.ControllerServiceStub(channel)
            calls = [stub.ListModels(pb.ListModelsRequest()) for _ in range(3)]
            await eventually(lambda: inside == 3)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListModels(pb.ListModelsRequest())
            error = error_from_rpc(caught.value)
            assert isinstance(error, errors.TooManyCalls)
            assert error.retry_after_s is not None
            await stub.Heartbeat(pb.HeartbeatRequest(lease_id="x"))
            release.set()
            await asyncio.gather(*calls)
            await stub.ListModels(pb.ListModelsRequest())
    finally:
        await server.stop(0)


def test_a_gateway_which_is_one_peer_can_fill_a_worker() -> None:
    admission = Admission(max_running=256, max_waiting=256)
    most = admission.max_running + admission.max_waiting + admission.max_resumed
    assert most < CallBounds().calls_per_peer < CallBounds().calls < MAX_STREAMS_PER_CONNECTION + 1


class Verbose(registry_pb2_grpc.ControllerServiceServicer):
    """Answers with as many bytes as the name of the model says."""

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(next_page_token="x" * int(request.name_prefix))

    async def WatchWorkers(self, request: pb.WatchWorkersRequest, context: Any) -> Any:
        yield pb.WatchWorkersResponse(version="x" * int(request.model))


async def test_an_answer_that_is_too_large_is_refused_in_words_that_say_what_to_do() -> None:
    def add(border: Any) -> None:
        registry_pb2_grpc.add_ControllerServiceServicer_to_server(Verbose(), border)

    server = RpcServer(ListenConfig(max_message_bytes=2000), [("fastchat_grpc.v1.ControllerService", add)])
    await server.start()
    try:
        async with open_channel(server.address) as channel:
            stub = registry_pb2_grpc.ControllerServiceStub(channel)
            fits = await stub.ListModels(pb.ListModelsRequest(name_prefix="1900"))
            assert len(fits.next_page_token) == 1900
            for call in (
                stub.ListModels(pb.ListModelsRequest(name_prefix="2000")),
                stub.WatchWorkers(pb.WatchWorkersRequest(model="2000")).read(),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                error = error_from_rpc(caught.value)
                assert isinstance(error, errors.AnswerTooLarge), error
                assert "at most 2000; ask for less" in error.message
    finally:
        await server.stop(0)
