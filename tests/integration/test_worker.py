"""A worker alone, over a real socket, with the echo backend."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fastchat_grpc import errors
from fastchat_grpc.client import AsyncClient, Client
from fastchat_grpc.config import FailoverConfig
from fastchat_grpc.core import ChatMessage, Completion, Delta, FinishReason, PromptEcho, WorkerState
from fastchat_grpc.rpc import convert
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.v1 import generation_pb2, generation_pb2_grpc
from fastchat_grpc.v1.openai_pb2_grpc import OpenAIServiceStub
from fastchat_grpc.worker import generation
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import StartWorker, echo_config, eventually, running_worker

ONCE = FailoverConfig(max_attempts=1, max_resumes=0, wait_s=0)
"""One attempt: what the worker itself answers."""


async def test_a_prompt_is_streamed_back_in_deltas_and_one_completion(client: AsyncClient) -> None:
    events = [event async for event in client.generate("héllo 🦜", stream_interval=1)]
    *deltas, completion = events
    assert all(isinstance(event, Delta) for event in deltas)
    assert "".join(event.text for event in deltas if isinstance(event, Delta)) == "héllo 🦜"
    assert not any("\ufffd" in event.text for event in deltas if isinstance(event, Delta))
    assert isinstance(completion, Completion)
    assert completion.finish_reason is FinishReason.STOP
    assert completion.usage.prompt_tokens == len("héllo 🦜".encode())
    assert completion.usage.completion_tokens == len("héllo 🦜".encode()) + 1, "the stop token counts"


async def test_usage_so_far_comes_with_every_delta(client: AsyncClient) -> None:
    counts = [
        event.usage.completion_tokens
        async for event in client.generate("abcdef", stream_interval=2)
        if isinstance(event, Delta)
    ]
    assert counts == [1, 3, 5, 7]


async def test_a_chat_answers_its_last_message(client: AsyncClient) -> None:
    messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Hello")]
    assert (await client.complete(messages)).text == "Hello"


async def test_several_choices_end_one_by_one(client: AsyncClient) -> None:
    result = await client.complete("abc", n=3)
    assert [choice.text for choice in result.choices] == ["abc"] * 3


async def test_echo_and_logprobs_come_as_asked(client: AsyncClient) -> None:
    events = [event async for event in client.generate("ab", echo=True, prompt_logprobs=1, logprobs=1)]
    first = events[0]
    assert isinstance(first, PromptEcho)
    assert first.text == "ab"
    assert first.logprobs[0].logprob is None
    entries = [entry for event in events if isinstance(event, Delta) for entry in event.logprobs]
    assert [entry.token for entry in entries] == ["a", "b", "</s>"]
    assert all(entry.logprob == 0 and entry.top[0].token_id == entry.token_id for entry in entries)


async def test_stop_length_and_cumulative_text(client: AsyncClient) -> None:
    stopped = await client.complete("one two three", stop=["two"])
    assert (stopped.text, stopped.choices[0].completion.matched) == ("one ", "two")
    cut = await client.complete("one two three", max_new_tokens=5)
    assert (cut.text, cut.choices[0].finish_reason) == ("one t", FinishReason.LENGTH)
    texts = [e.cumulative_text async for e in client.generate("abc", cumulative_text=True) if isinstance(e, Delta)]
    assert texts == ["a", "abc", "abc"]


async def test_more_embeddings_than_a_message_holds_are_refused_before_the_work(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MAX_MESSAGE_BYTES", 4000)  # of 16 MiB, and vectors of thousands of numbers
    with pytest.raises(
        errors.InvalidArgument, match=r"inputs: 100 embeddings of \d+ numbers .* 4000 bytes; embed at most"
    ):
        await client.embed(["a"] * 100)


async def test_embeddings_are_normalized_and_independent_of_their_batch(client: AsyncClient) -> None:
    together = await client.embed(["a", "longer text"])
    alone = await client.embed(["longer text"])
    assert list(together.embeddings[1]) == list(alone.embeddings[0])
    assert sum(x * x for x in alone.embeddings[0]) == pytest.approx(1, abs=1e-5)
    assert together.prompt_tokens == len("a" + "longer text")


async def test_tokens_are_counted_as_a_generation_sees_them(client: AsyncClient) -> None:
    messages = [ChatMessage(role="user", content="Hello")]
    counted = await client.count_tokens(messages)
    result = await client.complete(messages)
    assert counted == result.choices[0].usage.prompt_tokens
    assert await client.count_tokens("five5") == 5


async def test_status_and_model_info_describe_the_worker(worker: WorkerApp, client: AsyncClient) -> None:
    status = await client.status()
    assert (status.worker_id, status.instance_id) == (worker.worker_id, worker.instance_id)
    assert convert.load_from_pb(status.load).state is WorkerState.SERVING
    info = await client.model_info("echo")
    assert info.model.context_length == 4096
    assert "messages" in info.chat_template


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("", {}, "prompt"),
        ([], {}, "prompt_token_ids"),
        ([999], {}, "prompt_token_ids.ids[0]"),
        ("x" * 4096, {}, "input"),
        ("x", {"temperature": -1.0}, "sampling.temperature"),
        ("x", {"top_p": 7.0}, "sampling.top_p"),
        ("x", {"logit_bias": {400: 1.0}}, "sampling.logit_bias[400]"),
        ("x", {"max_new_tokens": 0}, "stopping.max_new_tokens"),
    ],
)
async def test_bad_input_is_refused_by_field_from_the_server(
    worker: WorkerApp, prompt: object, options: dict[str, object], field: str
) -> None:
    """Sent as messages, so that the server refuses and not the client's own checks."""
    message = generation_pb2.GenerateRequest()
    if isinstance(prompt, str):
        message.prompt = prompt
    else:
        message.prompt_token_ids.ids.extend(prompt)  # type: ignore[arg-type]
    for key, value in options.items():
        group = message.stopping if key in ("max_new_tokens",) else message.sampling
        if isinstance(value, dict):
            getattr(group, key).update(value)
        else:
            setattr(group, key, value)
    if isinstance(prompt, list):
        message.prompt_token_ids.SetInParent()
    async with open_channel(worker.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(message):
                pytest.fail("answered")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith(f"{field}: ")


async def test_an_unknown_model_is_not_found_and_the_served_ones_are_named(client: AsyncClient) -> None:
    with pytest.raises(errors.ModelNotFound, match="'nope' is not served here; served: echo"):
        await client.complete("x", model="nope")


async def test_a_nameless_request_needs_a_single_model(start_worker: StartWorker) -> None:
    app = await start_worker("a,b")
    async with AsyncClient(app.address) as client:
        assert (await client.complete("x", model="b")).text == "x"
        with pytest.raises(errors.InvalidArgument, match="several models are served; name one of a, b"):
            await client.complete("x")


async def test_what_the_backend_cannot_do_is_refused_by_name(client: AsyncClient) -> None:
    with pytest.raises(errors.AdapterNotFound, match="'lora'"):
        await client.complete("x", lora_adapter="lora")


async def test_a_message_beyond_the_limit_is_refused_and_the_worker_goes_on(client: AsyncClient) -> None:
    with pytest.raises(errors.FastChatError) as caught:
        await client.complete("x" * (17 * 1024 * 1024))
    assert caught.value.code is errors.Code.RESOURCE_EXHAUSTED
    assert (await client.complete("still here")).text == "still here"


async def test_a_failing_backend_is_an_internal_error_after_what_it_sent(start_worker: StartWorker) -> None:
    app = await start_worker(options={"fail_after": "3"})
    text = ""
    async with AsyncClient(app.address) as client:
        with pytest.raises(errors.BackendFailed, match="after 3 tokens"):
            async for event in client.generate("abcdef", stream_interval=1):
                if isinstance(event, Delta):
                    text += event.text
    assert text == "abc"


async def test_breaking_out_of_a_generation_frees_its_slot(start_worker: StartWorker) -> None:
    app = await start_worker(max_running=1, max_waiting=0, options={"delay_ms": "5"})
    async with AsyncClient(app.address) as client:
        async for _ in client.generate("x" * 1000, max_new_tokens=1000):
            break
        await eventually(lambda: app._generation.admission.running == 0)
        assert (await client.complete("ab")).text == "ab"


async def test_a_client_that_vanishes_frees_its_slot(start_worker: StartWorker) -> None:
    app = await start_worker(max_running=1, max_waiting=0, options={"delay_ms": "5"})
    client = AsyncClient(app.address)
    events = client.generate("x" * 1000, max_new_tokens=1000)
    await anext(events)
    await client.close()  # the connection goes, and nobody cancels
    await eventually(lambda: app._generation.admission.running == 0)
    with pytest.raises(errors.FastChatError):
        await anext(events)


async def test_a_deadline_ends_a_generation_and_frees_its_slot(start_worker: StartWorker) -> None:
    app = await start_worker(max_running=1, options={"delay_ms": "20"})
    async with AsyncClient(app.address, timeout_s=0.3) as client:
        with pytest.raises(errors.DeadlineExceeded):
            await client.complete("x" * 1000, max_new_tokens=1000)
    await eventually(lambda: app._generation.admission.running == 0)


async def test_a_deadline_that_passes_in_the_queue_leaves_the_queue(start_worker: StartWorker) -> None:
    app = await start_worker(max_running=1, max_waiting=5, options={"hang_after": "1"})
    async with AsyncClient(app.address) as holder, AsyncClient(app.address, timeout_s=0.2) as late:
        events = holder.generate("hold")
        await anext(events)
        with pytest.raises(errors.DeadlineExceeded):
            await late.complete("late")
        await eventually(lambda: app._generation.admission.waiting == 0)
        await events.aclose()


async def test_a_full_worker_says_so_and_when_to_come_back(start_worker: StartWorker) -> None:
    app = await start_worker(max_running=1, max_waiting=0, options={"hang_after": "1"})
    async with AsyncClient(app.address) as client:
        events = client.generate("hold")
        async with aclosing(events):
            await anext(events)
            with pytest.raises(errors.QueueFull) as caught:
                await client.complete("x")
            assert caught.value.retry_after_s


async def test_a_hundred_concurrent_requests_all_end_and_leave_nothing(start_worker: StartWorker) -> None:
    app = await start_worker(max_running=8, max_waiting=200)
    async with AsyncClient(app.address) as client:
        results = await asyncio.gather(*(client.complete(f"request {i}") for i in range(100)))
    assert [result.text for result in results] == [f"request {i}" for i in range(100)]
    admission = app._generation.admission
    assert (admission.running, admission.waiting) == (0, 0)
    assert not app._generation._active


async def test_health_tells_serving_and_then_draining() -> None:
    config = echo_config(options={"delay_ms": "20"}, drain_timeout_s=10)
    async with running_worker(config) as app, open_channel(app.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="fastchat_grpc.v1.GenerationService")
        watch = stub.Watch(request)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        async with AsyncClient(app.address, failover=ONCE) as client:
            running = asyncio.create_task(client.complete("x" * 20))
            await eventually(lambda: app._generation.admission.running == 1)
            stopping = asyncio.create_task(app.stop())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(errors.Draining):
                await client.complete("new")
            assert (await running).text == "x" * 20, "what ran was let end"
            await stopping


async def test_what_does_not_end_in_time_is_evicted_as_unavailable(start_worker: StartWorker) -> None:
    app = await start_worker(options={"hang_after": "3"}, drain_timeout_s=0.2)
    async with AsyncClient(app.address, failover=ONCE) as client:
        events = client.generate("abcdef", stream_interval=1)
        await anext(events)
        stopping = asyncio.create_task(app.stop())
        with pytest.raises(errors.Draining):
            async for _ in events:
                pass
        await stopping


@pytest.mark.parametrize("options", [{"hang_after": "3"}, {"first_delay_ms": "60000"}], ids=["midway", "silent"])
async def test_so_is_a_stream_of_the_openai_api_that_has_begun_with_a_ping(
    start_worker: StartWorker, options: dict[str, str]
) -> None:
    app = await start_worker(options=options, drain_timeout_s=0.2, sse_ping_s=0.01)
    async with open_channel(app.address) as channel:
        data = {"model": "echo", "stream": True, "messages": [{"role": "user", "content": "abcdef"}]}
        request = HttpBody(content_type="application/json", data=json.dumps(data).encode())
        chunks = aiter(OpenAIServiceStub(channel).ChatCompletions(request))
        said = (await anext(chunks)).data
        stopping = asyncio.create_task(app.stop())
        with pytest.raises(grpc.aio.AioRpcError) as broken:
            async for chunk in chunks:
                said = chunk.data
        assert broken.value.code() is grpc.StatusCode.UNAVAILABLE
        assert b'"error"' in said
        await stopping


async def test_two_servers_do_not_share_a_port(worker: WorkerApp) -> None:
    port = int(worker.address.rpartition(":")[2])
    with pytest.raises(errors.ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        async with running_worker(echo_config(port=port)):
            pytest.fail("started")


@pytest.fixture
def elsewhere() -> Iterator[WorkerApp]:
    """A worker of one slot, on an event loop of another thread."""
    started = asyncio.new_event_loop()
    app = WorkerApp(echo_config(max_running=1, max_waiting=9, options={"delay_ms": "2"}, drain_timeout_s=0))
    thread = threading.Thread(target=started.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(app.start(), started).result(10)
    try:
        yield app
    finally:
        asyncio.run_coroutine_threadsafe(app.stop(), started).result(10)
        started.call_soon_threadsafe(started.stop)
        thread.join()
        started.close()


def test_the_synchronous_client_streams_and_cancels(elsewhere: WorkerApp) -> None:
    with Client(elsewhere.address) as client:
        assert client.complete("hello").text == "hello"
        for event in client.generate("x" * 1000, max_new_tokens=1000):
            assert isinstance(event, Delta)
            break
        assert client.complete([{"role": "user", "content": "again"}]).text == "again"
        assert client.complete("a+b+c", stop="b+c").text == "a+"
        assert client.count_tokens("abc") == 3
        with pytest.raises(errors.ModelNotFound):
            client.complete("x", model="nope")


def test_a_synchronous_client_that_is_closed_keeps_no_thread_waiting(elsewhere: WorkerApp) -> None:
    for _ in range(5):
        client = Client(elsewhere.address)
        ends: list[type[Exception]] = []

        def read(client: Client = client, ends: list[type[Exception]] = ends) -> None:
            try:
                for _ in client.generate("x" * 3000):
                    pass
            except errors.FastChatError as error:
                ends.append(type(error))

        left = client.generate("y" * 3000)
        next(left)
        threads = [threading.Thread(target=read, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        client.close()
        for thread in threads:
            thread.join(10)
        assert ends == [errors.ClientClosed] * 4
        with pytest.raises(errors.ClientClosed):
            next(left)
        with pytest.raises(errors.ClientClosed):
            client.status()
        left.close()


def test_a_stream_that_the_garbage_collector_finds_on_the_clients_own_thread_stops_nothing(
    elsewhere: WorkerApp,
) -> None:
    with Client(elsewhere.address) as client:
        ring: list[Any] = [client.generate("x" * 3000)]
        next(ring[0])
        ring.append(ring)
        del ring
        client._loop.call_soon_threadsafe(gc.collect)
        assert client.complete("on").text == "on"
