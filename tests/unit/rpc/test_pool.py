"""The pool of channels: who is reported unreachable, for how long, and who is watched. Over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from fastchat_grpc.rpc import pool as module
from fastchat_grpc.rpc.pool import ChannelPool
from tests.conftest import eventually

PATH = "/any.Service/Method"


class Server:
    """A server on one port that can be taken away and brought back."""

    def __init__(self) -> None:
        self.port = 0
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        async def answer(request: bytes, context: object) -> bytes:
            return b"yes"

        handlers = {"Method": grpc.unary_unary_rpc_method_handler(answer)}
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("any.Service", handlers),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.start()
    yield server
    await server.stop()


class Reports(list[bool | None]):
    """What a pool says of its servers."""

    def __call__(self, address: str, reachable: bool | None) -> None:
        self.append(reachable)


@pytest.fixture
async def reports() -> Reports:
    return Reports()


@pytest.fixture
async def pool(reports: Reports) -> AsyncIterator[ChannelPool]:
    pool = ChannelPool(on_reachable=reports)
    yield pool
    await pool.close()


async def broken(pool: ChannelPool, server: Server, reports: Reports) -> None:
    """A channel that was used, whose server has gone."""
    await pool.get(server.address).unary_unary(PATH)(b"")
    await server.stop()
    await eventually(lambda: reports == [False])


async def test_an_idle_channel_is_watched_while_its_server_cannot_be_reached(
    pool: ChannelPool, server: Server, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broken(pool, server, reports)
    monkeypatch.setattr(module, "IDLE_S", 0.0)
    await pool.look()
    assert len(pool) == 1
    await server.start()
    await eventually(lambda: reports == [False, True], timeout_s=20)
    await pool.look()
    assert len(pool) == 0, "it can be reached, and is idle"


async def test_that_a_server_cannot_be_reached_is_said_again_and_again(
    pool: ChannelPool, server: Server, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REMIND_S", 0.01)
    await broken(pool, server, reports)
    running = asyncio.create_task(pool.run())
    await eventually(lambda: len(reports) > 3)
    assert set(reports) == {False}
    running.cancel()


@pytest.mark.parametrize("how", ["forget", "certificates"])
async def test_a_report_is_taken_back_with_the_watch(
    pool: ChannelPool, server: Server, reports: Reports, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broken(pool, server, reports)
    if how == "forget":
        pool.forget(server.address)
    else:
        monkeypatch.setattr(module, "tls_stamp", lambda tls: "changed")
        await pool.look()
    await eventually(lambda: reports == [False, None])


async def test_a_watch_that_fails_is_started_again_and_says_what_it_owes(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[bool | None] = []

    def faulty(address: str, reachable: bool | None) -> None:
        told.append(reachable)
        if len(told) == 1:
            raise RuntimeError("a bug of ours")

    pool = ChannelPool(on_reachable=faulty)
    await pool.get(server.address).unary_unary(PATH)(b"")
    await server.stop()
    await eventually(lambda: told == [False, False], timeout_s=20)
    assert f"watching the connection to {server.address} failed" in caplog.text
    await server.start()
    await eventually(lambda: told == [False, False, True], timeout_s=20)
    await pool.close()


async def test_nothing_is_said_of_who_could_be_reached(pool: ChannelPool, server: Server, reports: Reports) -> None:
    await pool.get(server.address).unary_unary(PATH)(b"")
    pool.forget(server.address)
    await asyncio.sleep(0)
    assert reports == []


async def test_asking_leaves_no_channel(pool: ChannelPool, server: Server) -> None:
    assert await pool.ask(server.address, PATH, b"", 5.0) == b"yes"
    assert len(pool) == 0
    pool.get(server.address)
    assert await pool.ask(server.address, PATH, b"", 5.0) == b"yes"
    assert len(pool) == 1
