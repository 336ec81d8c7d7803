"""The gateway's module, before workers whose answers are numbers: what a caller sees when they fail."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from fastchat_grpc.config import BreakerConfig, DispatchMethod, FailoverConfig
from fastchat_grpc.controller.fleet import WorkerSpec
from fastchat_grpc.core import Capability, Load, ModelInfo
from fastchat_grpc.gateway import app, resume_module
from fastchat_grpc.native.library import compile_library, find_compiler
from tests.conftest import eventually
from tests.e2e.gateway_site import Site, running_gateway, running_site, sse
from tests.e2e.resume_mock import MockWorker

pytest.importorskip("envoy.service.auth.v3", reason="needs the extra gateway")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(find_compiler() is None, reason="no C compiler"),
]

WAIT_S = 1.5
ABLE = frozenset({Capability.GENERATE, Capability.CHAT, Capability.RESUME})


class Mocks:
    """A site whose workers are mocks: "a" is picked before "b"."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.workers: dict[str, MockWorker] = {}

    def register(self, worker_id: str, address: str, weight: float = 1.0, model: str = "mock") -> None:
        spec = WorkerSpec(
            worker_id=worker_id,
            instance_id=f"{worker_id}-{address}",
            address=address,
            models=(ModelInfo(name=model, context_length=1000, capabilities=ABLE),),
            weight=weight,
            check_heartbeat=False,
        )
        for controller in self.site.controllers:
            controller.registry.register(spec, Load(max_running=1000))

    async def known(self, *addresses: str) -> None:
        """Wait until the gateway knows the places, of each controller."""
        for controller in self.site.controllers:
            gateways = controller.bridge.endpoints._gateways
            await eventually(
                lambda gateways=gateways: (
                    bool(gateways) and all(set(addresses) <= set(each.acked or ()) for each in gateways.values())
                )
            )

    async def add(self, worker_id: str, **more: Any) -> MockWorker:
        worker = MockWorker(worker_id)
        await worker.server.start()
        self.workers[worker_id] = worker
        self.register(worker_id, worker.address, **more)
        await self.known(worker.address)
        return worker

    def heal(self) -> None:
        """Nobody is suspect any more."""
        for controller in self.site.controllers:
            for worker in controller.registry.workers():
                controller.registry.heartbeat(worker.lease_id, worker.load)
        for worker in self.workers.values():
            worker.began.clear()
            worker.asked.clear()

    def leftovers(self) -> tuple[int, int]:
        """Tickets and reservations."""
        controllers = self.site.controllers
        return (
            sum(len(controller.bridge.tickets) for controller in controllers),
            sum(worker.reserved_count for controller in controllers for worker in controller.registry.workers()),
        )

    async def counted(self, name: str) -> int:
        """What Envoy has counted of the module's streams."""
        stats = await self.site.gateway._envoy._admin._ask("GET", f"/stats?filter=streams_{name}$&format=json")
        return sum(stat["value"] for stat in json.loads(stats)["stats"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mocks() -> AsyncIterator[Mocks]:
    settings = {
        "failover": FailoverConfig(wait_s=WAIT_S),
        "breaker": BreakerConfig(min_failures=100_000),
        "dispatch": DispatchMethod.LOTTERY,  # by weight, so that it is known who comes first
    }
    async with running_site(workers=(), controllers=2, controller=settings) as site:
        assert site.gateway.resumes
        found = Mocks(site)
        await found.add("a", weight=1e6)
        await found.add("b")
        try:
            yield found
        finally:
            for worker in found.workers.values():
                await worker.server.stop(None)


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def healed(mocks: Mocks) -> AsyncIterator[None]:
    mocks.heal()
    yield
    await eventually(lambda: mocks.leftovers() == (0, 0))
    await eventually(lambda: not any(worker.running for worker in mocks.workers.values()))


async def ask(mocks: Mocks, model: str = "mock", **spec: Any) -> list[Any]:
    """The events of a stream."""
    body = {"model": model, "messages": [], "stream": True, **spec}
    async with mocks.site.http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            return [response.status_code, json.loads(await response.aread())]
        assert "x-fastchat-worker" not in response.headers
        assert "grpc-accept-encoding" not in response.headers
        return [event async for event in sse(response)]


def numbers(events: list[Any]) -> list[int]:
    return [event["i"] for event in events if "i" in event]


def whole(events: list[Any], n: int = 20) -> bool:
    return numbers(events) == list(range(n)) and events[-1] == "[DONE]" and len(events) == n + 1


def by(events: list[Any]) -> list[str]:
    return list(dict.fromkeys(event["by"] for event in events if "by" in event))


async def test_an_undisturbed_stream_is_passed_on_without_the_state(mocks: Mocks) -> None:
    assert whole(await ask(mocks))
    (asked,) = mocks.workers["a"].asked
    assert asked["x-fastchat-place"] == mocks.workers["a"].address
    assert asked["x-fastchat-resume"] == "1"
    assert "grpc-accept-encoding" not in asked or asked["grpc-accept-encoding"] == "identity"


@pytest.mark.parametrize("code", ["UNAVAILABLE", "CANCELLED"])
@pytest.mark.parametrize("number", [-1, 0, 1, 19])
async def test_a_stream_that_ends_early_goes_on_elsewhere(mocks: Mocks, code: str, number: int) -> None:
    events = await ask(mocks, at={"a": {"number": number, "do": code}})
    assert whole(events)
    # What had not arrived when the first one ended is said again.
    assert mocks.workers["b"].began == [sum(event.get("by") == "a" for event in events[:-1])]
    if code == "UNAVAILABLE":
        assert mocks.workers["b"].began == [max(0, number)]
        assert by(events) == (["a", "b"] if number > 0 else ["b"])


async def test_an_answer_in_one_piece_goes_on_too(mocks: Mocks) -> None:
    body = {"model": "mock", "messages": [], "whole": True, "at": {"a": {"number": 7, "do": "UNAVAILABLE"}}}
    reply = await mocks.site.http.post("/v1/chat/completions", json=body)
    assert reply.json() == {"numbers": list(range(20)), "by": "b"}
    assert mocks.workers["b"].began == [7]


@pytest.mark.parametrize("state", [0, -1], ids=["a piece without a value", "no piece"])
async def test_a_stream_without_state_ends_with_an_event_that_says_so(mocks: Mocks, state: int) -> None:
    events = await ask(mocks, state=state, at={"a": {"number": 5, "do": "UNAVAILABLE"}})
    assert numbers(events) == [0, 1, 2, 3, 4]
    assert events[5]["error"]["type"] == "server_error"
    assert not mocks.workers["b"].began


async def test_before_the_first_event_no_state_is_needed(mocks: Mocks) -> None:
    assert whole(await ask(mocks, state=-1, at={"a": {"number": 0, "do": "UNAVAILABLE"}}))


async def test_state_beyond_the_bound_is_not_kept(mocks: Mocks) -> None:
    events = await ask(mocks, n=9, state=1_000_000, at={"a": {"number": 7, "do": "UNAVAILABLE"}})
    assert numbers(events) == list(range(7))
    assert "error" in events[7]
    assert whole(await ask(mocks, n=9, state=1_000_000, at={"a": {"number": 3, "do": "UNAVAILABLE"}}), 9)


@pytest.mark.parametrize(
    ("code", "status"), [("INVALID_ARGUMENT", 400), ("RESOURCE_EXHAUSTED", 429), ("INTERNAL", 500)]
)
async def test_what_no_other_worker_would_mend_is_the_answer(mocks: Mocks, code: str, status: int) -> None:
    found, body = await ask(mocks, at={each: {"number": -1, "do": code} for each in "ab"})
    assert found == status
    assert set(body["error"]) == {"message", "type", "param", "code"}


async def test_all_workers_that_may_be_tried_are(mocks: Mocks) -> None:
    found, body = await ask(mocks, at={each: {"number": -1, "do": "UNAVAILABLE"} for each in "ab"})
    assert found == 503
    assert body["error"]["code"] == "no_live_worker"
    assert [len(worker.began) for worker in mocks.workers.values()] == [1, 1]


async def test_garbage_is_passed_on_and_ends_the_state(mocks: Mocks) -> None:
    body = {"model": "mock", "messages": [], "stream": True, "at": {"a": {"number": 3, "do": "garbage"}}}
    async with mocks.site.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200  # the transcoder ends it, as it would without the module
        with suppress(httpx2.HTTPError):
            async for _ in sse(response):
                pass
    assert whole(await ask(mocks))


async def test_a_compressed_frame_is_no_end_of_the_gateway(mocks: Mocks) -> None:
    await ask(mocks, pad=2000, at={"a": {"number": 3, "do": "compress"}})
    assert whole(await ask(mocks))


async def test_a_caller_who_leaves_ends_the_stream_at_its_worker(mocks: Mocks) -> None:
    body = {"model": "mock", "messages": [], "stream": True, "n": 10_000}
    async with mocks.site.http.stream("POST", "/v1/chat/completions", json=body) as response:
        await anext(response.aiter_lines())
        assert mocks.workers["a"].running == 1
    await eventually(lambda: mocks.workers["a"].running == 0)
    assert not mocks.site.controller.registry.worker("a").health.suspect


async def test_callers_cannot_speak_to_the_module(mocks: Mocks) -> None:
    headers = {"x-fastchat-place": "127.0.0.1:1", "x-fastchat-resume": "0", "x-fastchat-cluster": "api"}
    body = {"model": "mock", "messages": [], "stream": True, "n": 3}
    async with mocks.site.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        assert whole([event async for event in sse(response)], 3)
    assert mocks.workers["a"].asked[0]["x-fastchat-place"] == mocks.workers["a"].address


async def test_controllers_hear_who_failed_and_who_has_the_stream(mocks: Mocks) -> None:
    registries = [controller.registry for controller in mocks.site.controllers]
    task = asyncio.create_task(ask(mocks, n=60, ms=10, at={"a": {"number": 5, "do": "UNAVAILABLE"}}))
    await eventually(lambda: any(registry.worker("a").health.suspect for registry in registries))
    await eventually(lambda: sum(registry.worker("b").reserved_count for registry in registries) == 1)
    assert sum(registry.worker("a").reserved_count for registry in registries) == 0
    assert whole(await task, 60)


async def test_a_stream_waits_for_a_worker_to_come(mocks: Mocks) -> None:
    await mocks.add("alone", model="one")
    task = asyncio.create_task(ask(mocks, "one", at={"alone": {"number": 5, "do": "UNAVAILABLE"}}))
    registries = [controller.registry for controller in mocks.site.controllers]
    await eventually(lambda: any(registry.worker("alone").health.suspect for registry in registries))
    assert not task.done()
    await mocks.add("helper", model="one")
    assert whole(await task)


async def test_a_stream_that_nobody_comes_for_says_what_broke(mocks: Mocks) -> None:
    await mocks.add("lonely", model="two")
    events = await ask(mocks, "two", at={"lonely": {"number": 5, "do": "UNAVAILABLE"}})
    assert numbers(events) == [0, 1, 2, 3, 4]
    assert "the stream broke" in events[5]["error"]["message"]
    assert events[6] == "[DONE]"


async def mock_process(stack: AsyncExitStack, worker_id: str) -> tuple[asyncio.subprocess.Process, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.e2e.resume_mock", worker_id, stdout=asyncio.subprocess.PIPE
    )

    async def end() -> None:
        if process.returncode is None:
            process.kill()
        await process.wait()

    stack.push_async_callback(end)
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), 30)
    return process, line.decode().strip()


async def test_streams_of_a_killed_worker_go_on(mocks: Mocks) -> None:
    """A hundred at once; the longest silence is that of the controller's answer and the next worker's first number."""
    async with AsyncExitStack() as stack:
        process, address = await mock_process(stack, "killed")
        mocks.register("killed", address, model="three", weight=1e6)
        await mocks.add("heir", model="three")
        await mocks.known(address)
        silences: list[float] = []
        begun = asyncio.Semaphore(0)

        async def one() -> list[Any]:
            body = {"model": "three", "messages": [], "stream": True, "n": 100, "ms": 30}
            events, last, longest = [], 0.0, 0.0
            async with mocks.site.http.stream("POST", "/v1/chat/completions", json=body) as response:
                async for found in sse(response):
                    now = monotonic()
                    longest = max(longest, now - last) if events else 0.0
                    last = now
                    events.append(found)
                    if len(events) == 3:
                        begun.release()
            silences.append(longest)
            return events

        tasks = [asyncio.create_task(one()) for _ in range(100)]
        for _ in tasks:
            await begun.acquire()
        process.kill()
        results = await asyncio.gather(*tasks)
        assert all(whole(events, 100) for events in results)
        assert sum(by(events) == ["killed", "heir"] for events in results) > 50
        print(f"longest silence {max(silences):.3f} s")
        for controller in mocks.site.controllers:
            await eventually(lambda registry=controller.registry: registry.worker("killed").reserved_count == 0)


async def test_streams_of_a_frozen_worker_go_on_within_the_lease(mocks: Mocks) -> None:
    async with AsyncExitStack() as stack:
        _, address = await mock_process(stack, "frozen")
        mocks.register("frozen", address, model="four", weight=1e6)
        await mocks.add("thawed", model="four")
        await mocks.known(address)
        began = monotonic()
        events = await ask(mocks, "four", at={"frozen": {"number": 5, "do": "freeze"}})
        assert whole(events)
        assert by(events) == ["frozen", "thawed"]
        assert monotonic() - began < 12  # 6 s, and what a busy machine adds


async def test_a_dead_place_costs_nothing_but_a_look(mocks: Mocks) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        mocks.register("dead", address, model="five", weight=1e6)
        await mocks.add("living", model="five")
        await mocks.known(address)
        assert whole(await ask(mocks, "five"))


async def test_a_slow_caller_is_parked_and_gets_everything(mocks: Mocks) -> None:
    parked = await mocks.counted("parked")
    host, _, port = mocks.site.gateway.address.rpartition(":")
    caller = socket.socket()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    caller.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(caller, (host, int(port)))
    n = 600
    body = json.dumps({"model": "mock", "messages": [], "stream": True, "n": n, "ms": 0, "pad": 20_000}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    await loop.sock_sendall(caller, head.encode() + body)
    try:
        await eventually(lambda: mocks.workers["a"].running == 1)
        # Without the caller the worker would say all of it; it is left instead.
        await eventually(lambda: mocks.workers["a"].running == 0, timeout_s=20)
        await eventually(lambda: mocks.leftovers() == (1, 0))  # its ticket, and no reservation
        text = b""
        while chunk := await asyncio.wait_for(loop.sock_recv(caller, 1 << 20), 30):
            text += chunk
    finally:
        caller.close()
    found = [json.loads(line[6:])["i"] for line in text.split(b"\n") if line.startswith(b"data: {")]
    assert found == list(range(n))
    assert text.rstrip().endswith(b"data: [DONE]")
    assert len(mocks.workers["a"].began + mocks.workers["b"].began) > 1
    assert await mocks.counted("parked") > parked


@pytest.mark.parametrize("content", [b"no library", None], ids=["no library", "a library without the hooks"])
async def test_a_module_that_envoy_cannot_load_is_left_out(
    mocks: Mocks, content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "module.so"
    if content is None:
        (tmp_path / "other.c").write_text("int other(void) { return 1; }")
        compile_library(find_compiler(), path, ("-shared", "-fPIC"), tmp_path)
    else:
        path.write_bytes(content)

    async def found(config: Any, executable: Path) -> Path:
        return path

    monkeypatch.setattr(app, "resume_module", found)
    async with running_gateway(mocks.site) as gateway:
        assert not gateway.resumes
        await mocks.known(mocks.workers["a"].address)
        async with mocks.site.http.stream(
            "POST", f"http://{gateway.address}/v1/chat/completions", json={"model": "mock", "stream": True}
        ) as response:
            assert whole([event async for event in sse(response)])
        await eventually(lambda: mocks.leftovers() == (0, 0))


async def test_without_a_controller_the_places_that_were_picked_are_tried(
    mocks: Mocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own gateway, one of whose controllers does not answer the question, and the other fails at it."""
    monkeypatch.setattr(resume_module, "ASK_MS", 300)
    async with running_gateway(mocks.site) as gateway:
        before, mocks.site.gateway = mocks.site.gateway, gateway
        await mocks.known(*(worker.address for worker in list(mocks.workers.values())[:2]))
        going_on = [controller.bridge.going_on for controller in mocks.site.controllers]
        asked = []

        async def fails(question: Any) -> Any:
            asked.append(question)
            raise RuntimeError("a fault of the controller")

        async def hangs(question: Any) -> Any:
            asked.append(question)
            await asyncio.Event().wait()

        try:
            going_on[0].answer, going_on[1].answer = hangs, fails
            body = {"model": "mock", "messages": [], "stream": True, "at": {"a": {"number": 5, "do": "UNAVAILABLE"}}}
            async with mocks.site.http.stream(
                "POST", f"http://{gateway.address}/v1/chat/completions", json=body
            ) as response:
                assert whole([event async for event in sse(response)])
            assert len(asked) == 2  # each controller, once
            body["at"] = {each: {"number": 5 + 5 * i, "do": "UNAVAILABLE"} for i, each in enumerate("ab")}
            async with mocks.site.http.stream(
                "POST", f"http://{gateway.address}/v1/chat/completions", json=body
            ) as response:
                events = [event async for event in sse(response)]
            assert numbers(events) == list(range(10))
            assert "no controller" in events[10]["error"]["message"]
            assert events[11] == "[DONE]"
            await eventually(lambda: mocks.leftovers() == (0, 0))  # by the log of the gateway that ends now
        finally:
            for each in going_on:
                del each.answer
            mocks.site.gateway = before
