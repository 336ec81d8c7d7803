"""The gateway in direct mode when workers and controllers fail."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from time import perf_counter

import pytest

from fastchat_grpc.config import DispatchMethod
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import echo_config, eventually
from tests.e2e.echo_worker import worker_process
from tests.e2e.gateway_site import Site, content, running_controller, running_gateway, running_site
from tests.e2e.processes import free_port, running_cli, wait_for_workers

pytestmark = pytest.mark.slow
FAVOURED = {"weight": 1e6}
"""With lottery dispatch, practically always picked first."""


async def _picked_first(site: Site, address: str) -> None:
    """Wait until the gateway knows the worker at an address."""
    bridge = site.controller.bridge
    assert bridge is not None
    await eventually(lambda: any(worker.spec.address == address for worker in site.controller.registry.workers()))
    gateways = bridge.endpoints._gateways
    await eventually(lambda: any(address in (gateway.acked or ()) for gateway in gateways.values()))


async def test_a_worker_killed_before_its_first_token_is_replaced_by_another() -> None:
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(running_site(controller={"dispatch": DispatchMethod.LOTTERY}))
        slow = await stack.enter_async_context(
            worker_process(site.controller.address, first_delay_ms=30_000, **FAVOURED)
        )
        await _picked_first(site, slow.address)
        asked = asyncio.create_task(site.chat("hello"))
        await eventually(lambda: any(worker.reserved_count for worker in site.controller.registry.at(slow.address)))
        await asyncio.sleep(0.1)  # the request is on its way to a worker that stays silent
        assert not asked.done()
        killed_at = perf_counter()
        slow.kill()
        reply = await asked
        assert reply.json()["choices"][0]["message"]["content"] == "hello"
        assert perf_counter() - killed_at < 1.0
        # What is known to be dead gets nothing more, though its lease may last.
        await eventually(lambda: all(worker.health.suspect for worker in site.controller.registry.at(slow.address)))
        for _ in range(5):
            assert (await site.chat("hello")).status_code == 200


async def test_a_full_worker_passes_the_request_on() -> None:
    full = {"max_running": 1, "max_waiting": 0, "options": {"delay_ms": "10"}, **FAVOURED}
    async with running_site(workers=[full, {}], controller={"dispatch": DispatchMethod.LOTTERY}) as site:
        busy = site.stream("x" * 300)
        await anext(busy)
        assert site.workers[0]._generation.admission.running == 1
        for _ in range(3):
            assert (await site.chat("hello")).json()["choices"][0]["message"]["content"] == "hello"
        await busy.aclose()


async def test_a_full_fleet_answers_429_with_a_hint() -> None:
    full = {"max_running": 1, "max_waiting": 0, "options": {"delay_ms": "10"}}
    async with running_site(workers=[full, full]) as site:
        streams = [site.stream("x" * 300), site.stream("x" * 300)]
        for stream in streams:
            await anext(stream)
        reply = await site.chat("hello")
        assert reply.status_code == 429
        assert reply.json()["error"]["type"] == "rate_limit_error"
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        for stream in streams:
            await stream.aclose()


async def test_relay_mode_resumes_a_stream_whose_worker_is_killed() -> None:
    text = "0123456789" * 20
    async with AsyncExitStack() as stack:
        dispatch = {"dispatch": DispatchMethod.LOTTERY}
        site = await stack.enter_async_context(
            running_site("relay", [{"options": {"delay_ms": "5"}}], controller=dispatch)
        )
        first = await stack.enter_async_context(worker_process(site.controller.address, delay_ms=5, **FAVOURED))
        await eventually(lambda: len(site.controller.registry) == 2)
        events = []
        async for event in site.stream(text):
            events.append(event)
            if len(events) == 10:
                first.kill()
        assert content(events) == text
        assert not [event for event in events if isinstance(event, dict) and "error" in event]


async def test_a_dead_controller_gives_503_and_leaves_running_streams_alone() -> None:
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(running_site(workers=[{"options": {"delay_ms": "20"}}]))
        stream = site.stream("x" * 150)
        events = [await anext(stream)]
        await site.controller.stop()
        reply = await site.chat()
        assert reply.status_code == 503
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert reply.json()["error"]["type"] == "server_error"
        events += [event async for event in stream]
        assert content(events) == "x" * 150
        await eventually_status(site, 503)


async def eventually_status(site: Site, status: int, timeout_s: float = 10.0) -> None:
    """Wait until /health answers with a status."""
    async with asyncio.timeout(timeout_s):
        while (await site.http.get("/health")).status_code != status:
            await asyncio.sleep(0.05)


async def test_a_restarted_controller_serves_again_without_an_empty_moment() -> None:
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(running_site(workers=[{}, {}]))
        port = site.controller.port
        await site.controller.stop()
        again = await stack.enter_async_context(running_controller(port))
        await eventually(lambda: len(again.registry) == 2, timeout_s=20)
        await eventually_status(site, 200)
        statuses = [(await site.chat()).status_code for _ in range(10)]
        assert statuses == [200] * 10
        assert again.bridge is not None
        await eventually(lambda: bool(again.bridge.endpoints._gateways), timeout_s=20)
        assert (await site.chat()).status_code == 200


async def test_a_worker_restarted_at_another_port_is_found() -> None:
    async with running_site() as site:
        await site.workers[0].stop()
        await site.add_worker()
        assert (await site.chat()).status_code == 200


async def test_killing_one_of_two_controllers_leaves_service_whole() -> None:
    async with running_site(workers=[{}, {}], controllers=2) as site:
        for _ in range(6):
            assert (await site.chat()).status_code == 200
        bridges = [controller.bridge for controller in site.controllers]
        await eventually(lambda: all(not len(bridge.tickets) for bridge in bridges if bridge is not None))
        await site.controllers.pop(0).stop()
        for _ in range(30):
            assert (await site.chat()).status_code == 200
            await asyncio.sleep(0.05)
        await site.add_worker("new")
        body = {"model": "new", "prompt": "abc", "max_tokens": 3}
        assert (await site.http.post("/v1/completions", json=body)).status_code == 200


async def test_a_relayed_request_whose_controller_is_killed_before_it_answers_goes_to_another() -> None:
    port = free_port()
    victim = f"127.0.0.1:{port}"
    async with AsyncExitStack() as stack:
        process = await stack.enter_async_context(running_cli("controller", "--port", str(port)))
        site = await stack.enter_async_context(running_site("relay", workers=[]))
        addresses = (site.controller.address, victim)
        worker = WorkerApp(echo_config("slow", controllers=addresses, options={"first_delay_ms": "3000"}))
        await worker.start()
        stack.push_async_callback(worker.stop)
        for address in addresses:
            await wait_for_workers(address)
        gateway = await stack.enter_async_context(running_gateway(site, "relay", controller_addresses=addresses))
        body = {"model": "slow", "messages": [{"role": "user", "content": "hello"}]}
        url = f"http://{gateway.address}/v1/chat/completions"
        asked = [asyncio.create_task(site.http.post(url, json={**body, "stream": i % 4 > 1})) for i in range(8)]
        await eventually(lambda: worker._generation.admission.running == len(asked))
        process.kill()
        replies = await asyncio.gather(*asked)
        assert [reply.status_code for reply in replies] == [200] * len(asked)


async def test_a_request_of_a_model_that_no_gateway_host_serves_never_reaches_another_models_worker() -> None:
    async with running_site(workers=[{"model": "a"}, {"model": "b"}]) as site:
        for model in ("a", "b") * 5:
            reply = await site.http.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1})
            assert json.loads(reply.text)["model"] == model
