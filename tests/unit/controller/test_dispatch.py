"""Dispatch policies and the dispatcher."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fastchat_grpc.config import DispatchMethod
from fastchat_grpc.controller.dispatch import (
    Dispatcher,
    lottery,
    power_of_two,
    prefix_affinity,
    shortest_queue,
)
from fastchat_grpc.controller.fleet import Worker
from fastchat_grpc.core import Capability, Load, WorkerState
from fastchat_grpc.errors import NoLiveWorker
from tests.unit.controller.fleet import Fleet, model


def workers(*queues: int, weights: tuple[float, ...] = ()) -> list[Worker]:
    fleet = Fleet()
    return [
        fleet.join(f"w{i}", load=Load(running=queue), weight=weights[i] if weights else 1.0)
        for i, queue in enumerate(queues)
    ]


def ids(picks: list[Worker]) -> Counter[str]:
    return Counter(worker.spec.worker_id for worker in picks)


def test_shortest_queue_takes_the_shortest_for_its_weight() -> None:
    candidates = workers(3, 4, 9, weights=(1, 2, 3))
    assert shortest_queue(candidates, "", random.Random(1)).spec.worker_id == "w1"


def test_shortest_queue_breaks_ties_at_random() -> None:
    rng = random.Random(1)
    candidates = workers(1, 0, 0, 0)
    counts = ids([shortest_queue(candidates, "", rng) for _ in range(3000)])
    assert set(counts) == {"w1", "w2", "w3"}
    assert min(counts.values()) > 850


def test_lottery_goes_by_weight() -> None:
    rng = random.Random(1)
    candidates = workers(9, 0, weights=(3, 1))
    counts = ids([lottery(candidates, "", rng) for _ in range(4000)])
    assert counts["w0"] == pytest.approx(3000, abs=150)


def test_power_of_two_never_takes_the_longest_of_three_and_takes_all_of_equals() -> None:
    rng = random.Random(1)
    assert "w2" not in ids([power_of_two(workers(0, 1, 5), "", rng) for _ in range(300)])
    equal = workers(0, 0, 0, 0)
    counts = ids([power_of_two(equal, "", rng) for _ in range(4000)])
    assert min(counts.values()) > 850
    assert power_of_two(workers(7), "", rng).spec.worker_id == "w0"


def test_power_of_two_looks_at_two_workers_only() -> None:
    class Counting(list[Worker]):
        looks = 0

        def __getitem__(self, index: int) -> Worker:  # type: ignore[override]
            self.looks += 1
            return super().__getitem__(index)

        def __iter__(self):  # type: ignore[no-untyped-def]
            raise AssertionError("walked over all candidates")

    candidates = Counting(workers(*range(50)))
    power_of_two(candidates, "", random.Random(1))
    assert candidates.looks == 2


def test_prefix_affinity_sends_a_key_to_one_worker_and_spreads_keys() -> None:
    rng = random.Random(1)
    candidates = workers(*[0] * 8)
    homes = {key: prefix_affinity(candidates, key, rng) for key in map(str, range(800))}
    assert all(prefix_affinity(candidates, key, rng) is home for key, home in homes.items())
    assert min(ids(list(homes.values())).values()) > 50


def test_a_worker_that_leaves_moves_its_own_keys_alone() -> None:
    rng = random.Random(1)
    candidates = workers(*[0] * 8)
    homes = {key: prefix_affinity(candidates, key, rng) for key in map(str, range(200))}
    left = candidates[:-1]
    assert all(prefix_affinity(left, key, rng) is home for key, home in homes.items() if home is not candidates[-1])


def test_prefix_affinity_passes_an_overloaded_worker_over() -> None:
    rng = random.Random(1)
    fleet = Fleet()
    candidates = [fleet.join(f"w{i}") for i in range(4)]
    home = prefix_affinity(candidates, "key", rng)
    for _ in range(20):
        fleet.registry.reserve(home)
    assert prefix_affinity(candidates, "key", rng) is not home


def test_prefix_affinity_without_a_key_goes_by_the_queue() -> None:
    assert prefix_affinity(workers(2, 0, 1), "", random.Random(1)).spec.worker_id == "w1"


@pytest.mark.parametrize("method", list(DispatchMethod))
class TestDispatcher:
    def dispatcher(self, fleet: Fleet, method: DispatchMethod) -> Dispatcher:
        return Dispatcher(fleet.registry, method, random.Random(1))

    def test_excluded_workers_are_never_picked(self, method: DispatchMethod) -> None:
        fleet = Fleet()
        for worker_id in "abc":
            fleet.join(worker_id)
        dispatcher = self.dispatcher(fleet, method)
        picked = {dispatcher.choose("m", str(i), {"a", "b-1"})[1].spec.worker_id for i in range(50)}
        assert picked == {"c"}
        with pytest.raises(NoLiveWorker):
            dispatcher.choose("m", excluded={"a", "b", "c"})

    def test_a_degraded_worker_is_picked_only_where_no_other_is_left(self, method: DispatchMethod) -> None:
        fleet = Fleet()
        fleet.join("bad", load=Load(state=WorkerState.DEGRADED))
        fleet.join("good", load=Load(running=50))
        dispatcher = self.dispatcher(fleet, method)
        assert {dispatcher.choose("m", str(i))[1].spec.worker_id for i in range(50)} == {"good"}
        assert dispatcher.choose("m", excluded={"good"})[1].spec.worker_id == "bad"

    def test_only_workers_that_can_are_picked(self, method: DispatchMethod) -> None:
        fleet = Fleet()
        fleet.join("can")
        plain = fleet.join("cannot").spec
        fleet.registry.register(
            type(plain)(
                worker_id="cannot",
                instance_id="cannot-1",
                address="x:1",
                models=(model(capabilities=frozenset({Capability.GENERATE})),),
            ),
            Load(),
        )
        dispatcher = self.dispatcher(fleet, method)
        picked = {dispatcher.choose("m", str(i), needs=Capability.RESUME)[1].spec.worker_id for i in range(50)}
        assert picked == {"can"}

    def test_a_pick_is_counted_until_released(self, method: DispatchMethod) -> None:
        fleet = Fleet()
        worker = fleet.join()
        reservation = self.dispatcher(fleet, method).pick("")
        assert worker.reserved == 1
        reservation.release()
        assert worker.reserved == 0
