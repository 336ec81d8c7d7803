"""Streams that lose their worker where nothing is as in the simplest fleet: one worker only, full ones, several
models, workers that can do less."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, aclosing
from typing import Any

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc import errors
from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import FailoverConfig, LeaseConfig
from fastchat_grpc.controller.app import ControllerApp
from fastchat_grpc.controller.health import Tier
from fastchat_grpc.core import Capability, Delta, GenerateRequest, WorkerState
from fastchat_grpc.errors import ModelNotFound, NoLiveWorker, UnsupportedField
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.rpc.status import error_from_rpc
from fastchat_grpc.v1 import generation_pb2 as pb
from fastchat_grpc.v1.generation_pb2_grpc import GenerationServiceStub
from fastchat_grpc.v1.openai_pb2 import GetOpenAIModelRequest
from fastchat_grpc.v1.openai_pb2_grpc import OpenAIServiceStub
from fastchat_grpc.worker.app import WorkerApp
from fastchat_grpc.worker.servicer import GenerationServicer
from tests.conftest import StartWorker, eventually
from tests.integration.controllers import in_use, running_controller, vanish
from tests.integration.wire import open_wire, shaped_worker

TEXT = "The quick brown fox jumps over the lazy dog. " * 3
SLOW = {"delay_ms": "5"}
QUICK = LeaseConfig(time_to_live_s=1.5, heartbeat_interval_s=0.5)
BRIEF = FailoverConfig(wait_s=1.0)
"""Of a controller that nobody able will join."""
BARE = frozenset({Capability.GENERATE, Capability.CHAT, Capability.LOGPROBS})
"""What `upstream` can: nothing of resuming."""
RESUMES = BARE | {Capability.RESUME}
"""What vLLM, SGLang, LightLLM and OpenVINO can."""


@pytest.fixture
async def controller() -> AsyncIterator[ControllerApp]:
    async with running_controller(lease=QUICK) as app:
        yield app


@pytest.fixture
async def client(controller: ControllerApp) -> AsyncIterator[AsyncClient]:
    # It must be the controller that saves the stream.
    async with AsyncClient(controller.address, failover=FailoverConfig(max_resumes=0)) as client:
        yield client


async def said(events: Any) -> str:
    text = ""
    async with aclosing(events) as stream:
        async for event in stream:
            text += event.text if isinstance(event, Delta) else ""
    return text


class TestOneWorker:
    async def test_a_cut_connection_to_the_only_worker_loses_no_stream(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        async with open_wire() as wire:
            worker = await start_worker(
                controllers=(controller.address,), options=SLOW, advertised_address=wire.address
            )
            wire.target = worker._server.port  # type: ignore[union-attr]
            await eventually(lambda: len(controller.registry) == 1)
            streams = [asyncio.create_task(said(client.generate(TEXT, stream_interval=1))) for _ in range(4)]
            await eventually(lambda: worker._generation.output_tokens > 40)
            wire.cut()
            assert await asyncio.wait_for(asyncio.gather(*streams), 20) == [TEXT] * 4
            assert await client.count_tokens("abc") == 3

    async def test_a_worker_that_is_frozen_for_longer_than_its_lease_goes_on(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        async with open_wire() as wire, open_wire() as back:
            back.target = controller.port
            worker = await start_worker(controllers=(back.address,), options=SLOW, advertised_address=wire.address)
            wire.target = worker._server.port  # type: ignore[union-attr]
            await eventually(lambda: len(controller.registry) == 1)
            stream = asyncio.create_task(said(client.generate(TEXT, stream_interval=1)))
            await eventually(lambda: worker._generation.output_tokens > 10)
            wire.stop()
            back.stop()
            await eventually(lambda: len(controller.registry) == 0)
            assert len(controller.relay.attempts.stranded) == 1  # nobody else could take it: it stays
            wire.go_on()
            back.go_on()
            assert await asyncio.wait_for(stream, 20) == TEXT

    async def test_a_stream_that_outlives_its_drained_worker_waits_for_the_next_one(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        worker = await start_worker(controllers=(controller.address,), options=SLOW, drain_timeout_s=0.1)
        await eventually(lambda: len(controller.registry) == 1)
        stream = asyncio.create_task(said(client.generate(TEXT, stream_interval=1)))
        await eventually(lambda: worker._generation.output_tokens > 10)
        await worker.stop()
        await eventually(lambda: len(controller.registry) == 0)
        assert not stream.done()
        await asyncio.sleep(1.5)  # a rolling restart takes its time
        await start_worker(controllers=(controller.address,), options=SLOW)
        assert await asyncio.wait_for(stream, 20) == TEXT
        assert controller.relay.failover.resumed == 1


class TestAnotherServerAtAnAddress:
    async def test_what_it_does_not_serve_is_no_news_of_the_model(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        async with open_wire() as wire:
            worker = await start_worker("a", controllers=(controller.address,), advertised_address=wire.address)
            other = await start_worker("b")
            wire.target = worker._server.port  # type: ignore[union-attr]
            await eventually(lambda: len(controller.registry) == 1)
            assert await client.count_tokens("abc", model="a") == 3
            wire.target = other._server.port  # type: ignore[union-attr]
            wire.cut()
            await eventually(lambda: controller.registry.at(wire.address)[0].health.tier is Tier.READY)
            for call in (client.count_tokens("abc", model="a"), client.complete("abc", model="a")):
                with pytest.raises(NoLiveWorker):
                    await call
            await start_worker("a", controllers=(controller.address,))
            await eventually(lambda: len(controller.registry) == 2)
            for _ in range(10):
                assert await client.count_tokens("abc", model="a") == 3


class TestFullFleets:
    async def test_streams_of_a_killed_worker_find_room_on_full_survivors(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        config = {"controllers": (controller.address,), "options": SLOW, "max_running": 2, "max_waiting": 2}
        workers = {w.address: w for w in [await start_worker(**config) for _ in range(2)]}
        await eventually(lambda: len(controller.registry) == 2)
        streams = [asyncio.create_task(said(client.generate(TEXT, stream_interval=1))) for _ in range(8)]
        await eventually(lambda: all(w._generation.admission.waiting == 2 for w in workers.values()))
        await vanish(workers[await in_use(controller)])
        assert await asyncio.wait_for(asyncio.gather(*streams), 60) == [TEXT] * 8

    async def test_the_drain_of_a_controller_waits_for_streams_that_wait(self, start_worker: StartWorker) -> None:
        async with running_controller(lease=QUICK, drain_timeout_s=20.0) as controller:
            async with AsyncClient(controller.address, failover=FailoverConfig(max_resumes=0)) as client:
                worker = await start_worker(controllers=(controller.address,), options=SLOW)
                await eventually(lambda: len(controller.registry) == 1)
                stream = asyncio.create_task(said(client.generate(TEXT, stream_interval=1)))
                await eventually(lambda: worker._generation.output_tokens > 10)
                await vanish(worker)
                await eventually(lambda: controller.registry.recovering("echo"))
                stopping = asyncio.create_task(controller.stop())
                await eventually(lambda: controller.generation.draining)
                await asyncio.sleep(0.3)  # longer than it looks for what still runs
                assert not stopping.done()
                await start_worker(controllers=(controller.address,), options=SLOW)
                assert await asyncio.wait_for(stream, 20) == TEXT
                await asyncio.wait_for(stopping, 20)


class TestYoungControllers:
    """Who asks before the fleet has come back waits, and never hears that a model does not exist."""

    @pytest.fixture
    async def young(self) -> AsyncIterator[ControllerApp]:
        slow = LeaseConfig(time_to_live_s=30, heartbeat_interval_s=10)  # it stays young for longer than the test
        async with running_controller(young=True, lease=slow) as controller:
            yield controller

    @pytest.mark.parametrize("model", ["echo", ""])
    async def test_a_request_waits_for_its_worker(
        self, young: ControllerApp, start_worker: StartWorker, model: str
    ) -> None:
        async with AsyncClient(young.address, failover=FailoverConfig(max_attempts=1)) as client:
            asking = [
                asyncio.create_task(said(client.generate("abc", model=model))),
                asyncio.create_task(client.count_tokens("abc", model=model)),
            ]
            await eventually(lambda: young.relay.failover.running == 2)
            await start_worker(controllers=(young.address,))
            assert await asyncio.wait_for(asyncio.gather(*asking), 10) == ["abc", 3]

    async def test_an_openai_request_waits_for_its_worker(
        self, young: ControllerApp, start_worker: StartWorker
    ) -> None:
        async with open_channel(young.address) as channel:
            stub = OpenAIServiceStub(channel)
            chat = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], "stream": True}
            streamed = stub.ChatCompletions(HttpBody(data=json.dumps(chat).encode()))
            tokens = stub.Tokenize(HttpBody(data=b'{"model": "echo", "prompt": "abc"}'))
            model = stub.GetModel(GetOpenAIModelRequest(model="echo"))
            reading = asyncio.create_task(streamed.read())
            await asyncio.sleep(0.2)
            assert not any(call.done() for call in (reading, tokens, model))
            await start_worker(controllers=(young.address,))
            async with asyncio.timeout(10):
                assert b"chat.completion" in (await reading).data
                assert json.loads((await tokens).data)["tokens"] == [97, 98, 99]
                assert json.loads((await model).data)["id"] == "echo"

    async def test_a_controller_that_never_met_the_worker_is_not_the_last_to_be_asked(
        self, start_worker: StartWorker
    ) -> None:
        async with running_controller() as restarted, running_controller() as other:
            await start_worker(controllers=(other.address,))
            await start_worker("m", controllers=(restarted.address,))
            await eventually(lambda: len(restarted.registry) == len(other.registry) == 1)
            async with AsyncClient([restarted.address, other.address]) as client:
                assert await said(client.generate("abc", model="echo")) == "abc"
                assert await client.count_tokens("abc", model="echo") == 3
                with pytest.raises(ModelNotFound):
                    await client.count_tokens("abc", model="no-such-model")

    async def test_it_is_told_to_come_again_when_none_comes(self) -> None:
        slow = LeaseConfig(time_to_live_s=30, heartbeat_interval_s=10)
        async with (
            running_controller(young=True, lease=slow, failover=FailoverConfig(wait_s=0.2)) as controller,
            AsyncClient(controller.address, failover=FailoverConfig(wait_s=0)) as client,
            open_channel(controller.address) as channel,
        ):
            with pytest.raises(errors.Starting):
                await client.complete("abc", model="nobody-knows")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await OpenAIServiceStub(channel).GetModel(GetOpenAIModelRequest(model="nobody-knows"))
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE

    async def test_a_client_goes_to_another_controller(self, start_worker: StartWorker) -> None:
        slow = LeaseConfig(time_to_live_s=30, heartbeat_interval_s=10)
        async with (
            running_controller(young=True, lease=slow, failover=FailoverConfig(wait_s=0)) as young,
            running_controller(lease=QUICK) as old,
            AsyncClient([young.address, old.address]) as client,
        ):
            await start_worker(controllers=(old.address,))
            await eventually(lambda: len(old.registry) == 1)
            assert (await asyncio.wait_for(client.complete("abc", model="echo"), 5)).text == "abc"


async def trouble(controller: ControllerApp, worker: WorkerApp) -> None:
    """Let a worker call itself DEGRADED, and the controller know."""
    worker._monitor.set_state(WorkerState.DEGRADED)
    await eventually(
        lambda: controller.registry.worker(worker.worker_id).load.state is WorkerState.DEGRADED, timeout_s=5
    )


@pytest.mark.parametrize("tokens", [4, 20, 38], ids=["in the mark", "in the thought", "in the answer"])
async def test_a_thought_goes_on_where_it_was(
    controller: ControllerApp, client: AsyncClient, start_worker: StartWorker, tokens: int
) -> None:
    wedged = await start_worker(
        controllers=(controller.address,), options={"hang_after": str(tokens)}, reasoning_parser="qwen3"
    )
    await eventually(lambda: len(controller.registry) == 1)
    prompt = [{"role": "user", "content": "<think>a thought, and another</think>an answer"}]
    asked = asyncio.create_task(client.complete(prompt, stream_interval=1))
    await eventually(lambda: wedged._generation.output_tokens == tokens)
    await trouble(controller, wedged)
    await start_worker(controllers=(controller.address,), reasoning_parser="qwen3")
    result = await asyncio.wait_for(asked, 20)
    assert (result.choices[0].reasoning, result.text) == ("a thought, and another", "an answer")
    assert result.choices[0].usage.reasoning_tokens == len("a thought, and another</think")
    assert controller.relay.failover.resumed == 1


class TestSeveralModels:
    async def test_a_stream_stays_at_a_degraded_worker_that_alone_has_its_model(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        both = await start_worker("a,b", controllers=(controller.address,), options=SLOW)
        await start_worker("b", controllers=(controller.address,), options=SLOW)
        await eventually(lambda: len(controller.registry) == 2)
        stream = asyncio.create_task(said(client.generate(TEXT, model="a", stream_interval=1)))
        await eventually(lambda: both._generation.output_tokens > 10)
        await trouble(controller, both)
        assert await asyncio.wait_for(stream, 20) == TEXT
        assert controller.relay.failover.resumed == 0

    async def test_it_is_moved_as_soon_as_another_has_the_model(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        wedged = await start_worker("a,b", controllers=(controller.address,), options={"hang_after": "20"})
        await eventually(lambda: len(controller.registry) == 1)
        stream = asyncio.create_task(said(client.generate(TEXT, model="a", stream_interval=1)))
        await eventually(lambda: wedged._generation.output_tokens == 20)
        await trouble(controller, wedged)
        await eventually(lambda: len(controller.relay.attempts.stranded) == 1)
        await start_worker("b", controllers=(controller.address,))
        await start_worker("a", controllers=(controller.address,))
        assert await asyncio.wait_for(stream, 20) == TEXT
        assert controller.relay.failover.resumed == 1
        assert len(controller.relay.attempts.stranded) == 0

    async def test_it_is_not_moved_to_one_that_cannot_go_on_with_it(
        self, controller: ControllerApp, client: AsyncClient, start_worker: StartWorker
    ) -> None:
        slow = await start_worker(controllers=(controller.address,), options=SLOW)
        await eventually(lambda: len(controller.registry) == 1)
        stream = asyncio.create_task(said(client.generate(TEXT, stream_interval=1)))
        await eventually(lambda: slow._generation.output_tokens > 10)
        async with shaped_worker(controllers=(controller.address,), capabilities=BARE):
            await eventually(lambda: len(controller.registry) == 2)
            await trouble(controller, slow)
            assert await asyncio.wait_for(stream, 20) == TEXT
            assert controller.relay.failover.resumed == 0


def no_seeds(request: GenerateRequest) -> None:
    """As LightLLM and SGLang."""
    if request.sampling.seed is not None:
        raise UnsupportedField("sampling.seed", "this engine has no seeds")


def no_seeded_resume(request: GenerateRequest) -> None:
    """As vLLM."""
    if request.resume and request.sampling.seed is not None:
        raise UnsupportedField("resume", "the random numbers of a seed cannot be continued in the middle")


class TestMixedFleets:
    @pytest.fixture
    async def shaped(self, controller: ControllerApp) -> AsyncIterator[Any]:
        """Starts shaped workers that are registered."""
        async with AsyncExitStack() as stack:
            count = 0

            async def start(**shape: Any) -> WorkerApp:
                nonlocal count
                count += 1
                shape.setdefault("options", SLOW)
                app = await stack.enter_async_context(shaped_worker(controllers=(controller.address,), **shape))
                await eventually(lambda: len(controller.registry) == count)
                return app

            yield start

    async def broken(self, worker: WorkerApp, stream: Any, *others: Awaitable[WorkerApp]) -> tuple[str, Any]:
        """The text of a stream whose only worker dies in the middle, and the others, which came meanwhile."""
        task = asyncio.create_task(said(stream))
        await eventually(lambda: worker._generation.output_tokens > 10)
        came = [await other for other in others]
        assert not task.done()
        await vanish(worker)
        return await asyncio.wait_for(task, 20), came

    async def test_an_engine_without_seeds_gets_none(self, client: AsyncClient, shaped: Any) -> None:
        worker = await shaped(capabilities=RESUMES, refuse=no_seeds)
        assert await said(client.generate(TEXT)) == TEXT
        assert worker.seen[0].sampling.seed is None

    async def test_a_sampled_stream_goes_on_where_seeds_cannot_be_continued(
        self, client: AsyncClient, shaped: Any
    ) -> None:
        vllm = {"capabilities": RESUMES, "refuse": no_seeded_resume}
        stream = client.generate(TEXT, stream_interval=1)
        text, [second] = await self.broken(await shaped(**vllm), stream, shaped(**vllm))
        assert text == TEXT
        assert second.seen[0].resume

    async def test_the_relays_own_seed_is_left_out_where_it_cannot_be_continued(
        self, client: AsyncClient, shaped: Any
    ) -> None:
        first = await shaped()
        stream = client.generate(TEXT, stream_interval=1)
        text, [second] = await self.broken(first, stream, shaped(capabilities=RESUMES, refuse=no_seeds))
        assert text == TEXT
        assert first.seen[0].sampling.seed is not None
        assert second.seen[0].sampling.seed is None

    async def test_a_callers_seed_goes_on_only_where_its_numbers_do(self, client: AsyncClient, shaped: Any) -> None:
        first = await shaped()
        text, [vllm, another, last] = await self.broken(
            first,
            client.generate(TEXT, seed=7, stream_interval=1),
            shaped(capabilities=RESUMES, refuse=no_seeded_resume),
            shaped(backend="another"),  # its generator is another one
            shaped(),
        )
        assert text == TEXT
        assert not vllm.seen
        assert not another.seen
        assert last.seen[0].sampling.seed == 7

    async def test_a_callers_seed_on_an_engine_that_cannot_continue_it_breaks_with_the_reason(
        self, client: AsyncClient, shaped: Any
    ) -> None:
        vllm = {"capabilities": RESUMES, "refuse": no_seeded_resume}
        with pytest.raises(errors.NotResumable, match="random numbers of a seed"):
            await self.broken(await shaped(**vllm), client.generate(TEXT, seed=7, stream_interval=1), shaped(**vllm))

    async def test_a_stream_with_penalties_passes_over_those_that_cannot_continue_them(
        self, client: AsyncClient, shaped: Any
    ) -> None:
        first = await shaped()
        text, [passed, last] = await self.broken(
            first,
            client.generate(TEXT, presence_penalty=0.5, stream_interval=1),
            shaped(capabilities=RESUMES | {Capability.SEEDED_RESUME}),
            shaped(),
        )
        assert text == TEXT
        assert not passed.seen
        assert last.seen[0].resume

    async def test_a_stream_with_penalties_says_why_it_cannot_go_on(self, client: AsyncClient, shaped: Any) -> None:
        first = await shaped(capabilities=RESUMES)
        stream = client.generate(TEXT, presence_penalty=0.5, stream_interval=1)
        with pytest.raises(errors.NotResumable, match="stateful_resume"):
            await self.broken(first, stream, shaped(capabilities=RESUMES))

    async def test_a_request_that_arrives_resumed_goes_to_a_worker_that_can(
        self, controller: ControllerApp, shaped: Any
    ) -> None:
        passed, able = await shaped(capabilities=BARE), await shaped()
        request = pb.GenerateRequest(prompt="abcdef")
        request.resume.choices.add(index=0, output_token_ids=list(b"abc"), text_length=3)
        async with open_channel(controller.address) as channel:
            for _ in range(5):
                text = "".join([e.delta.text async for e in GenerationServiceStub(channel).Generate(request)])
                assert text == "def"
        assert not passed.seen
        assert len(able.seen) == 5

    async def test_a_request_goes_to_a_worker_that_can_do_what_it_asks_for(
        self, client: AsyncClient, shaped: Any
    ) -> None:
        passed = await shaped(capabilities=RESUMES - {Capability.LOGPROBS})
        able = await shaped(capabilities=RESUMES)
        for _ in range(5):
            assert await said(client.generate("abc", logprobs=0)) == "abc"
        assert not passed.seen
        assert len(able.seen) == 5

    async def test_where_no_worker_can_do_it_one_of_them_is_asked(self, client: AsyncClient, shaped: Any) -> None:
        asked = await shaped(capabilities=RESUMES - {Capability.LOGPROBS})
        await said(client.generate("abc", logprobs=0))
        assert len(asked.seen) == 1

    async def test_a_stream_of_a_backend_that_cannot_be_resumed_breaks_with_the_reason(
        self, client: AsyncClient, shaped: Any
    ) -> None:
        first = await shaped(capabilities=BARE)
        with pytest.raises(errors.NotResumable, match="cannot be continued by another worker"):
            await self.broken(first, client.generate(TEXT, stream_interval=1), shaped())

    async def test_an_adapter_is_found_where_it_is_loaded(self, client: AsyncClient, shaped: Any) -> None:
        plain, holder = await shaped(), await shaped(adapters=("red", "green"))
        for model in ("echo", ""):
            for _ in range(3):
                assert await said(client.generate("abc", model=model, lora_adapter="red")) == "abc"
        assert [request.lora_adapter for request in holder.seen] == ["red"] * 6
        assert not plain.seen
        with pytest.raises(errors.AdapterNotFound, match="blue"):
            await said(client.generate("abc", model="echo", lora_adapter="blue"))

    async def test_a_stream_never_goes_on_with_another_revision_of_its_model(
        self, client: AsyncClient, shaped: Any
    ) -> None:
        first = await shaped(fingerprint="v1")
        stream = client.generate(TEXT, stream_interval=1)
        text, [newer, same] = await self.broken(first, stream, shaped(fingerprint="v2"), shaped(fingerprint="v1"))
        assert text == TEXT
        assert not newer.seen
        assert len(same.seen) == 1

    @pytest.mark.parametrize("through", ["workers", "controllers"])
    async def test_nor_does_a_client_that_knows_several_servers(self, start_worker: StartWorker, through: str) -> None:
        async with AsyncExitStack() as stack:
            addresses: list[str] = []
            workers: list[WorkerApp] = []
            for fingerprint in ("v1", "v2"):
                at: tuple[str, ...] = ()
                if through == "controllers":
                    at = ((await stack.enter_async_context(running_controller(lease=QUICK, failover=BRIEF))).address,)
                worker = shaped_worker(controllers=at, options=SLOW, fingerprint=fingerprint)
                workers.append(await stack.enter_async_context(worker))
                addresses.append(at[0] if at else workers[-1].address)
            await eventually(lambda: through == "workers" or all(worker.registered for worker in workers))
            patient = FailoverConfig(wait_s=0.5)
            client = await stack.enter_async_context(AsyncClient(addresses, failover=patient))
            stream = asyncio.create_task(said(client.generate(TEXT, stream_interval=1)))
            await eventually(lambda: workers[0]._generation.output_tokens > 3)
            gone = asyncio.create_task(vanish(workers[0]))
            with pytest.raises(errors.FastChatError):
                await stream
            assert not workers[1].seen, "the other revision has taken nothing on"  # type: ignore[attr-defined]
            await gone

    @pytest.mark.parametrize("through", ["workers", "controllers"])
    async def test_a_clients_seed_goes_on_at_its_backend_wherever_that_is(self, through: str) -> None:
        """Three engines of one model, each behind a controller of its own or asked directly."""
        async with AsyncExitStack() as stack:
            addresses: list[str] = []
            workers: list[Any] = []
            for backend in ("engine", "another", "engine"):
                at: tuple[str, ...] = ()
                if through == "controllers":
                    at = ((await stack.enter_async_context(running_controller(lease=QUICK, failover=BRIEF))).address,)
                worker = shaped_worker(controllers=at, options=SLOW, backend=backend)
                workers.append(await stack.enter_async_context(worker))
                addresses.append(at[0] if at else workers[-1].address)
            await eventually(lambda: through == "workers" or all(worker.registered for worker in workers))
            client = await stack.enter_async_context(AsyncClient(addresses))
            stream = asyncio.create_task(said(client.generate(TEXT, seed=7, stream_interval=1)))
            await eventually(lambda: workers[0]._generation.output_tokens > 3)
            gone = asyncio.create_task(vanish(workers[0]))
            assert await asyncio.wait_for(stream, 30) == TEXT
            assert not workers[1].seen, "another engine has taken nothing on"
            assert workers[2].seen[0].resume_backend == "engine"
            await gone

    async def test_a_worker_takes_no_seed_of_another_backend(self, shaped: Any) -> None:
        worker = await shaped()
        request = pb.GenerateRequest(prompt="abcdef", sampling=pb.SamplingParams(seed=1))
        request.resume.choices.add(index=0, output_token_ids=list(b"abc"), text_length=3)
        async with open_channel(worker.address) as channel:
            stub = GenerationServiceStub(channel)

            async def text() -> str:
                return "".join([event.delta.text async for event in stub.Generate(request)])

            assert await text() == "def", "nobody has said who began"
            request.resume.backend = "echo"
            assert await text() == "def"
            request.resume.backend = "another"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await text()
            assert isinstance(error_from_rpc(caught.value), errors.ModelDiffers)
            request.sampling.temperature = 0
            assert await text() == "def", "nothing is drawn"

    async def test_the_error_says_that_only_another_revision_is_left(self, start_worker: StartWorker) -> None:
        async with (
            running_controller(lease=QUICK, failover=FailoverConfig(wait_s=2.5)) as controller,
            AsyncClient(controller.address, failover=FailoverConfig(max_resumes=0)) as client,
            shaped_worker(controllers=(controller.address,), options=SLOW, fingerprint="v1") as first,
        ):
            await eventually(lambda: len(controller.registry) == 1)
            stream = asyncio.create_task(said(client.generate(TEXT, stream_interval=1)))
            await eventually(lambda: first._generation.output_tokens > 10)
            async with shaped_worker(controllers=(controller.address,), fingerprint="v2"):
                await eventually(lambda: len(controller.registry) == 2)
                first_gone = asyncio.create_task(vanish(first))
                with pytest.raises(errors.NoLiveWorker, match="another revision"):
                    await stream
                await first_gone

    async def test_a_resumed_request_goes_to_the_revision_that_it_names(
        self, controller: ControllerApp, shaped: Any
    ) -> None:
        newer, same = await shaped(fingerprint="v2"), await shaped(fingerprint="v1")
        request = pb.GenerateRequest(prompt="abcdef")
        request.resume.model_fingerprint = "v1"
        request.resume.choices.add(index=0, output_token_ids=list(b"abc"), text_length=3)
        async with open_channel(controller.address) as channel:
            for _ in range(5):
                text = "".join([e.delta.text async for e in GenerationServiceStub(channel).Generate(request)])
                assert text == "def"
        assert not newer.seen
        assert len(same.seen) == 5

    async def test_a_stream_with_an_adapter_goes_on_where_that_is_loaded(
        self, client: AsyncClient, shaped: Any
    ) -> None:
        first = await shaped(adapters=("red",))
        stream = client.generate(TEXT, model="echo", lora_adapter="red", stream_interval=1)
        text, [plain, last] = await self.broken(first, stream, shaped(), shaped(adapters=("red",)))
        assert text == TEXT
        assert not plain.seen
        assert last.seen[0].lora_adapter == "red"


class TestPassThrough:
    """Deadline, trace and request id reach the worker, whatever the method."""

    @pytest.fixture
    async def contexts(
        self, controller: ControllerApp, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
    ) -> list[tuple[dict[str, Any], float | None]]:
        """Metadata and time left of each call that the worker gets."""
        seen: list[tuple[dict[str, Any], float | None]] = []
        for name in ("Generate", "Embed", "CountTokens", "GetModelInfo", "Tokenize", "Detokenize"):
            monkeypatch.setattr(GenerationServicer, name, _spied(getattr(GenerationServicer, name), seen))
        await start_worker(controllers=(controller.address,), context_length=4096)
        await eventually(lambda: len(controller.registry) == 1)
        return seen

    @pytest.mark.parametrize(
        ("method", "body"),
        [
            ("ChatCompletions", {"messages": [{"role": "user", "content": "hi"}]}),
            ("ChatCompletions", {"messages": [{"role": "user", "content": "hi"}], "stream": True}),
            ("Completions", {"prompt": ["a", "b"]}),
            ("Embeddings", {"input": "a"}),
            ("Tokenize", {"prompt": "a"}),
            ("Detokenize", {"tokens": [97]}),
        ],
    )
    async def test_of_openai_calls(
        self, controller: ControllerApp, contexts: Any, method: str, body: dict[str, Any]
    ) -> None:
        data = json.dumps({"model": "echo", **body}).encode()
        metadata = (("traceparent", TRACE), ("x-request-id", "r-1"))
        async with open_channel(controller.address) as channel:
            multicallable = getattr(OpenAIServiceStub(channel), method)
            answer = multicallable(HttpBody(data=data), metadata=metadata, timeout=30)
            if hasattr(answer, "read"):
                assert [chunk async for chunk in answer]
            else:
                await answer
        assert len(contexts) == (2 if isinstance(body.get("prompt"), list) else 1)
        for seen, left_s in contexts:
            assert seen["traceparent"] == TRACE
            assert seen["x-request-id"] == "r-1"
            assert 20 < left_s < 31

    async def test_of_typed_calls(self, controller: ControllerApp, contexts: Any) -> None:
        metadata = (("traceparent", TRACE), ("x-request-id", "r-1"))
        async with open_channel(controller.address) as channel:
            stub = GenerationServiceStub(channel)
            async for _ in stub.Generate(pb.GenerateRequest(prompt="a"), metadata=metadata, timeout=30):
                pass
            for call, request in (
                (stub.Embed, pb.EmbedRequest(inputs=[pb.EmbedInput(text="a")])),
                (stub.CountTokens, pb.CountTokensRequest(prompt="a")),
                (stub.Tokenize, pb.TokenizeRequest(prompt="a")),
                (stub.Detokenize, pb.DetokenizeRequest(token_ids=[97])),
                (stub.GetModelInfo, pb.GetModelInfoRequest()),
            ):
                await call(request, metadata=metadata, timeout=30)
        assert len(contexts) == 6
        for seen, left_s in contexts:
            assert (seen["traceparent"], seen["x-request-id"]) == (TRACE, "r-1")
            assert 20 < left_s < 31


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def _spied(method: Any, seen: list[tuple[dict[str, Any], float | None]]) -> Any:
    def spied(self: Any, request: Any, context: Any) -> Any:
        seen.append((dict(context.invocation_metadata() or ()), context.time_remaining()))
        return method(self, request, context)

    return spied
