"""State that travels with the answers of real workers, over a socket: a bridge goes on elsewhere without a seam."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.v1 import generation_pb2 as pb
from fastchat_grpc.worker.app import WorkerApp
from tests.bridge import GENERATE, OPENAI, Kept, Method, carry
from tests.conftest import echo_config, eventually, running_worker
from tests.integration.controllers import running_controller

SERVICE = "/fastchat_grpc.v1."
CHAT, TEXT = f"{SERVICE}OpenAIService/ChatCompletions", f"{SERVICE}OpenAIService/Completions"
ASKED = (("x-fastchat-resume", "1"),)


@pytest.fixture
async def channels() -> AsyncIterator[list[grpc.aio.Channel]]:
    """Connections to two echo workers that send a token at a time."""
    async with AsyncExitStack() as stack:
        found = []
        for name in ("a", "b"):
            config = echo_config(worker_id=name, drain_timeout_s=0.0)
            config = replace(config, backend=replace(config.backend, stream_interval=1))
            worker = await stack.enter_async_context(running_worker(config))
            found.append(await stack.enter_async_context(open_channel(worker.address)))
        yield found


def method(channel: grpc.aio.Channel, name: str) -> Method:
    async def call(request: bytes) -> AsyncGenerator[bytes, None]:
        stream = channel.unary_stream(name)(request, metadata=ASKED)
        try:
            async for frame in stream:
                told = dict(await stream.initial_metadata())
                assert told["x-fastchat-worker"] in "ab"
                assert told["x-fastchat-resume"] == "1"
                assert told["x-fastchat-grpc-fingerprint"] == told["x-fastchat-grpc-backend"] == "echo"
                yield frame
        finally:
            stream.cancel()

    return call


def events(frames: list[bytes]) -> Any:
    """A generation as its reader puts it together."""
    prompts, choices = [], {}
    for event in map(pb.GenerateResponse.FromString, frames):
        assert not event.HasField("resume_piece")
        match event.WhichOneof("event"):
            case "prompt":
                prompts.append(event.prompt.text)
            case "delta":
                known = choices.setdefault(event.delta.index, ["", [], [], []])
                known[0] += event.delta.reasoning + "|" * bool(event.delta.reasoning) + event.delta.text
                known[1] += event.delta.token_ids
                known[2] += [entry.token for entry in event.delta.logprobs]
            case "completion":
                end = event.completion
                choices[end.index][3].append(
                    (end.finish_reason, end.WhichOneof("matched"), end.usage.SerializeToString())
                )
    return prompts, choices


REQUESTS = {
    "plain": pb.GenerateRequest(prompt="hé 🦜 wo"),
    "choices": pb.GenerateRequest(prompt="one", output=pb.OutputOptions(n=3)),
    "stop": pb.GenerateRequest(prompt="a two th", stopping=pb.StopConditions(stop=["two t"])),
    "echo": pb.GenerateRequest(prompt="ab", output=pb.OutputOptions(echo=True, logprobs=1, prompt_logprobs=1)),
    "penalized": pb.GenerateRequest(prompt="ab", sampling=pb.SamplingParams(seed=3, presence_penalty=1.0)),
}


@pytest.mark.parametrize("case", REQUESTS)
async def test_a_generation_goes_on_from_every_break(channels: list[grpc.aio.Channel], case: str) -> None:
    request = REQUESTS[case].SerializeToString()
    workers = [method(channel, f"{SERVICE}GenerationService/Generate") for channel in channels]
    count = len([frame async for frame in workers[0](request)])
    whole = events(await carry(workers, GENERATE, request))
    for breaks in [*([k] for k in range(count)), [1] * (count - 1)]:
        assert events(await carry(workers, GENERATE, request, breaks)) == whole, breaks


@pytest.mark.parametrize("stream", [True, False])
async def test_a_reply_goes_on_between_servers(channels: list[grpc.aio.Channel], stream: bool) -> None:
    values = {"model": "echo", "prompt": ["one 🦜", "two"], "stream": stream, "max_tokens": 20, "logprobs": 1}
    request = HttpBody(data=json.dumps(values).encode()).SerializeToString()
    workers = [method(channel, TEXT) for channel in channels]
    texts = set()
    for breaks in ([], [3], [2, 5]):
        frames = await carry(workers, OPENAI, request, breaks)
        data = b"".join(HttpBody.FromString(frame).data for frame in frames)
        blocks = data.decode().split("\n\n")[:-2] if stream else [data.decode()]
        chunks = [json.loads(block.removeprefix("data: ")) for block in blocks]
        assert len({chunk["id"] for chunk in chunks}) == 1
        said = {0: "", 1: ""}
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            said[choice["index"]] += choice["text"]
        texts.add(tuple(said.values()))
    assert texts == {("one 🦜", "two")}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_worker_whose_time_to_drain_is_over_hands_its_replies_over(stream: bool) -> None:
    async with AsyncExitStack() as stack:
        leaving = WorkerApp(echo_config(options={"delay_ms": "20"}, drain_timeout_s=0.0))
        await leaving.start()
        staying = await stack.enter_async_context(running_worker(echo_config()))
        here, there = [await stack.enter_async_context(open_channel(w.address)) for w in (leaving, staying)]
        said = "word " * 30
        values = {"model": "echo", "messages": [{"role": "user", "content": said}], "stream": stream}
        request = HttpBody(data=json.dumps(values).encode()).SerializeToString()
        kept, passed = Kept(OPENAI), []
        call = here.unary_stream(CHAT)(request, metadata=ASKED)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for frame in call:
                passed.append(kept.take(frame))
                if len(passed) == 3:
                    await leaving.stop()
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        async for frame in there.unary_stream(CHAT)(request + kept.pieces, metadata=ASKED):
            passed.append(kept.take(frame))
        data = b"".join(HttpBody.FromString(frame).data for frame in passed if frame)
        assert b'"error"' not in data
        if stream:
            chunks = [json.loads(block[6:]) for block in data.decode().split("\n\n")[:-2]]
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        else:
            text = json.loads(data)["choices"][0]["message"]["content"]
        assert text == said


async def test_a_controller_gives_no_state_and_goes_on_with_a_workers() -> None:
    """It carries answers past its workers itself."""
    async with AsyncExitStack() as stack:
        controller = await stack.enter_async_context(running_controller())
        worker = await stack.enter_async_context(running_worker(echo_config(controllers=(controller.address,))))
        await eventually(lambda: worker.registered)
        here, relay = [await stack.enter_async_context(open_channel(s.address)) for s in (worker, controller)]
        values = {"model": "echo", "messages": [{"role": "user", "content": "one two"}], "stream": True}
        request = HttpBody(data=json.dumps(values).encode()).SerializeToString()
        kept, passed = Kept(OPENAI), []
        call = here.unary_stream(CHAT)(request, metadata=ASKED)
        async for frame in call:
            passed.append(kept.take(frame))
            if len(passed) == 2:
                call.cancel()
                break
        async for frame in relay.unary_stream(CHAT)(request + kept.pieces, metadata=ASKED):
            assert not HttpBody.FromString(frame).extensions
            passed.append(frame)
        data = b"".join(HttpBody.FromString(frame).data for frame in passed)
        chunks = [json.loads(block[6:]) for block in data.decode().split("\n\n")[:-2]]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one two"
        assert len({chunk["id"] for chunk in chunks}) == 1
        call = relay.unary_stream(f"{SERVICE}GenerationService/Generate")(
            pb.GenerateRequest(prompt="x").SerializeToString(), metadata=ASKED
        )
        assert not any([pb.GenerateResponse.FromString(frame).HasField("resume_piece") async for frame in call])
