"""The controller's process as a whole: what it does when something in it goes wrong, or runs out."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import pytest
from envoy.service.accesslog.v3 import als_pb2
from envoy.service.discovery.v3 import discovery_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from fastchat_grpc.controller.fleet import WorkerSpec
from fastchat_grpc.core import Load, ModelInfo
from fastchat_grpc.errors import Draining
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.rpc.status import error_from_rpc
from tests.conftest import eventually
from tests.integration.controllers import running_controller


def spec(i: int) -> WorkerSpec:
    return WorkerSpec(
        worker_id=f"w{i}",
        instance_id=f"i{i}",
        address=f"127.0.0.1:{i + 1}",
        models=(ModelInfo(name="m", context_length=1),),
    )


async def test_that_descriptors_run_short_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async with running_controller() as controller:
        controller._descriptor_limit = 10
        with caplog.at_level(logging.WARNING):
            for i in range(9):
                controller.registry.register(spec(i), Load())
                said = [record for record in caplog.records if "ulimit" in record.getMessage()]
                assert len(said) == (i >= 4), "5 workers take 10 of 10"


async def test_a_background_task_that_fails_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_controller() as controller:
        await eventually(lambda: controller._serving)
        looked, failing = 0, True
        expire = controller.registry.expire

        def expires() -> Any:
            nonlocal looked
            looked += 1
            if failing:
                raise RuntimeError("for once")
            return expire()

        monkeypatch.setattr(controller.registry, "expire", expires)
        await eventually(lambda: looked >= 3 and not controller._serving, timeout_s=20)
        failing, seen = False, looked
        await eventually(lambda: looked > seen, timeout_s=20)


ENDLESS = {
    "/grpc.health.v1.Health/Watch": health_pb2.HealthCheckRequest(),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": reflection_pb2.ServerReflectionRequest(
        list_services=""
    ),
    "/envoy.service.endpoint.v3.EndpointDiscoveryService/StreamEndpoints": discovery_pb2.DiscoveryRequest(),
    "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs": als_pb2.StreamAccessLogsMessage(),
}


async def test_calls_that_have_no_end_end_with_their_server() -> None:
    """They are not waited for, and not left to the end of the event loop, which logs each with a traceback."""
    async with running_controller() as controller:
        channel = open_channel(controller.address)
        calls = []
        for method, message in ENDLESS.items():
            # On the wire a call with one message is a stream of one.
            calls.append(call := channel.stream_stream(method)(timeout=20))
            await call.write(message.SerializeToString())
        border = controller._server._border
        await eventually(lambda: len(border._endless) == len(ENDLESS))
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
        assert isinstance(error_from_rpc(caught.value), Draining)
    assert not border._endless
    await channel.close()
