"""Paths that swallow packets: connections that look alive and are not."""

from __future__ import annotations

import asyncio
from time import monotonic

import grpc
import pytest

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import FailoverConfig, LeaseConfig
from fastchat_grpc.controller.fleet import Change, ChangeKind
from fastchat_grpc.errors import FastChatError
from fastchat_grpc.rpc.channels import CLIENT_OPTIONS, open_channel
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import StartWorker, echo_config, eventually, running_worker
from tests.integration.blackhole import through
from tests.integration.controllers import running_controller

BOUND_S = 6.0
"""After so long a silent connection is left: keepalive time and timeout together."""
SLACK_S = 4.0
"""What a busy machine may add."""
ONCE = FailoverConfig(max_attempts=1, max_resumes=0, wait_s=0)


def test_the_options_add_up_to_the_bound() -> None:
    options = dict(CLIENT_OPTIONS)
    time_s, timeout_s = options["grpc.keepalive_time_ms"] / 1000, options["grpc.keepalive_timeout_ms"] / 1000
    assert time_s + timeout_s <= BOUND_S
    # The ping that measures the path is sent whenever data comes, and has this timeout of its own.
    assert options["grpc.http2.ping_timeout_ms"] / 1000 <= timeout_s


async def test_what_runs_over_a_path_that_swallows_packets_ends_within_the_lease(start_worker: StartWorker) -> None:
    """In the middle of tokens, before the first one, and without any call at all."""
    talking, silent = await start_worker(options={"delay_ms": "20"}), await start_worker(options={"delay_ms": "60000"})
    seconds = await asyncio.gather(_stream_ends(talking, True), _stream_ends(silent, False), _channel_breaks(talking))
    assert max(seconds) < BOUND_S + SLACK_S


async def _stream_ends(worker: WorkerApp, after_tokens: bool) -> float:
    """Seconds until a stream ends whose path has begun to swallow packets."""
    async with through(worker.address) as path, AsyncClient(path.address, failover=ONCE) as client:
        started = asyncio.Event()

        async def read() -> float:
            with pytest.raises(FastChatError, match="ping timeout"):
                async for _ in client.generate("x" * 3000, max_new_tokens=3000):
                    started.set()
            return monotonic()

        reading = asyncio.create_task(read())
        if after_tokens:
            await started.wait()
        else:
            await eventually(lambda: worker._generation.admission.running == 1)
        path.swallow(new=False)
        swallowed_at = monotonic()
        return await reading - swallowed_at


async def _channel_breaks(worker: WorkerApp) -> float:
    async with through(worker.address) as path, open_channel(path.address) as channel:
        await channel.channel_ready()
        path.swallow()
        swallowed_at = monotonic()
        await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        return monotonic() - swallowed_at


async def test_a_worker_leaves_a_connection_without_answers_and_keeps_its_lease() -> None:
    """One heartbeat is lost, the next goes over a new connection. Before, the lease was lost and gone for a minute."""
    lease = LeaseConfig(time_to_live_s=4, heartbeat_interval_s=0.3)  # ends before the connection's own pings end that
    async with running_controller(lease=lease) as controller, through(controller.address) as path:
        removals: list[Change] = []
        async with running_worker(echo_config("m", controllers=(path.address,))) as worker:
            await eventually(lambda: worker.registered)
            controller.registry.subscribe(
                lambda change: removals.append(change) if change.kind is ChangeKind.REMOVED else None
            )
            (seen,) = controller.registry.workers()
            connections = path.accepted
            path.swallow(new=False)
            swallowed_at = monotonic()
            await eventually(lambda: seen.heartbeat_at > swallowed_at + 0.1)
            assert not removals
            assert path.accepted > connections


async def test_a_worker_returns_when_a_path_heals_that_swallowed_everything() -> None:
    lease = LeaseConfig(time_to_live_s=1, heartbeat_interval_s=0.3)
    async with running_controller(lease=lease) as controller, through(controller.address) as path:
        async with running_worker(echo_config("m", controllers=(path.address,))) as worker:
            await eventually(lambda: worker.registered)
            path.swallow()
            await eventually(lambda: not controller.registry.workers())
            path.heal()
            await eventually(lambda: len(controller.registry.workers()) == 1)
