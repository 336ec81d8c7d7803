"""What a controller tells of its fleet, of registries that the test fills."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from fastchat_grpc.config import ApiKeyConfig, BreakerConfig, DispatchMethod
from fastchat_grpc.controller.dispatch import PickRequest
from fastchat_grpc.controller.fleet import WorkerSpec
from fastchat_grpc.controller.fleet_metrics import STATES, FleetCollector, WorkerLines
from fastchat_grpc.controller.pick_metrics import MeasuredDispatcher
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.core import Load, ModelInfo, WorkerState
from fastchat_grpc.errors import FastChatError
from fastchat_grpc.metrics.labels import OTHER, Names
from fastchat_grpc.rpc.api_keys import ApiKeys
from tests.scrape import Scrape

HOSTILE = 'w"1\\x\nfastchat_grpc_workers 99'


class Fleet:
    """A registry with metrics, and a clock of its own."""

    def __init__(self, names: int = 1000) -> None:
        self.now = 100.0
        self.registry = Registry(breaker=BreakerConfig(min_failures=1), clock=lambda: self.now)
        self.registry.settle()
        self.metrics = CollectorRegistry()
        names_of = Names(names)
        self.dispatcher = MeasuredDispatcher(self.registry, DispatchMethod.SHORTEST_QUEUE, self.metrics, names_of)
        failover = SimpleNamespace(retried=2, resumed=3, running=1)
        relay: Any = SimpleNamespace(dispatcher=self.dispatcher, failover=failover)
        keys = ApiKeys(ApiKeyConfig(keys=(("alice", "sk-12345678"),)))
        keys.check([("x-api-key", "sk-12345678")])
        self.metrics.register(FleetCollector(relay, keys, None, names_of, lambda: True))
        self.lines = WorkerLines(self.registry)

    def add(self, name: str, *models: str, state: WorkerState = WorkerState.SERVING, **load: Any):
        spec = WorkerSpec(
            worker_id=name,
            instance_id=name,
            address=f"{len(self.registry)}.example:1",
            models=tuple(ModelInfo(name=model, context_length=8) for model in models or ("m",)),
            version="1.0",
        )
        return self.registry.register(spec, Load(state=state, **load))

    def told(self) -> Scrape:
        return Scrape((generate_latest(self.metrics) + self.lines()).decode())


def test_workers_are_counted_by_model_and_state() -> None:
    fleet = Fleet()
    fleet.add("a")
    fleet.add("b", "m", "other model")
    fleet.add("c", state=WorkerState.STARTING)
    fleet.add("d", state=WorkerState.DEGRADED)
    fleet.registry.drain(fleet.add("e").spec.worker_id, None)
    fleet.registry.set_reachable(fleet.add("f"), False)
    fleet.registry.suspect(fleet.add("g"))
    fleet.registry.failed(fleet.add("h"))
    told = fleet.told()
    counts = {state: told.get("fastchat_grpc_workers", model_name="m", state=state) for state in STATES}
    assert counts == {**dict.fromkeys(STATES, 1), "ready": 2}
    assert told.get("fastchat_grpc_workers", model_name="other model", state="ready") == 1
    assert told.get("fastchat_grpc_breaker_transitions_total", state="open") == 1


def test_a_breaker_tells_each_of_its_turns() -> None:
    fleet = Fleet()
    worker = fleet.add("a")
    fleet.registry.failed(worker)
    fleet.registry.failed(worker)
    assert fleet.told().get("fastchat_grpc_fleet_worker_breaker_state", worker_id="a") == 1
    fleet.now += 2.5
    fleet.registry.expire()
    assert fleet.told().get("fastchat_grpc_fleet_worker_breaker_state", worker_id="a") == 2
    reservation = fleet.dispatcher.pick(PickRequest("m"))
    reservation.succeeded()
    reservation.release()
    told = fleet.told()
    for state in ("open", "half_open", "closed"):
        assert told.get("fastchat_grpc_breaker_transitions_total", state=state) == 1, state
    assert told.get("fastchat_grpc_attempts_total", evidence="good") == 1


def test_who_comes_and_goes_is_counted_by_why() -> None:
    fleet = Fleet()
    gone, expires, stays = (fleet.add(name) for name in "abc")
    fleet.registry.deregister(gone.lease_id)
    for _ in range(20):
        fleet.now += 0.5
        fleet.registry.expire()
        fleet.registry.heartbeat(stays.lease_id, Load(running=3, waiting=1, kv_cache_usage=0.25))
    assert expires.removed is not None
    told = fleet.told()
    assert told.get("fastchat_grpc_workers_registered_total") == 3
    assert told.get("fastchat_grpc_workers_removed_total", reason="deregistered") == 1
    assert told.get("fastchat_grpc_workers_removed_total", reason="expired") == 1
    assert told.get("fastchat_grpc_heartbeats_total") == 20
    assert told.get("fastchat_grpc_fleet_worker_running_requests", worker_id="c") == 3
    assert told.get("fastchat_grpc_fleet_worker_kv_cache_usage_ratio", worker_id="c") == 0.25
    assert not told.has("fastchat_grpc_fleet_worker_info", worker_id="a"), "who is gone has no series"
    assert told.has("fastchat_grpc_fleet_worker_info", worker_id="c", address="2.example:1", version="1.0")


def test_picks_are_counted_by_model_and_what_came_of_them() -> None:
    fleet = Fleet()
    worker = fleet.add("a")
    for _ in range(3):
        fleet.dispatcher.pick(PickRequest("m"))
    fleet.registry.suspect(worker)
    with pytest.raises(FastChatError):
        fleet.dispatcher.pick(PickRequest("m"))
    told = fleet.told()
    assert told.get("fastchat_grpc_picks_total", model_name="m", result="ok") == 3
    assert told.get("fastchat_grpc_picks_total", model_name="m", result="no_live_worker") == 1
    assert told.get("fastchat_grpc_pick_duration_seconds_count") == 3
    assert told.get("fastchat_grpc_fleet_worker_reserved_requests", worker_id="a") == 3
    assert told.get("fastchat_grpc_retries_total") == 2
    assert told.get("fastchat_grpc_resumes_total") == 3
    assert told.get("fastchat_grpc_api_key_uses_total", client="alice") == 1


def test_a_hundred_thousand_names_that_nobody_serves_make_one_series() -> None:
    fleet = Fleet()
    fleet.add("a")
    for i in range(100_000):
        with pytest.raises(FastChatError):
            fleet.dispatcher.pick(PickRequest(f"model-{i}"))
    told = fleet.told()
    assert told.get("fastchat_grpc_picks_total", model_name=OTHER, result="model_not_found") == 100_000
    assert sum(name == "fastchat_grpc_picks_total" for name, _ in told.samples) == 1


def test_models_beyond_the_bound_are_other() -> None:
    fleet = Fleet(names=10)
    for i in range(50):
        fleet.add(f"w{i}", f"model-{i}")
        fleet.dispatcher.pick(PickRequest(f"model-{i}"))
    told = fleet.told()
    assert told.get("fastchat_grpc_workers", model_name=OTHER, state="ready") == 40
    assert told.get("fastchat_grpc_picks_total", model_name=OTHER, result="ok") == 40
    assert told.get("fastchat_grpc_workers") == 50


def test_names_with_quotes_and_newlines_forge_no_line() -> None:
    fleet = Fleet()
    fleet.add(HOSTILE, HOSTILE)
    told = fleet.told()
    assert told.get("fastchat_grpc_fleet_worker_tier", worker_id=HOSTILE) == 2
    assert told.get("fastchat_grpc_workers", model_name=HOSTILE, state="ready") == 1


async def test_requests_that_wait_are_told_by_model() -> None:
    fleet = Fleet()
    fleet.add("a")
    task = asyncio.create_task(fleet.registry.room.wait("gone", 10))
    await asyncio.sleep(0)
    told = fleet.told()
    assert told.get("fastchat_grpc_unserved_requests", model_name="gone") == 1
    assert told.get("fastchat_grpc_unserved_requests", model_name="m") == 0
    task.cancel()


def test_ten_thousand_workers_are_told_each_by_itself() -> None:
    fleet = Fleet()
    for i in range(10_000):
        fleet.add(f"worker-{i}")
    text = fleet.lines().decode()
    assert text.count("fastchat_grpc_fleet_worker_tier{") == 10_000
    assert text.count("\n") == 8 * 10_002
