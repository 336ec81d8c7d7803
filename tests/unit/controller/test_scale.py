"""What must not grow with the fleet, counted in steps of the interpreter: they are the same on any machine."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import pytest

from fastchat_grpc.config import DispatchMethod, LeaseConfig
from fastchat_grpc.controller.dispatch import Dispatcher, PickRequest
from fastchat_grpc.controller.fleet import WorkerSpec
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.core import Load, ModelInfo
from fastchat_grpc.errors import FleetFull, ModelNotFound

SMALL, LARGE = 50, 5000


def steps(action: Callable[[], object]) -> int:
    """Bytecode instructions that an action takes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


def registry(count: int, models: int = 1, names: int = 1) -> Registry:
    """So many workers, each of one of several sets of names."""
    found = Registry(LeaseConfig(max_workers=count))
    found.settle()
    for i in range(count):
        described = tuple(ModelInfo(name=f"m{i % models}-{j}", context_length=1) for j in range(names))
        spec = WorkerSpec(worker_id=f"w{i}", instance_id=f"i{i}", address=f"10.0.0.1:{i}", models=described)
        found.register(spec, Load(running=i % 7, max_running=8))
    return found


@pytest.mark.parametrize("tried", [0, 3])
@pytest.mark.parametrize("method", list(DispatchMethod))
def test_a_pick_and_its_two_spares_cost_the_same_in_any_fleet(method: DispatchMethod, tried: int) -> None:
    before = {f"i{i}": 0.0 for i in range(tried)}

    def cost(count: int) -> float:
        dispatcher = Dispatcher(registry(count), method, random.Random(1))
        model = "m0-0"

        def picks(key: str) -> None:
            reservation = dispatcher.pick(PickRequest(model=model, key=key, tried=before))
            excluded = {reservation.instance_id}
            for _ in range(2):
                _, worker = dispatcher.choose(PickRequest(model=model, key=key, excluded=excluded, tried=before))
                excluded.add(worker.spec.instance_id)
            reservation.release()

        picks("")
        picks("key")
        return sum(steps(partial(picks, f"key {i}")) for i in range(20)) / 20

    assert cost(LARGE) < 1.3 * cost(SMALL)


def test_a_heartbeat_costs_the_same_whatever_its_worker_serves() -> None:
    def cost(names: int) -> int:
        found = registry(SMALL, names=names)
        worker = found.worker("w0")
        return steps(lambda: found.heartbeat(worker.lease_id, Load(running=5)))

    assert cost(100) == cost(1)


def test_a_broken_connection_costs_the_same_in_any_fleet() -> None:
    def cost(count: int) -> int:
        found = registry(count)

        def breaks() -> None:
            for worker in found.at("10.0.0.1:7"):
                found.set_reachable(worker, False)

        return steps(breaks)

    assert cost(LARGE) == cost(SMALL)


def test_the_catalogue_is_made_once_for_all_who_ask() -> None:
    found = registry(100, models=10, names=11)
    assert len(found.catalogue()) == 110
    assert steps(found.catalogue) < 100
    with pytest.raises(ModelNotFound):
        found.pool("unknown")
    assert steps(found.catalogue) < 100, "asking for what is not there makes nothing anew"
    before = {info.name: count for info, count in found.catalogue()}
    found.deregister(found.worker("w0").lease_id)
    after = {info.name: count for info, count in found.catalogue()}
    assert {name for name in before if before[name] != after[name]} == {f"m0-{j}" for j in range(11)}


def test_the_list_of_all_workers_is_sorted_once() -> None:
    found = registry(LARGE)
    assert [worker.spec.worker_id for worker in found.workers()] == sorted(f"w{i}" for i in range(LARGE))
    assert steps(found.workers) < 100


def test_buckets_that_are_empty_do_not_pile_up() -> None:
    found = registry(10)
    dispatcher = Dispatcher(found)
    rng = random.Random(1)
    for i in range(5000):
        worker = found.worker(f"w{rng.randrange(10)}")
        found.heartbeat(worker.lease_id, Load(running=i))
        dispatcher.choose(PickRequest())
    (index,) = found.pool("")[1].indexes(worker.tier)
    assert len(index._scores) < 200


def test_a_full_registry_says_so_and_lets_those_in_that_it_knows() -> None:
    found = registry(3)
    spec = WorkerSpec(
        worker_id="one-more", instance_id="i", address="a:1", models=(ModelInfo(name="m", context_length=1),)
    )
    with pytest.raises(FleetFull, match="3 workers"):
        found.register(spec, Load())
    known = found.worker("w0").spec
    found.register(known, Load())
    found.register(replace(known, instance_id="its next process"), Load())
    found.deregister(found.worker("w1").lease_id)
    found.register(spec, Load())
    assert len(found) == 3


@pytest.mark.parametrize("method", list(DispatchMethod))
def test_a_pick_costs_the_same_where_each_worker_has_a_context_of_its_own(method: DispatchMethod) -> None:
    def cost(distinct: bool) -> int:
        found = Registry()
        found.settle()
        for i in range(500):
            info = ModelInfo(name="m", context_length=1000 + i * distinct)
            spec = WorkerSpec(worker_id=f"w{i}", instance_id=f"i{i}", address="10.0.0.1:1", models=(info,))
            found.register(spec, Load(running=i % 7))
        assert [model.context_length for model, _ in found.catalogue()] == [1000], "what any of them takes"
        assert found.worker("w7").spec.models[0].context_length == 1000 + 7 * distinct
        if distinct:
            found.deregister(found.worker("w0").lease_id)
            assert [model.context_length for model, _ in found.catalogue()] == [1001]
        dispatcher = Dispatcher(found, method, random.Random(1))
        dispatcher.choose(PickRequest(model="m", key="k"))
        return sum(steps(lambda: dispatcher.choose(PickRequest(model="m", key="k"))) for _ in range(10))

    assert cost(distinct=True) < 1.3 * cost(distinct=False)
