"""Engines without seeds behind a controller: a caller gets what the worker alone would give."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fastchat_grpc import errors
from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import BackendConfig, FailoverConfig, ListenConfig, ModelConfig, WorkerConfig
from fastchat_grpc.controller.app import ControllerApp
from fastchat_grpc.core import Delta
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import eventually
from tests.integration.controllers import in_use, running_controller, vanish
from tests.unit.backends import sglang_stand_in
from tests.unit.backends.folders import write_model_folder
from tests.unit.backends.lightllm_stand_in import lightllm_server

pytest.importorskip("httpx2")

TEXT = "slow and steady wins it"  # the stand-ins take their time over what says so


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return write_model_folder(tmp_path_factory.mktemp("models") / "bytes")


@asynccontextmanager
async def engine_worker(
    controller: ControllerApp, backend: str, folder: Path, options: dict[str, str], **settings: Any
) -> AsyncIterator[WorkerApp]:
    """A worker over an engine's stand-in."""
    model = ModelConfig(path=str(folder), names=("tested",), **settings)
    config = WorkerConfig(
        backend=BackendConfig(name=backend, model=model, options=options, stream_interval=1),
        listen=ListenConfig(port=0),
        controller_addresses=(controller.address,),
        drain_timeout_s=0.0,
    )
    app = WorkerApp(config)
    try:
        await app.start()
        yield app
    finally:
        await app.stop()


Start = Callable[[], Any]


@pytest.fixture(params=["lightllm", "sglang"])
async def start(
    request: pytest.FixtureRequest,
    controller: ControllerApp,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Start]:
    """Starts workers of one backend, registered."""
    async with AsyncExitStack() as stack:
        options: dict[str, str] = {}
        if request.param == "lightllm":
            options["url"] = (await stack.enter_async_context(lightllm_server())).url
        else:
            sglang_stand_in.install(monkeypatch)
        count = 0

        async def start() -> WorkerApp:
            nonlocal count
            count += 1
            worker = engine_worker(controller, request.param, model_folder, options)
            app = await stack.enter_async_context(worker)
            await eventually(lambda: len(controller.registry) == count)
            return app

        yield start


@pytest.fixture
async def controller() -> AsyncIterator[ControllerApp]:
    async with running_controller() as controller:
        yield controller


@pytest.fixture
async def client(controller: ControllerApp) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(controller.address, failover=FailoverConfig(max_resumes=0)) as client:
        yield client


async def test_a_request_with_the_defaults_is_answered(client: AsyncClient, start: Start) -> None:
    await start()
    assert (await client.complete("abc")).text == "abc"
    assert (await client.complete("abc", temperature=0.7, top_p=0.9, n=2)).choices[1].text == "abc"


async def test_a_seed_of_the_caller_is_refused_as_the_worker_refuses_it(client: AsyncClient, start: Start) -> None:
    await start()
    with pytest.raises(errors.UnsupportedField, match=r"sampling\.seed"):
        await client.complete("abc", seed=1)


async def test_a_sampled_stream_goes_on_when_its_worker_dies(
    controller: ControllerApp, client: AsyncClient, start: Start
) -> None:
    workers = {worker.address: worker for worker in [await start(), await start()]}
    text = ""
    async for event in client.generate(TEXT, max_new_tokens=64):
        text += event.text if isinstance(event, Delta) else ""
        if len(text) >= 5 and len(workers) == 2:
            await vanish(workers.pop(await in_use(controller)))
    # A stand-in says what it is given, and is given the prompt with what the caller has.
    assert any(text == known + TEXT + known for known in (TEXT[:i] for i in range(5, len(TEXT))))
    assert controller.relay.failover.resumed == 1


async def test_a_stream_with_penalties_says_why_it_cannot_go_on(
    controller: ControllerApp, client: AsyncClient, start: Start
) -> None:
    workers = {worker.address: worker for worker in [await start(), await start()]}
    with pytest.raises(errors.NotResumable, match="stateful_resume"):
        async for _ in client.generate(TEXT, max_new_tokens=64, presence_penalty=0.5):
            if len(workers) == 2:
                await vanish(workers.pop(await asyncio.wait_for(in_use(controller), 5)))
