"""A worker's life: stopped while it loads, drained and opened again, well and unwell."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import aclosing
from time import monotonic
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fastchat_grpc import errors
from fastchat_grpc.backends import registry
from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import FailoverConfig
from fastchat_grpc.core import ModelInfo, WorkerState
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.rpc.supervise import Backoff
from fastchat_grpc.worker import app as worker_app
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import StartWorker, echo_config, eventually
from tests.integration.controllers import running_controller

ONCE = FailoverConfig(max_attempts=1, max_resumes=0, wait_s=0)


class _Loading:
    """A backend that loads in a thread, which nothing can interrupt, until `release` is set."""

    def __init__(self) -> None:
        self.loading = threading.Event()
        self.release = threading.Event()
        self.closed = False

    async def start(self) -> Sequence[ModelInfo]:
        def load() -> None:
            self.loading.set()
            self.release.wait(60)

        await asyncio.to_thread(load)
        raise AssertionError("it was to be stopped")

    async def close(self) -> None:
        self.closed = True


async def test_a_client_waits_for_a_worker_that_loads_its_model() -> None:
    app = WorkerApp(echo_config())
    load, loaded = app._backend.start, asyncio.Event()

    async def start() -> Any:
        await loaded.wait()
        return await load()

    app._backend.start = start  # type: ignore[method-assign]
    starting = asyncio.create_task(app.start())
    try:
        await eventually(lambda: app._server is not None)
        async with AsyncClient(app.address, failover=FailoverConfig(max_attempts=1)) as client:
            asked = asyncio.create_task(client.count_tokens("four"))
            await asyncio.sleep(0.5)  # it is refused some times
            assert not asked.done()
            loaded.set()
            assert await asyncio.wait_for(asked, 10) == 4
    finally:
        loaded.set()
        await starting
        await app.stop()


async def test_a_signal_to_stop_is_heard_while_the_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = _Loading()
    monkeypatch.setattr(registry, "create", lambda config: backend)
    stop = asyncio.Event()
    running = asyncio.create_task(worker_app.run(echo_config(), stop))
    try:
        await asyncio.to_thread(backend.loading.wait, 10)
        stop.set()
        await asyncio.wait_for(running, 10)
        assert backend.closed
    finally:
        backend.release.set()


def test_a_process_ends_although_a_thread_of_it_does_not() -> None:
    code = """
import asyncio, threading, time
from fastchat_grpc.cli.process import run_until_signalled

async def run(stop):
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 100)
    threading.Thread(target=time.sleep, args=(100,)).start()
    print("up", flush=True)
    await stop.wait()

run_until_signalled(run, "info")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.terminate()
        stopped_at = monotonic()
        assert process.wait(60) == 0
        assert monotonic() - stopped_at < 30
    finally:
        process.kill()
        process.communicate()


async def _serving(worker: WorkerApp) -> bool:
    async with open_channel(worker.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_a_worker_whose_order_to_drain_is_withdrawn_opens_again(start_worker: StartWorker) -> None:
    worker = await start_worker(options={"delay_ms": "20"}, drain_timeout_s=30)
    serving = asyncio.create_task(worker.serve())
    async with AsyncClient(worker.address, failover=ONCE) as client:
        running = asyncio.create_task(client.complete("x" * 40))
        await eventually(lambda: worker._generation.admission.running == 1)
        worker._drain_ordered(None)
        await eventually(lambda: worker._monitor.load().state is WorkerState.DRAINING)
        assert not await _serving(worker)
        with pytest.raises(errors.FastChatError, match="shutting down"):
            await client.complete("new")
        worker._undrain_ordered()
        await eventually(lambda: worker._monitor.load().state is WorkerState.SERVING)
        assert await _serving(worker)
        assert (await client.complete("new")).text == "new"
        assert (await running).text == "x" * 40
        assert not serving.done()
        worker._drain_ordered(None)
        await asyncio.wait_for(serving, 10)  # nothing runs, so the second order is carried out


async def test_a_controller_takes_its_order_to_drain_back(start_worker: StartWorker) -> None:
    async with running_controller() as controller, AsyncClient(controller.address) as client:
        worker = await start_worker(
            "m", controllers=(controller.address,), options={"delay_ms": "20"}, drain_timeout_s=30
        )
        serving = asyncio.create_task(worker.serve())
        await eventually(lambda: worker.registered)
        running = asyncio.create_task(client.complete("x" * 80, model="m"))
        await eventually(lambda: worker._generation.admission.running == 1)
        assert await client.drain_worker(worker.worker_id) == 1
        await eventually(lambda: worker._monitor.load().state is WorkerState.DRAINING)
        await client.undrain_worker(worker.worker_id)
        (seen,) = controller.registry.workers()
        await eventually(lambda: seen.load.state is WorkerState.SERVING)
        assert (await client.complete("new", model="m")).text == "new"
        assert (await running).text == "x" * 80
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


@pytest.mark.parametrize("withdrawn_first", [True, False])
async def test_a_worker_that_a_signal_stops_does_not_open_again(
    start_worker: StartWorker, withdrawn_first: bool
) -> None:
    worker = await start_worker(drain_timeout_s=30, options={"delay_ms": "20"})
    serving = asyncio.create_task(worker.serve())
    async with AsyncClient(worker.address) as client, aclosing(client.generate("x" * 1000)) as stream:
        await anext(stream)  # else it would have nothing to drain, and leave
        worker._drain_ordered(None)
        await eventually(lambda: worker._draining)
        for act in (worker._undrain_ordered, worker._stop.set)[:: 1 if withdrawn_first else -1]:
            act()
        await asyncio.wait_for(serving, 10)
        assert worker._draining
        async with AsyncClient(worker.address, failover=ONCE) as late:
            with pytest.raises(errors.Draining):
                await late.complete("x")


async def test_a_backend_that_cannot_say_its_load_for_a_while_ends_nothing(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, the worker deregistered, its monitor was dead, and health went on saying SERVING."""
    async with running_controller() as controller:
        worker = await start_worker(controllers=(controller.address,))
        await eventually(lambda: worker.registered)
        (seen,) = controller.registry.workers()
        load = worker._backend.load

        def broken() -> Any:
            raise RuntimeError("no statistics")

        monkeypatch.setattr(worker._backend, "load", broken)
        await eventually(lambda: seen.load.state is WorkerState.DEGRADED)
        before = seen.heartbeat_at
        await eventually(lambda: seen.heartbeat_at > before)
        assert controller.registry.workers() == [seen], "it is the only one and still serves"
        async with AsyncClient(worker.address) as client:
            assert (await client.complete("abc")).text == "abc"
        monkeypatch.setattr(worker._backend, "load", load)
        await eventually(lambda: seen.load.state is WorkerState.SERVING)
    assert caplog.text.count("cannot say its load") == 1
    assert "no statistics" in caplog.text


async def test_health_says_not_serving_while_a_background_task_fails(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await start_worker()
    broken = True

    async def work() -> None:
        if broken:
            raise RuntimeError
        await asyncio.Event().wait()

    worker._supervisor.spawn("work", work, restart=Backoff(first_s=0.01, most_s=0.02, steady_s=0.1))
    async with open_channel(worker.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        while (await watch.read()).status != health_pb2.HealthCheckResponse.NOT_SERVING:
            pass
        broken = False
        while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
            pass
