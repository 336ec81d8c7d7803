"""Who answered which request: the same names at the caller, the relay and the worker."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc import errors
from fastchat_grpc.backends.echo import FINGERPRINT
from fastchat_grpc.controller.app import ControllerApp
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.rpc.status import error_from_rpc
from fastchat_grpc.v1 import generation_pb2 as pb
from fastchat_grpc.v1 import generation_pb2_grpc, openai_pb2_grpc
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import StartWorker, eventually
from tests.integration.controllers import running_controller
from tests.integration.wire import shaped_worker


@pytest.fixture
async def controller() -> AsyncIterator[ControllerApp]:
    async with running_controller() as app:
        yield app


@pytest.fixture
async def joined(controller: ControllerApp, start_worker: StartWorker) -> WorkerApp:
    worker = await start_worker(controllers=(controller.address,), worker_id="w-1")
    await eventually(lambda: len(controller.registry) == 1)
    return worker


Answer = tuple[dict[str, object], list[pb.GenerateResponse]]


async def ask(address: str, request: pb.GenerateRequest, **metadata: str) -> Answer:
    """Initial metadata and events of one generation."""
    async with open_channel(address) as channel:
        headers = [(key.replace("_", "-"), value) for key, value in metadata.items()]
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request, metadata=headers)
        events = [event async for event in call]
        return dict(await call.initial_metadata()), events


async def test_a_name_that_the_server_makes_is_the_same_everywhere(
    controller: ControllerApp, joined: WorkerApp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="fastchat_grpc")
    for address in (controller.address, joined.address):
        metadata, events = await ask(address, pb.GenerateRequest(prompt="a secret"))
        end = events[-1].completion
        assert len(end.request_id) == 32
        assert metadata["x-request-id"] == end.request_id
        assert (end.worker_id, end.model_fingerprint) == ("w-1", FINGERPRINT)
        assert end.model == "echo"
    assert metadata["x-fastchat-grpc-worker"] == "w-1"
    named = [record.getMessage() for record in caplog.records if end.request_id in record.getMessage()]
    assert named
    assert "a secret" not in caplog.text


async def test_the_callers_name_wins_and_that_of_the_message_first(
    controller: ControllerApp, joined: WorkerApp
) -> None:
    for address in (controller.address, joined.address):
        metadata, events = await ask(address, pb.GenerateRequest(prompt="x"), x_request_id="by-metadata")
        assert {metadata["x-request-id"], events[-1].completion.request_id} == {"by-metadata"}
        both = pb.GenerateRequest(prompt="x", request_id="by-message")
        metadata, events = await ask(address, both, x_request_id="by-metadata")
        assert {metadata["x-request-id"], events[-1].completion.request_id} == {"by-message"}
        unprintable = pb.GenerateRequest(prompt="x", request_id="\u00fc\n")
        metadata, events = await ask(address, unprintable)
        assert "x-request-id" not in metadata
        assert events[-1].completion.request_id == "\u00fc\n"


async def test_openai_answers_carry_the_name_too(controller: ControllerApp, joined: WorkerApp) -> None:
    body = HttpBody(data=json.dumps({"model": "echo", "messages": [{"role": "user", "content": "x"}]}).encode())
    for address in (controller.address, joined.address):
        async with open_channel(address) as channel:
            call = openai_pb2_grpc.OpenAIServiceStub(channel).ChatCompletions(body, metadata=[("x-request-id", "mine")])
            assert [item async for item in call]
            assert dict(await call.initial_metadata())["x-request-id"] == "mine"


async def test_a_refusal_comes_without_metadata_before_it(joined: WorkerApp, controller: ControllerApp) -> None:
    """A proxy can try elsewhere only if nothing has been answered yet."""
    for address in (controller.address, joined.address):
        async with open_channel(address) as channel:
            call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(pb.GenerateRequest())
            with pytest.raises(grpc.aio.AioRpcError):
                await call.read()
            assert "x-request-id" not in dict(await call.initial_metadata())


async def test_a_stream_is_not_continued_by_other_weights(joined: WorkerApp) -> None:
    begun = [pb.ResumedChoice(index=0, output_token_ids=[104], text_length=1)]
    same = pb.Resume(choices=begun, model_fingerprint=FINGERPRINT)
    _, events = await ask(joined.address, pb.GenerateRequest(prompt="hello", resume=same))
    assert events[0].delta.text.startswith("e")
    for known in (pb.Resume(choices=begun), same):
        await ask(joined.address, pb.GenerateRequest(prompt="hello", resume=known))
    other = pb.Resume(choices=begun, model_fingerprint="of the revision before")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(joined.address, pb.GenerateRequest(prompt="hello", resume=other))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert isinstance(error_from_rpc(caught.value), errors.ModelDiffers)


async def test_a_relay_above_others_tells_who_began_below_them() -> None:
    """What a controller says of its fleet is what all of it has in common; an answer comes from one of them."""
    async with AsyncExitStack() as stack:
        parent = await stack.enter_async_context(running_controller())
        child = await stack.enter_async_context(running_controller(parent_addresses=(parent.address,)))
        for name in ("a", "b"):
            worker = shaped_worker(controllers=(child.address,), fingerprint=f"of {name}", backend=name)
            await stack.enter_async_context(worker)
        await eventually(lambda: any(model.backend == "a,b" for model, _ in parent.registry.catalogue()))
        for _ in range(4):
            metadata, events = await ask(parent.address, pb.GenerateRequest(prompt="x"))
            backend = metadata["x-fastchat-grpc-backend"]
            assert backend in {"a", "b"}
            assert metadata["x-fastchat-grpc-fingerprint"] == f"of {backend}"
            assert events[-1].completion.model_fingerprint == f"of {backend}"


async def test_tokens_and_texts_over_a_relay_and_at_the_worker(controller: ControllerApp, joined: WorkerApp) -> None:
    text = "h\u00e9"
    for address in (controller.address, joined.address):
        async with open_channel(address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            tokens = await stub.Tokenize(pb.TokenizeRequest(prompt=text))
            assert list(tokens.token_ids) == list(text.encode())
            assert tokens.context_length > 0
            assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))).text == text
            openai = openai_pb2_grpc.OpenAIServiceStub(channel)
            body = HttpBody(data=json.dumps({"model": "echo", "tokens": list(tokens.token_ids)}).encode())
            assert json.loads((await openai.Detokenize(body)).data) == {"prompt": text}
