"""Dispatch policies and the dispatcher."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fastchat_grpc.config import DispatchMethod
from fastchat_grpc.controller.dispatch import (
    Dispatcher,
    PickRequest,
    Policy,
    lottery,
    power_of_two,
    prefix_affinity,
    shortest_queue,
)
from fastchat_grpc.controller.fleet import Worker
from fastchat_grpc.controller.index import Candidates, ScoreIndex
from fastchat_grpc.core import Capability, Load, WorkerState
from fastchat_grpc.errors import AdapterNotFound, NoLiveWorker
from tests.unit.controller.fleet import Fleet, model


def workers(*queues: int, weights: tuple[float, ...] = ()) -> list[Worker]:
    fleet = Fleet()
    return [
        fleet.join(f"w{i}", load=Load(running=queue), weight=weights[i] if weights else 1.0)
        for i, queue in enumerate(queues)
    ]


def among(candidates: list[Worker]) -> Candidates[Worker]:
    """Candidates of an index of their own; the workers leave the one that they were in."""
    index: ScoreIndex[Worker] = ScoreIndex()
    for worker in candidates:
        if worker.index is not None:
            worker.index.discard(worker)
        index.add(worker)
    return Candidates([index])


def picks(policy: Policy, candidates: list[Worker], count: int, key: str = "") -> list[Worker]:
    """So many picks by a policy, with a seed of its own."""
    rng, offered = random.Random(1), among(candidates)
    return [worker for _ in range(count) if (worker := policy(offered, key, rng)) is not None]


def ids(picks: list[Worker]) -> Counter[str]:
    return Counter(worker.spec.worker_id for worker in picks)


def test_shortest_queue_takes_the_shortest_for_its_weight() -> None:
    candidates = workers(3, 4, 9, weights=(1, 2, 3))
    assert set(ids(picks(shortest_queue, candidates, 50))) == {"w1"}


def test_shortest_queue_breaks_ties_at_random() -> None:
    counts = ids(picks(shortest_queue, workers(1, 0, 0, 0), 3000))
    assert set(counts) == {"w1", "w2", "w3"}
    assert min(counts.values()) > 850


def test_equals_in_several_indexes_have_equal_chances() -> None:
    rng = random.Random(1)
    many, few = workers(0, 0, 0), workers(0)
    offered = Candidates([among(many)._indexes[0], among(few)._indexes[0]])
    counts = Counter(shortest_queue(offered, "", rng) for _ in range(4000))
    assert min(counts.values()) > 850


def test_lottery_goes_by_weight() -> None:
    counts = ids(picks(lottery, workers(9, 0, weights=(3, 1)), 4000))
    assert counts["w0"] == pytest.approx(3000, abs=150)


def test_lottery_goes_by_weight_among_those_that_are_left() -> None:
    rng = random.Random(1)
    candidates = workers(0, 0, 0, weights=(1000, 3, 1))
    offered = Candidates([among(candidates)._indexes[0]], lambda worker: worker is not candidates[0])
    counts = Counter(lottery(offered, "", rng) for _ in range(4000))
    assert counts[candidates[0]] == 0
    assert counts[candidates[1]] == pytest.approx(3000, abs=150)


def test_power_of_two_never_takes_the_longest_of_three_and_takes_all_of_equals() -> None:
    assert "w2" not in ids(picks(power_of_two, workers(0, 1, 5), 300))
    counts = ids(picks(power_of_two, workers(0, 0, 0, 0), 4000))
    assert min(counts.values()) > 850
    assert ids(picks(power_of_two, workers(7), 1)) == {"w0": 1}


def test_power_of_two_looks_at_two_workers_only() -> None:
    class Counting(list[Worker]):
        looks = 0

        def __getitem__(self, index: int) -> Worker:  # type: ignore[override]
            self.looks += 1
            return super().__getitem__(index)

        def __iter__(self):  # type: ignore[no-untyped-def]
            raise AssertionError("walked over all candidates")

    offered = among(workers(*range(50)))
    index = offered._indexes[0]
    index.items = counting = Counting(index.items)
    power_of_two(offered, "", random.Random(1))
    assert counting.looks == 2


def test_prefix_affinity_sends_a_key_to_one_worker_and_spreads_keys() -> None:
    rng = random.Random(1)
    candidates = among(workers(*[0] * 8))
    homes = {key: prefix_affinity(candidates, key, rng) for key in map(str, range(800))}
    assert all(prefix_affinity(candidates, key, rng) is home for key, home in homes.items())
    assert min(Counter(homes.values()).values()) > 50


def test_a_worker_that_leaves_moves_its_own_keys_alone() -> None:
    rng = random.Random(1)
    candidates = workers(*[0] * 8)
    offered = among(candidates)
    homes = {key: prefix_affinity(offered, key, rng) for key in map(str, range(200))}
    left = among(candidates[:-1])
    assert all(prefix_affinity(left, key, rng) is home for key, home in homes.items() if home is not candidates[-1])


def test_prefix_affinity_passes_an_overloaded_worker_over() -> None:
    fleet = Fleet()
    dispatcher = Dispatcher(fleet.registry, DispatchMethod.PREFIX_AFFINITY, random.Random(1))
    for i in range(4):
        fleet.join(f"w{i}")
    _, home = dispatcher.choose(PickRequest(key="key"))
    for _ in range(20):
        fleet.registry.reserve(home)
    assert dispatcher.choose(PickRequest(key="key"))[1] is not home


def test_prefix_affinity_without_a_key_goes_by_the_queue() -> None:
    assert set(ids(picks(prefix_affinity, workers(2, 0, 1), 20))) == {"w1"}


@pytest.mark.parametrize("method", list(DispatchMethod))
class TestDispatcher:
    def dispatcher(self, fleet: Fleet, method: DispatchMethod) -> Dispatcher:
        return Dispatcher(fleet.registry, method, random.Random(1))

    def test_excluded_workers_are_never_picked(self, method: DispatchMethod) -> None:
        fleet = Fleet()
        for worker_id in "abc":
            fleet.join(worker_id)
        dispatcher = self.dispatcher(fleet, method)
        picked = {
            dispatcher.choose(PickRequest(model="m", key=str(i), excluded={"a", "b-1"}))[1].spec.worker_id
            for i in range(50)
        }
        assert picked == {"c"}
        with pytest.raises(NoLiveWorker):
            dispatcher.choose(PickRequest(model="m", excluded={"a", "b", "c"}))

    def test_a_degraded_worker_is_picked_only_where_no_other_is_left(self, method: DispatchMethod) -> None:
        fleet = Fleet()
        fleet.join("bad", load=Load(state=WorkerState.DEGRADED))
        fleet.join("good", load=Load(running=50))
        dispatcher = self.dispatcher(fleet, method)
        assert {dispatcher.choose(PickRequest(model="m", key=str(i)))[1].spec.worker_id for i in range(50)} == {"good"}
        assert dispatcher.choose(PickRequest(model="m", excluded={"good"}))[1].spec.worker_id == "bad"

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
        for model_name in ("m", ""):
            wanted = PickRequest(model=model_name, needs=frozenset({Capability.RESUME}))
            picked = {dispatcher.choose(wanted._replace(key=str(i)))[1].spec.worker_id for i in range(50)}
            assert picked == {"can"}

    def test_what_a_request_asks_for_is_looked_for_where_somebody_has_it(self, method: DispatchMethod) -> None:
        fleet = Fleet()
        fleet.join("cannot", load=Load(running=0))
        wanted = PickRequest(prefers=frozenset({Capability.LOGPROBS}))
        dispatcher = self.dispatcher(fleet, method)
        assert dispatcher.choose(wanted)[1].spec.worker_id == "cannot", "it says so itself"
        can = model(capabilities=frozenset({Capability.GENERATE, Capability.LOGPROBS}))
        worker = fleet.join("can", given=(can,), load=Load(running=50))
        for model_name in ("m", ""):
            picked = {
                dispatcher.choose(wanted._replace(model=model_name, key=str(i)))[1].spec.worker_id for i in range(50)
            }
            assert picked == {"can"}
        fleet.registry.suspect(worker)
        with pytest.raises(NoLiveWorker):
            dispatcher.choose(wanted)  # it will be back; the other would refuse

    def test_who_was_tried_comes_last_and_only_after_a_sign_of_life(self, method: DispatchMethod) -> None:
        fleet = Fleet()
        first, other = fleet.join("first"), fleet.join("other")
        dispatcher = self.dispatcher(fleet, method)
        tried = {"first-1": fleet.clock.now}
        fleet.wait(1)
        fleet.registry.heartbeat(first.lease_id, Load())
        picked = {dispatcher.choose(PickRequest(key=str(i), tried=tried))[1] for i in range(50)}
        assert picked == {other}, "not again while somebody is untried"
        tried["other-1"] = fleet.clock.now
        assert dispatcher.choose(PickRequest(tried=tried))[1] is first
        tried["first-1"] = fleet.clock.now
        with pytest.raises(NoLiveWorker):
            dispatcher.choose(PickRequest(tried=tried))
        fleet.wait(0.5)
        fleet.registry.set_reachable(other, False)
        fleet.registry.set_reachable(other, True)
        assert dispatcher.choose(PickRequest(tried=tried))[1] is other, "its connection stands again"

    def test_an_adapter_is_found_at_the_workers_that_have_it(self, method: DispatchMethod) -> None:
        fleet = Fleet()
        for worker_id, models in (("plain", "m"), ("with", "m,x"), ("else", "n,x")):
            fleet.join(worker_id, models)
        dispatcher = self.dispatcher(fleet, method)
        for i in range(50):
            name, worker = dispatcher.choose(PickRequest(model="m", adapter="x", key=str(i)))
            assert (name, worker.spec.worker_id) == ("m", "with")
        with pytest.raises(AdapterNotFound, match="'y'"):
            dispatcher.choose(PickRequest(model="m", adapter="y"))

    def test_a_pick_is_counted_until_released(self, method: DispatchMethod) -> None:
        fleet = Fleet()
        worker = fleet.join()
        reservation = self.dispatcher(fleet, method).pick(PickRequest())
        assert worker.reserved_count == 1
        reservation.release()
        assert worker.reserved_count == 0


@pytest.mark.parametrize(("fingerprint", "backend"), [("v1", ""), ("", "engine"), ("v1", "engine")])
def test_what_goes_on_is_picked_for_by_the_weights_and_the_backend_that_began(fingerprint: str, backend: str) -> None:
    fleet = Fleet()
    fleet.join("a", given=(model(fingerprint="v1", backend="engine"),), load=Load(running=5))
    fleet.join("b", given=(model(fingerprint="v2", backend="another"),))
    wanted = PickRequest(model="m", fingerprint=fingerprint, backend=backend)
    assert Dispatcher(fleet.registry).pick(wanted).worker.spec.worker_id == "a"
    fleet.registry.deregister(fleet.registry.worker("a").lease_id)
    with pytest.raises(NoLiveWorker):
        Dispatcher(fleet.registry).pick(wanted)
