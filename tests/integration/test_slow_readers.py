"""Callers that do not read what they asked for, and what else takes a worker's slots."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.core import WorkerState
from fastchat_grpc.errors import ReaderTooSlow
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.rpc.status import error_from_rpc
from fastchat_grpc.v1 import generation_pb2 as pb
from fastchat_grpc.v1 import generation_pb2_grpc, openai_pb2_grpc
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import StartWorker, eventually
from tests.integration.controllers import running_controller

LONG = "x" * 20_000
WINDOW = (
    ("grpc.http2.lookahead_bytes", 16_384),
    ("grpc.http2.bdp_probe", 0),
)
"""A flow-control window that stays small, so that a reader that stops is felt soon."""


@asynccontextmanager
async def unread_stream(worker: WorkerApp) -> AsyncIterator[Any]:
    """A stream of which one event was read and no more, once the worker feels it."""
    async with open_channel(worker.address, options=WINDOW) as channel:
        request = pb.GenerateRequest(prompt=LONG)
        request.stopping.max_new_tokens = len(LONG)
        request.output.stream_interval = 1
        request.output.logprobs = 5
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request)
        await call.read()
        generation = worker._generation
        before = -1

        def stands() -> bool:
            nonlocal before
            was, before = before, generation.output_tokens
            return was == before and generation.admission.running == 1 and generation.awaiting == 0

        await eventually(stands, timeout_s=30)
        yield call


async def test_a_caller_that_does_not_read_makes_no_idle_worker_degraded(start_worker: StartWorker) -> None:
    worker = await start_worker(context_length=2 * len(LONG) + 1, stall_timeout_s=0.3)
    async with unread_stream(worker):
        await asyncio.sleep(1.0)  # longer than the stall timeout and a sample
        assert worker._monitor.load().state is WorkerState.SERVING
        assert worker._generation.admission.running == 1, "its slot is still its own"


async def test_a_caller_that_does_not_read_loses_its_slot_and_is_told_why(
    start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await start_worker(context_length=2 * len(LONG) + 1, max_running=1, max_waiting=0, send_timeout_s=0.5)
    async with unread_stream(worker) as call:
        await eventually(lambda: worker._generation.admission.running == 0)
        async with AsyncClient(worker.address) as other:
            assert (await other.complete("next")).text == "next"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
        error = error_from_rpc(caught.value)
        assert isinstance(error, ReaderTooSlow)
        assert "--send-timeout" in error.message
    await eventually(lambda: not worker._generation._active)
    assert worker._generation.admission.running == 0
    assert "were not read for 0.5 s" in caplog.text


@pytest.mark.parametrize("surface", ["typed", "openai"])
async def test_a_caller_of_a_relay_that_does_not_read_keeps_no_reservation(
    start_worker: StartWorker, caplog: pytest.LogCaptureFixture, surface: str
) -> None:
    async with running_controller(send_timeout_s=0.5) as controller:
        await start_worker(context_length=2 * len(LONG) + 1, controllers=(controller.address,))
        await eventually(lambda: len(controller.registry) == 1)
        (worker,) = controller.registry.workers()
        async with open_channel(controller.address, options=WINDOW) as channel:
            if surface == "typed":
                request = pb.GenerateRequest(prompt=LONG)
                request.stopping.max_new_tokens = len(LONG)
                call: Any = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request)
            else:
                body = {"model": "echo", "prompt": LONG, "max_tokens": len(LONG), "stream": True}
                call = openai_pb2_grpc.OpenAIServiceStub(channel).Completions(HttpBody(data=json.dumps(body).encode()))
            await call.read()
            assert worker.reserved_count == 1
            await eventually(lambda: worker.reserved_count == 0, timeout_s=30)
            assert not controller.relay.attempts.running
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await call.read() is not grpc.aio.EOF:
                    pass
            error = error_from_rpc(caught.value)
            assert isinstance(error, ReaderTooSlow)
            assert "--send-timeout" in error.message
        async with AsyncClient(controller.address) as other:
            assert (await other.complete("next")).text == "next"
        await eventually(lambda: worker.reserved_count == 0)
    assert "were not read for 0.5 s" in caplog.text


async def test_a_slow_reader_within_the_bound_gets_everything(start_worker: StartWorker) -> None:
    worker = await start_worker(context_length=2 * len(LONG) + 1, send_timeout_s=30)
    async with unread_stream(worker) as call:
        await asyncio.sleep(0.5)
        text = 1
        while (event := await call.read()) is not grpc.aio.EOF:
            text += len(event.delta.text)
        assert text == len(LONG)


async def test_choices_take_as_many_slots_as_they_are(start_worker: StartWorker) -> None:
    worker = await start_worker(max_running=4, max_waiting=9, options={"delay_ms": "20"})
    admission = worker._generation.admission
    async with AsyncClient(worker.address) as client:
        three = asyncio.create_task(client.complete("abcdefgh", n=3))
        await eventually(lambda: admission.running == 3)
        two = asyncio.create_task(client.complete("abcdefgh", n=2))
        await eventually(lambda: admission.waiting == 1)
        assert [choice.text for choice in (await three).choices] == ["abcdefgh"] * 3
        await eventually(lambda: admission.running == 2)
        await two
    await eventually(lambda: admission.running == 0)
