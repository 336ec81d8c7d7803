"""RefreshWorkers: who is removed, and who is not. Over real sockets."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from fastchat_grpc.controller import refresh
from fastchat_grpc.controller.fleet import Worker, WorkerSpec
from fastchat_grpc.controller.refresh import Refresh
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.core import Load, ModelInfo
from fastchat_grpc.rpc.pool import ChannelPool
from fastchat_grpc.v1 import generation_pb2 as pb
from fastchat_grpc.v1 import generation_pb2_grpc


class Site:
    """A registry and a pool of channels."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.registry = Registry(clock=lambda: self.now)
        self.pool = ChannelPool()
        self.refresh = Refresh(self.registry, self.pool)

    def add(self, worker_id: str, address: str, *, check_heartbeat: bool = False) -> Worker:
        spec = WorkerSpec(
            worker_id=worker_id,
            instance_id=worker_id,
            address=address,
            models=(ModelInfo(name="m", context_length=1),),
            check_heartbeat=check_heartbeat,
        )
        return self.registry.register(spec, Load())

    async def removed(self) -> list[str]:
        _, removed = await self.refresh.run()
        return [worker.spec.worker_id for worker in removed]


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    monkeypatch.setattr(refresh, "TIMEOUT_S", 0.5)
    site = Site()
    yield site
    await site.pool.close()


@pytest.fixture
async def process() -> AsyncIterator[str]:
    """Address of a server whose process calls itself "a"."""

    class Servicer(generation_pb2_grpc.GenerationServiceServicer):
        async def GetStatus(self, request: Any, context: Any) -> pb.GetStatusResponse:
            return pb.GetStatusResponse(instance_id="a")

    server = grpc.aio.server()
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
def silent() -> Any:
    """Address that accepts connections and says nothing, as a process that is stopped does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


async def test_who_refuses_connections_is_removed(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    site.add("a", f"127.0.0.1:{port}")
    assert await site.removed() == ["a"]


async def test_another_process_at_the_address_is_not_the_worker(site: Site, process: str) -> None:
    site.add("a", process)
    site.add("b", process)
    assert await site.removed() == ["b"]


async def test_who_is_slow_stays(site: Site, silent: str) -> None:
    site.add("a", silent)
    assert await site.removed() == []


async def test_whose_heartbeats_are_fresh_is_not_even_asked(site: Site) -> None:
    worker = site.add("a", "127.0.0.1:1", check_heartbeat=True)
    assert await site.removed() == []
    site.now += 4.0  # two intervals: late
    assert await site.removed() == ["a"]
    assert worker.removed is not None


async def test_who_is_said_to_be_unreachable_is_asked(site: Site) -> None:
    site.registry.set_reachable(site.add("a", "127.0.0.1:1", check_heartbeat=True), False)
    assert await site.removed() == ["a"]


async def test_a_heartbeat_that_comes_meanwhile_saves_a_worker(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = site.add("a", "127.0.0.1:1", check_heartbeat=True)
    site.now += 4.0

    async def nowhere(address: str) -> bool:
        site.now += 0.1
        site.registry.heartbeat(worker.lease_id, Load())
        return True

    monkeypatch.setattr(refresh, "_leads_nowhere", nowhere)
    assert await site.removed() == []


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EADDRNOTAVAIL])
async def test_what_is_lacking_here_is_no_evidence(
    site: Site, process: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(host: str, port: int) -> Any:
        raise OSError(number, "lacking")

    monkeypatch.setattr(asyncio, "open_connection", fails)
    for worker_id in "abc":
        site.add(worker_id, "127.0.0.1:1")
    assert not await refresh._leads_nowhere("127.0.0.1:1")
    assert await site.removed() == []


async def test_a_name_that_is_gone_leads_nowhere_and_a_resolver_that_is_away_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = socket.EAI_NONAME

    async def fails(host: str, port: int, **options: Any) -> Any:
        raise socket.gaierror(told, "resolver")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", fails)
    assert await refresh._leads_nowhere("pod-1:1")
    told = socket.EAI_AGAIN
    assert not await refresh._leads_nowhere("pod-1:1")


async def test_a_name_server_that_is_slow_is_no_evidence(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(host: str, port: int, **options: Any) -> Any:
        await asyncio.sleep(3600)

    site.add("a", "pod-1:1")
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", hangs)
    assert await site.removed() == []


async def test_a_name_of_several_addresses_leads_somewhere_while_one_of_them_answers(
    process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(process.rpartition(":")[2])
    found = ["127.0.0.3", "127.0.0.1"]

    async def resolves(host: str, port: int, **options: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolves)
    assert not await refresh._leads_nowhere(f"pod-1:{port}")
    found.pop()
    assert await refresh._leads_nowhere(f"pod-1:{port}")


async def test_it_leaves_no_channel_in_the_pool(site: Site, process: str) -> None:
    for i in range(50):
        site.add(f"w{i}", process)
    await site.removed()
    assert len(site.pool) == 0


async def test_a_worker_that_leaves_while_it_is_asked_ends_no_question(site: Site) -> None:
    """Its channel is given up meanwhile, and grpc would call that a cancel of whoever asks."""
    asked = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    holder = site.add("a", address)
    site.pool.get(address)
    answers = asyncio.create_task(site.refresh.answers(holder))
    async with asyncio.timeout(10):
        await asked.wait()
        site.pool.forget(address)
        assert await answers is False
    server.close()
