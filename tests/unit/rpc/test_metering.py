"""What a measured call is counted as."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from fastchat_grpc.errors import QueueFull, TooManyCalls
from fastchat_grpc.metrics.calls import MethodCalls, ServerCalls
from fastchat_grpc.rpc.border import Border
from fastchat_grpc.rpc.limits import Limit
from fastchat_grpc.rpc.metering import MeteredCall


class Context:
    """Of a call that was, or was not, aborted."""

    def __init__(self, code: int | None = None, left_s: float | None = None) -> None:
        self._code = code
        self._left_s = left_s

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5"

    def code(self) -> int | None:
        return self._code

    def time_remaining(self) -> float | None:
        return self._left_s


@pytest.mark.parametrize(
    ("error", "context", "status"),
    [
        (QueueFull("full"), Context(), "RESOURCE_EXHAUSTED"),
        (grpc.aio.AbortError(), Context(code=5), "NOT_FOUND"),
        (asyncio.CancelledError(), Context(), "CANCELLED"),
        (asyncio.CancelledError(), Context(left_s=0.0), "DEADLINE_EXCEEDED"),
        (GeneratorExit(), Context(left_s=3.0), "CANCELLED"),
        (KeyError("x"), Context(), "INTERNAL"),
    ],
)
def test_a_call_that_fails_is_counted_with_its_status(error: BaseException, context: Any, status: str) -> None:
    calls = MethodCalls()
    with pytest.raises(type(error)), MeteredCall(calls, None, context):
        raise error
    assert calls.started_count == 1
    assert [(name, found[0].count) for name, found in calls.by_status.items()] == [(status, 1)]


def test_a_call_that_is_refused_for_their_number_is_counted_and_leaves_its_place() -> None:
    calls, limit, context = MethodCalls(), Limit(total=1, per_peer=1), Context()
    first = MeteredCall(calls, limit, context)  # type: ignore[arg-type]
    with first:
        first.sent += 100
        with pytest.raises(TooManyCalls), MeteredCall(calls, limit, context):  # type: ignore[arg-type]
            pass
    assert limit.open == 0
    assert {name: found[1].total for name, found in calls.by_status.items()} == {"OK": 100, "RESOURCE_EXHAUSTED": 0}


def test_a_hundred_thousand_unknown_methods_are_one() -> None:
    calls = ServerCalls()
    border = Border(meter=calls)

    class Details:
        invocation_metadata = ()

        def __init__(self, method: str) -> None:
            self.method = method

    for i in range(100_000):
        assert border.service(Details(f"/a.Service/Method{i}")) is None  # type: ignore[arg-type]
    started = next(iter(calls.collect()))
    assert [(sample.labels, sample.value) for sample in started.samples] == [({"grpc_method": "other"}, 100_000)]
