"""Both versions of reflection say the same of a server."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2 as pb

from fastchat_grpc.rpc.channels import open_channel
from tests.conftest import echo_config, running_worker

GENERATION = "fastchat_grpc.v1.GenerationService"


@pytest.mark.asyncio
@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_services_are_listed_and_described(version: str) -> None:
    async with running_worker(echo_config("m")) as worker, open_channel(worker.address) as channel:
        ask = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=pb.ServerReflectionRequest.SerializeToString,
            response_deserializer=pb.ServerReflectionResponse.FromString,
        )
        questions = (
            pb.ServerReflectionRequest(list_services=""),
            pb.ServerReflectionRequest(file_containing_symbol=GENERATION),
        )
        listed, described = [answer async for answer in ask(iter(questions), timeout=10)]
    assert GENERATION in {service.name for service in listed.list_services_response.service}
    files = [FileDescriptorProto.FromString(raw) for raw in described.file_descriptor_response.file_descriptor_proto]
    assert "GenerationService" in {service.name for file in files for service in file.service}
