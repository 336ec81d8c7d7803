"""The first messages of calls: read in time, or ended."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastchat_grpc.errors import RequestLate
from fastchat_grpc.rpc.receiving import FirstMessages

PATIENCE_S = 0.2


class Call:
    """A call whose message comes after a while; None: never."""

    def __init__(self, after_s: float | None) -> None:
        self._after_s = after_s

    async def read(self) -> bytes:
        await (asyncio.Event().wait() if self._after_s is None else asyncio.sleep(self._after_s))
        return b"message"


def reading(firsts: FirstMessages, after_s: float | None) -> asyncio.Task[Any]:
    context: Any = Call(after_s)
    return asyncio.create_task(firsts.read(context))


async def test_each_call_has_its_own_time_though_one_timer_serves_all() -> None:
    loop = asyncio.get_running_loop()
    firsts = FirstMessages(PATIENCE_S)
    began = [loop.time()]
    first = reading(firsts, 0.0)  # the timer is set for it
    await asyncio.sleep(PATIENCE_S / 2)
    began.append(loop.time())
    silent = reading(firsts, None)
    assert await first == b"message"
    with pytest.raises(RequestLate, match=r"within 0\.2 s"):
        async with asyncio.timeout(10):
            await silent
    assert loop.time() - began[1] >= PATIENCE_S
    began.append(loop.time())
    with pytest.raises(RequestLate):  # no call is under way: it is set anew
        async with asyncio.timeout(10):
            await reading(firsts, None)
    assert loop.time() - began[2] >= PATIENCE_S
    assert not firsts._waiting
    assert not firsts._late


async def test_who_is_cancelled_by_others_is_not_late() -> None:
    firsts = FirstMessages(PATIENCE_S)
    left, late = reading(firsts, None), reading(firsts, None)
    await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    await asyncio.wait([late])
    assert isinstance(late.exception(), RequestLate)
    assert not late.cancelled()
    assert late.cancelling() == 0, "the task can go on to say so"


async def test_a_call_that_leaves_as_its_time_ends_is_cancelled() -> None:
    firsts = FirstMessages(PATIENCE_S)
    both = reading(firsts, None)
    await asyncio.sleep(0)
    firsts._late.add(both)
    both.cancel()
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both
