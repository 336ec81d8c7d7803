"""How many calls a server has open."""

from __future__ import annotations

import pytest

from fastchat_grpc.errors import ReaderTooSlow, TooManyCalls
from fastchat_grpc.rpc.limits import CallBounds, CallLimits
from fastchat_grpc.rpc.retry import Verdict, judge

METHOD = "/fastchat_grpc.v1.GenerationService/Generate"
WATCH = "/grpc.health.v1.Health/Watch"


def test_a_peer_is_a_host_whatever_its_ports():
    limit = CallLimits(CallBounds(calls=10, calls_per_peer=2)).of(METHOD)
    held = [limit.call("ipv4:10.0.0.1:5000"), limit.call("ipv4:10.0.0.1:5001"), limit.call("ipv6:%5B::1%5D:5000")]
    for call in held:
        call.__enter__()
    assert dict(limit.by_peer) == {"ipv4:10.0.0.1": 2, "ipv6:%5B::1%5D": 1}
    with pytest.raises(TooManyCalls, match="this peer has 2 calls open"), limit.call("ipv4:10.0.0.1:6000"):
        pytest.fail("entered")
    with limit.call("ipv4:10.0.0.2:6000"):
        pass
    for call in held:
        call.__exit__(None, None, None)
    assert limit.open == 0
    assert not limit.by_peer


def test_all_together_are_bounded_too_and_an_error_gives_its_place_back():
    limit = CallLimits(CallBounds(calls=1)).of(METHOD)
    with pytest.raises(ValueError, match="inside"), limit.call("ipv4:10.0.0.1:1"):
        with pytest.raises(TooManyCalls, match="this server has 1 calls open"), limit.call("ipv4:10.0.0.2:1"):
            pytest.fail("entered")
        raise ValueError("inside")
    assert limit.open == 0


def test_watches_have_bounds_of_their_own_and_heartbeats_none():
    limits = CallLimits(CallBounds(calls=1, watches=1))
    with limits.of(METHOD).call("ipv4:1.1.1.1:1"), limits.of(WATCH).call("ipv4:1.1.1.1:1"):
        with pytest.raises(TooManyCalls), limits.of(WATCH).call("ipv4:1.1.1.1:2"):
            pytest.fail("entered")
    assert limits.of("/fastchat_grpc.v1.ControllerService/Heartbeat") is None


def test_a_server_with_too_many_calls_is_full_and_a_reader_that_was_too_slow_is_told():
    assert judge(TooManyCalls("full", retry_after_s=1.0)) is Verdict.FULL
    assert judge(ReaderTooSlow("not read")) is Verdict.FINAL
