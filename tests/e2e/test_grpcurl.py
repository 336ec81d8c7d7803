"""The real grpcurl against a real worker, by reflection alone."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import StartWorker

GRPCURL = Path(sys.executable).with_name("grpcurl")


async def grpcurl(*arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    process = await asyncio.create_subprocess_exec(
        str(GRPCURL), "-plaintext", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def json_objects(text: str) -> list[dict[str, object]]:
    """The JSON objects that follow each other in a text."""
    decoder, position, found = json.JSONDecoder(), 0, []
    while position < len(text.rstrip()):
        value, position = decoder.raw_decode(text, position)
        found.append(value)
        position += len(text[position:]) - len(text[position:].lstrip())
    return found


async def test_services_are_listed_and_described_by_reflection(worker: WorkerApp) -> None:
    status, out, err = await grpcurl(worker.address, "list")
    assert status == 0, err
    services = out.split()
    assert {
        "fastchat_grpc.v1.GenerationService",
        "fastchat_grpc.v1.OpenAIService",
        "grpc.health.v1.Health",
        "grpc.channelz.v1.Channelz",
    } <= set(services)
    for service in services:
        status, out, err = await grpcurl(worker.address, "describe", service)
        assert status == 0, err
        assert "service" in out
    status, out, _ = await grpcurl(worker.address, "describe", "fastchat_grpc.v1.GenerateRequest")
    assert status == 0
    assert "oneof input" in out


async def test_a_generation_streams(worker: WorkerApp) -> None:
    body = {"prompt": "Once upon a time", "stopping": {"max_new_tokens": 4}, "output": {"stream_interval": 1}}
    status, out, err = await grpcurl(
        "-d", json.dumps(body), worker.address, "fastchat_grpc.v1.GenerationService/Generate"
    )
    assert status == 0, err
    *deltas, last = json_objects(out)
    assert "".join(event["delta"]["text"] for event in deltas) == "Once"  # type: ignore[index]
    assert last["completion"]["finish_reason"] == "FINISH_REASON_LENGTH"  # type: ignore[index]


async def test_a_refusal_shows_code_message_and_details(worker: WorkerApp) -> None:
    body = {"prompt": "x", "sampling": {"temperature": -1}}
    status, _, err = await grpcurl(
        "-format-error", "-d", json.dumps(body), worker.address, "fastchat_grpc.v1.GenerationService/Generate"
    )
    assert status != 0
    error = json_objects(err)[0]
    assert error["code"] == 3
    assert error["message"] == "sampling.temperature: must be from 0 to 100, got -1.0"


async def test_health_is_served(worker: WorkerApp) -> None:
    status, out, err = await grpcurl(worker.address, "grpc.health.v1.Health/Check")
    assert status == 0, err
    assert "SERVING" in out


async def test_a_worker_under_load_answers_status(start_worker: StartWorker) -> None:
    app = await start_worker("a,b")
    status, out, err = await grpcurl(app.address, "fastchat_grpc.v1.GenerationService/GetStatus")
    assert status == 0, err
    assert [model["name"] for model in json_objects(out)[0]["models"]] == ["a", "b"]  # type: ignore[union-attr, index, attr-defined]
