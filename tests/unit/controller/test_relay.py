"""What a relay tells the registry of the workers that it asks, over channels that are made of lists."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from fastchat_grpc.config import BreakerConfig, FailoverConfig
from fastchat_grpc.controller.breaker import BreakerState
from fastchat_grpc.controller.dispatch import Dispatcher
from fastchat_grpc.controller.fleet import Worker
from fastchat_grpc.controller.health import Tier
from fastchat_grpc.controller.relay import Relay
from fastchat_grpc.errors import NotResumable
from fastchat_grpc.rpc.failover import EOF
from fastchat_grpc.rpc.pool import ChannelPool
from fastchat_grpc.v1 import generation_pb2 as pb
from tests.unit.controller.fleet import Fleet

TOKEN = pb.GenerateResponse(delta=pb.Delta(text="a", token_ids=[1])).SerializeToString()
END = pb.GenerateResponse(completion=pb.Completion(finish_reason=pb.FINISH_REASON_STOP)).SerializeToString()


class Site:
    """A worker whose breaker opens at its second failure, and a relay to it. What it says next stands in `script`."""

    def __init__(self) -> None:
        self.fleet = Fleet(breaker=BreakerConfig(min_failures=2, cooldown_s=2))
        self.worker = self.fleet.join()
        self.script: list[Any] = []
        self.asked: list[pb.GenerateRequest] = []
        channel = SimpleNamespace(calls=0, used_at=0.0, unary_stream=lambda method: self._call)
        pool = cast(ChannelPool, SimpleNamespace(get=lambda address: channel))
        self.relay = Relay(Dispatcher(self.fleet.registry), pool, FailoverConfig())

    def _call(self, request: bytes, **options: Any) -> Any:
        self.asked.append(pb.GenerateRequest.FromString(request))

        async def read() -> Any:
            if not self.script:
                await asyncio.Event().wait()
            said = self.script.pop(0)
            if isinstance(said, grpc.StatusCode):
                raise grpc.aio.AioRpcError(said, grpc.aio.Metadata(), grpc.aio.Metadata(), "broken")
            return said

        async def initial_metadata() -> tuple[()]:
            return ()

        return SimpleNamespace(read=read, initial_metadata=initial_metadata, cancel=lambda: None)

    def generate(self, **sampling: float) -> AsyncGenerator[bytes, None]:
        return self.relay.generate(pb.GenerateRequest(prompt="p", sampling=pb.SamplingParams(**sampling)))

    async def fail(self) -> None:
        """The worker gives a first token, and fails."""
        self.script = [TOKEN, grpc.StatusCode.INTERNAL]
        with pytest.raises(Exception, match="broken"):
            async for _ in self.generate():
                pass


def breaker(worker: Worker) -> BreakerState | None:
    found = worker.health._breaker
    return found.state if found is not None else None


async def test_first_tokens_are_no_successes() -> None:
    site = Site()
    await site.fail()
    for _ in range(20):  # as successes they would outweigh both failures
        site.script = [TOKEN]
        async with aclosing(site.generate()) as events:
            await anext(events)
    assert site.worker.reserved_count == 0
    await site.fail()
    assert breaker(site.worker) is BreakerState.OPEN


async def test_a_probe_closes_the_breaker_with_its_completion_not_with_its_first_token() -> None:
    site = Site()
    await site.fail()
    await site.fail()
    site.fleet.wait(2.1)
    site.fleet.registry.heartbeat(site.worker.lease_id, site.worker.load)
    site.script = [TOKEN]
    async with aclosing(site.generate()) as events:
        await anext(events)
        assert breaker(site.worker) is BreakerState.HALF_OPEN
        site.script = [END, EOF]
        await anext(events)
        with pytest.raises(StopAsyncIteration):
            await anext(events)
    assert breaker(site.worker) is BreakerState.CLOSED


async def test_a_probe_that_fails_after_its_first_token_doubles_the_pause() -> None:
    site = Site()
    await site.fail()
    await site.fail()
    site.fleet.wait(2.1)
    await site.fail()
    assert breaker(site.worker) is BreakerState.OPEN
    site.fleet.registry.heartbeat(site.worker.lease_id, site.worker.load)
    site.fleet.wait(3.5)
    assert breaker(site.worker) is BreakerState.OPEN


async def test_all_attempts_of_a_request_without_a_seed_have_the_relays() -> None:
    site = Site()
    site.fleet.join("b")
    site.script = [TOKEN, grpc.StatusCode.UNAVAILABLE, END, EOF]
    async for _ in site.generate():
        pass
    seeds = [asked.sampling.fallback_seed for asked in site.asked if asked.sampling.HasField("fallback_seed")]
    assert len(seeds) == 2
    assert seeds[0] == seeds[1]


async def test_a_worker_that_was_lost_gets_nothing_before_its_next_heartbeat() -> None:
    site = Site()
    site.fleet.join("b")
    site.script = [grpc.StatusCode.UNAVAILABLE, END, EOF]
    async for _ in site.generate():
        pass
    lost = [worker for worker in site.fleet.registry.workers() if worker.tier is Tier.NONE]
    assert len(lost) == 1
    site.fleet.registry.heartbeat(lost[0].lease_id, lost[0].load)
    assert lost[0].tier is Tier.READY


async def test_a_stream_that_no_worker_could_go_on_with_does_not_wait_for_the_one_it_lost() -> None:
    site = Site()
    site.script = [TOKEN, grpc.StatusCode.UNAVAILABLE]
    with pytest.raises(NotResumable, match="stateful_resume"):
        async with asyncio.timeout(FailoverConfig().wait_s / 2):
            async for _ in site.generate(presence_penalty=0.5):
                pass
    assert site.fleet.registry.recovering("m"), "it may come back, but cannot do it either"
