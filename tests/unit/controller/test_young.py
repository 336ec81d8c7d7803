"""A registry that has just begun: what it lacks may yet come."""

from __future__ import annotations

import pytest

from fastchat_grpc.config import LeaseConfig
from fastchat_grpc.errors import Code, ModelNotFound, NoLiveWorker, Starting, WorkerNotFound
from tests.unit.controller.fleet import Fleet


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(young=True)


@pytest.mark.parametrize("model", ["m", ""])
def test_what_a_young_registry_does_not_know_may_come_yet(fleet: Fleet, model: str) -> None:
    with pytest.raises(Starting) as caught:
        fleet.registry.pool(model)
    assert caught.value.code is Code.UNAVAILABLE
    assert caught.value.retry_after_s


def test_nor_does_it_say_of_a_worker_that_it_is_not_there(fleet: Fleet) -> None:
    for call in (fleet.registry.worker, fleet.registry.undrain, lambda name: fleet.registry.drain(name, None)):
        with pytest.raises(Starting):
            call("w")
    fleet.wait(4)
    with pytest.raises(WorkerNotFound):
        fleet.registry.worker("w")


def test_what_it_knows_is_served_at_once(fleet: Fleet) -> None:
    fleet.join()
    assert fleet.registry.pool("m")[0] == "m"
    assert fleet.registry.pool("")[0] == "m"


def test_after_two_intervals_nobody_waits_for_what_it_does_not_know(fleet: Fleet) -> None:
    fleet.wait(3.9)
    assert not fleet.registry.settled
    fleet.wait(0.1)
    assert fleet.registry.settled
    with pytest.raises(NoLiveWorker):
        fleet.registry.pool("m")


def test_what_is_not_there_after_ten_leases_does_not_exist(fleet: Fleet) -> None:
    """A model that is away when its controller restarts is none that never was: it may take a minute to load."""
    fleet.join(models="other")
    for _ in range(59):
        fleet.wait(1.0)
        fleet.join(models="other")
        with pytest.raises((Starting, NoLiveWorker)):
            fleet.registry.pool("m")
    fleet.wait(1.0)
    with pytest.raises(ModelNotFound):
        fleet.registry.pool("m")


def test_a_fleet_that_is_whole_waits_for_nobody() -> None:
    fleet = Fleet(LeaseConfig(expect_workers=2), young=True)
    fleet.join("a")
    with pytest.raises(Starting):
        fleet.registry.pool("unknown")
    fleet.join("b")
    with pytest.raises(ModelNotFound):
        fleet.registry.pool("unknown")


def test_a_fleet_whose_workers_are_named_is_not_whole_with_as_many_others() -> None:
    fleet = Fleet(LeaseConfig(expect_worker_ids=("a", "b")), young=True)
    for worker_id in ("x", "y", "z", "a"):
        fleet.join(worker_id)
        with pytest.raises(Starting):
            fleet.registry.pool("unknown")
    fleet.join("b")
    with pytest.raises(ModelNotFound):
        fleet.registry.pool("unknown")


def test_a_registry_without_workers_says_of_no_model_that_it_does_not_exist(fleet: Fleet) -> None:
    fleet.wait(1000)
    with pytest.raises(NoLiveWorker):
        fleet.registry.pool("m")


def test_a_model_whose_workers_left_is_unavailable_young_or_not(fleet: Fleet) -> None:
    fleet.registry.deregister(fleet.join().lease_id)
    for _ in range(2):
        with pytest.raises(NoLiveWorker):
            fleet.registry.pool("m")
        fleet.registry.settle()


def test_it_wants_requests_once_it_has_workers_and_no_more_come_just_now(fleet: Fleet) -> None:
    assert not fleet.registry.serving
    for worker_id in "abc":
        fleet.join(worker_id)
        fleet.wait(0.08)
        assert not fleet.registry.serving
    fleet.wait(0.03)
    assert fleet.registry.serving
    assert not fleet.registry.settled


def test_a_registry_without_workers_wants_requests_when_it_has_settled(fleet: Fleet) -> None:
    fleet.wait(4)
    assert fleet.registry.serving


def test_names_of_a_large_fleet_that_has_gone_are_remembered() -> None:
    fleet = Fleet(LeaseConfig())
    count = 10_100
    workers = [fleet.join(f"w{i}", ",".join(f"m{i}-{j}" for j in range(100))) for i in range(count // 100)]
    for worker in workers:
        fleet.registry.deregister(worker.lease_id)
    for name in ("m0-0", "m100-99"):
        with pytest.raises(NoLiveWorker):
            fleet.registry.pool(name)
