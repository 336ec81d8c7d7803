"""Callers who leave in the middle of a call write nothing at ERROR: nothing was wrong here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from fastchat_grpc.config import ListenConfig
from fastchat_grpc.errors import AnswerTooLarge, ModelNotFound
from fastchat_grpc.rpc import ended
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.rpc.server import RpcServer
from fastchat_grpc.rpc.status import error_from_rpc
from fastchat_grpc.v1 import registry_pb2 as pb
from fastchat_grpc.v1 import registry_pb2_grpc
from tests.conftest import eventually

BUSY_S = 0.4
"""The event loop is held up this long, so that core knows of the caller's leaving and the loop does not."""
PATIENCE_S = 0.1

End = Callable[[Any], Awaitable[Any]]


class Leavable(registry_pb2_grpc.ControllerServiceServicer):
    """Is left while it is busy, then does something on the call."""

    def __init__(self, end: End, busy_s: float = BUSY_S) -> None:
        self._end = end
        self._busy_s = busy_s
        self.done = 0

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        time.sleep(self._busy_s)  # noqa: ASYNC251  # that is the point
        self.done += 1
        await self._end(context)
        return pb.ListModelsResponse(next_page_token=2 * request.page_token)

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Any) -> pb.ListWorkersResponse:
        return pb.ListWorkersResponse()

    async def WatchWorkers(
        self, request: pb.WatchWorkersRequest, context: Any
    ) -> AsyncIterator[pb.WatchWorkersResponse]:
        time.sleep(self._busy_s)  # noqa: ASYNC251
        self.done += 1
        await self._end(context)
        for _ in range(100):
            yield pb.WatchWorkersResponse(version="x" * 10_000)


async def answer(context: Any) -> None:
    pass


async def refuse(context: Any) -> None:
    raise ModelNotFound("no")


async def tell(context: Any) -> None:
    await context.send_initial_metadata((("k", "v"),))


async def break_down(context: Any) -> None:
    raise RuntimeError("a bug of ours")


def leave(address: str, method: str, patience_s: float) -> None:
    """Call, and be gone before the answer. In a thread: the server's event loop is busy meanwhile."""
    with grpc.insecure_channel(address) as channel:
        stub = registry_pb2_grpc.ControllerServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            if method == "ListModels":
                stub.ListModels(pb.ListModelsRequest(), timeout=patience_s)
            else:
                list(stub.WatchWorkers(pb.WatchWorkersRequest(), timeout=patience_s))


@asynccontextmanager
async def serving(servicer: Leavable, listen: ListenConfig | None = None) -> AsyncIterator[str]:
    """A server with the servicer; its address."""

    def add(server: Any) -> None:
        registry_pb2_grpc.add_ControllerServiceServicer_to_server(servicer, server)

    server = RpcServer(listen or ListenConfig(), [("fastchat_grpc.v1.ControllerService", add)])
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop(0)


async def left(method: str, end: End, patience_s: float = PATIENCE_S) -> None:
    """A call that its caller leaves, to its end."""
    servicer = Leavable(end)
    async with serving(servicer) as address:
        await asyncio.to_thread(leave, address, method, patience_s)
        await eventually(lambda: servicer.done == 1)
        # One call more: what the first has left behind has had its turn.
        async with open_channel(address) as channel:
            await registry_pb2_grpc.ControllerServiceStub(channel).ListWorkers(pb.ListWorkersRequest(), timeout=10)


@pytest.mark.parametrize("method", ["ListModels", "WatchWorkers"])
@pytest.mark.parametrize("end", [answer, refuse, tell])
async def test_a_caller_who_leaves_is_no_error(end: End, method: str, caplog: pytest.LogCaptureFixture) -> None:
    await left(method, end)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("method", ["ListModels", "WatchWorkers"])
async def test_nor_is_what_core_cannot_do_on_a_call_that_is_over(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """Which of both the event loop hears first is chance: so core is made to give a call up, and fails alike."""
    caplog.set_level(logging.DEBUG, logger=ended.logger.name)

    async def lose(context: Any) -> None:
        await context.send_initial_metadata((("no KEY", "v"),))

    await left(method, lose, patience_s=10.0)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert "ExecuteBatchError" in caplog.text, "core has failed, or this test shows nothing"


@pytest.mark.parametrize("method", ["ListModels", "WatchWorkers"])
async def test_what_is_wrong_here_is_logged_though_its_caller_left(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    await left(method, break_down)
    (error,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert f"{method} failed with RuntimeError" in error
    assert break_down.__name__ in error, "the place of the fault is in it"


@pytest.mark.parametrize("method", ["ListModels", "WatchWorkers"])
async def test_an_answer_that_is_too_large_is_refused_with_its_size(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    servicer = Leavable(answer, busy_s=0.0)
    async with serving(servicer, ListenConfig(max_message_bytes=1024)) as address, open_channel(address) as channel:
        stub = registry_pb2_grpc.ControllerServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            if method == "ListModels":
                await stub.ListModels(pb.ListModelsRequest(page_token="x" * 1000))
            else:
                await stub.WatchWorkers(pb.WatchWorkersRequest()).read()
    error = error_from_rpc(caught.value)
    assert isinstance(error, AnswerTooLarge)
    assert "at most 1024" in error.message
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_calls_that_a_stopping_server_ends_have_their_time_to_give_back_what_they_hold(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The process may be over a moment after `stop`, and what has not ended by then is cut off, with an error."""
    given_back = 0

    async def hold(context: Any) -> None:
        nonlocal given_back
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            given_back += 1

    async def life() -> None:
        servicer = Leavable(hold, busy_s=0)
        async with serving(servicer) as address:
            channel = open_channel(address)
            stub = registry_pb2_grpc.ControllerServiceStub(channel)
            calls = [stub.WatchWorkers(pb.WatchWorkersRequest()), stub.ListModels(pb.ListModelsRequest())]
            await eventually(lambda: servicer.done == len(calls))
        await channel.close()

    asyncio.run(life())
    assert given_back == 2
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
