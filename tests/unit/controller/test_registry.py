"""Leases, instances, states and what they do to dispatch."""

from __future__ import annotations

import pytest

from fastchat_grpc.config import BreakerConfig, LeaseConfig
from fastchat_grpc.controller.fleet import Change, ChangeKind, Removal
from fastchat_grpc.controller.health import Tier
from fastchat_grpc.core import Load, WorkerState
from fastchat_grpc.errors import (
    InstanceReplaced,
    InvalidArgument,
    LeaseNotFound,
    ModelNotFound,
    NoLiveWorker,
    WorkerNotFound,
)
from tests.unit.controller.fleet import Fleet


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def ready(fleet: Fleet, model: str = "m") -> list[str]:
    return sorted(worker.spec.worker_id for worker in fleet.registry.pool(model)[1].tier(Tier.READY))


class TestLeases:
    def test_a_worker_expires_one_time_to_live_after_its_last_heartbeat(self, fleet: Fleet) -> None:
        worker = fleet.join()
        fleet.wait(5)
        fleet.registry.heartbeat(worker.lease_id, Load())
        fleet.wait(5.9)
        assert fleet.ids() == ["a"]
        fleet.wait(0.2)
        assert fleet.ids() == []
        assert worker.removed is Removal.EXPIRED

    def test_an_expired_lease_is_not_found(self, fleet: Fleet) -> None:
        worker = fleet.join()
        fleet.wait(7)
        with pytest.raises(LeaseNotFound):
            fleet.registry.heartbeat(worker.lease_id, Load())

    def test_a_worker_without_heartbeats_never_expires(self, fleet: Fleet) -> None:
        fleet.join(check_heartbeat=False)
        fleet.wait(1000)
        assert fleet.ids() == ["a"]

    def test_a_worker_may_change_its_mind_about_heartbeats(self, fleet: Fleet) -> None:
        fleet.join()
        fleet.join(check_heartbeat=False)
        fleet.wait(100)
        assert fleet.ids() == ["a"]
        fleet.join()
        fleet.wait(5.9)
        assert fleet.ids() == ["a"]
        fleet.wait(0.2)
        assert fleet.ids() == []

    def test_a_new_instance_replaces_the_old_at_once(self, fleet: Fleet) -> None:
        old = fleet.join(instance="one")
        new = fleet.join(instance="two")
        assert fleet.registry.workers() == [new]
        assert old.removed is Removal.REPLACED

    def test_a_late_heartbeat_of_the_old_instance_is_refused(self, fleet: Fleet) -> None:
        old = fleet.join(instance="one")
        fleet.join(instance="two")
        with pytest.raises(LeaseNotFound):
            fleet.registry.heartbeat(old.lease_id, Load())

    def test_a_replaced_instance_cannot_take_its_place_back(self, fleet: Fleet) -> None:
        fleet.join(instance="one")
        fleet.join(instance="two")
        with pytest.raises(InstanceReplaced, match="worker-id"):
            fleet.join(instance="one")

    def test_a_replaced_instance_may_return_when_its_successor_is_gone(self, fleet: Fleet) -> None:
        fleet.join(instance="one")
        new = fleet.join(instance="two")
        fleet.registry.deregister(new.lease_id)
        fleet.join(instance="one")
        assert fleet.ids() == ["a"]

    def test_the_same_instance_registers_again_and_keeps_its_reservations(self, fleet: Fleet) -> None:
        worker = fleet.join(models="m")
        before = worker.lease_id
        reservation = fleet.registry.reserve(worker)
        again = fleet.join(models="n")
        assert again is worker
        assert worker.lease_id != before
        assert worker.reserved_count == 1
        assert fleet.registry.models() == ["n"]
        reservation.release()
        assert worker.reserved_count == 0

    def test_deregistering_twice_is_no_error(self, fleet: Fleet) -> None:
        worker = fleet.join()
        fleet.registry.deregister(worker.lease_id)
        fleet.registry.deregister(worker.lease_id)
        assert fleet.ids() == []

    def test_intervals_grow_with_the_fleet_and_shrink_again(self) -> None:
        fleet = Fleet(LeaseConfig(time_to_live_s=6, heartbeat_interval_s=2, max_heartbeats_per_s=1))
        workers = [fleet.join(f"w{i}") for i in range(4)]
        assert workers[0].terms.heartbeat_interval_s == 2
        assert workers[3].terms.heartbeat_interval_s == 4
        assert workers[3].terms.time_to_live_s == 12
        for worker in workers[1:]:
            fleet.registry.deregister(worker.lease_id)
        fleet.registry.heartbeat(workers[0].lease_id, Load())
        assert workers[0].terms.heartbeat_interval_s == 2

    def test_a_lease_that_was_shortened_ends_at_its_new_end(self) -> None:
        fleet = Fleet(LeaseConfig(time_to_live_s=6, heartbeat_interval_s=2, max_heartbeats_per_s=0.1))
        first, second = fleet.join("a"), fleet.join("b")
        assert first.deadline < second.deadline
        fleet.registry.deregister(first.lease_id)
        fleet.registry.heartbeat(second.lease_id, Load())
        left = second.deadline - fleet.clock.now
        fleet.wait(left + 0.3)
        assert fleet.ids() == []

    def test_nobody_expires_for_a_pause_of_the_controller_itself(self, fleet: Fleet) -> None:
        worker = fleet.join()
        fleet.clock.now += 60  # stopped and continued: no look at the clock in between
        fleet.registry.expire()
        assert fleet.ids() == ["a"]
        fleet.registry.heartbeat(worker.lease_id, Load())
        fleet.wait(5)
        assert fleet.ids() == ["a"]

    def test_a_worker_that_died_in_such_a_pause_expires_soon_after(self, fleet: Fleet) -> None:
        fleet.join()
        fleet.clock.now += 60
        fleet.registry.expire()
        fleet.wait(3.5)
        assert fleet.ids() == []

    def test_one_timer_per_lease_however_many_heartbeats(self, fleet: Fleet) -> None:
        worker = fleet.join()
        for _ in range(200):
            fleet.wait(2)
            fleet.registry.heartbeat(worker.lease_id, Load())
        assert len(fleet.registry._timers) <= 2


class TestGrace:
    def test_nobody_expires_while_all_heartbeats_come_late(self) -> None:
        fleet = Fleet()
        workers = [fleet.join(f"w{i:02}") for i in range(15)]  # no storm
        for worker in workers[1:]:
            fleet.wait(0.4)
            fleet.registry.heartbeat(worker.lease_id, Load())  # sent long ago, read only now
        fleet.wait(0.6)
        assert "w00" in fleet.ids(), "its heartbeat waits like those of the others"
        fleet.wait(1.5)
        assert "w00" not in fleet.ids(), "but not for ever"

    def test_one_heartbeat_in_time_ends_the_grace(self) -> None:
        fleet = Fleet()
        workers = [fleet.join(f"w{i}") for i in range(10)]
        fleet.wait(5.9)
        for worker in workers[1:]:
            fleet.registry.heartbeat(worker.lease_id, Load())
        fleet.registry.heartbeat(workers[1].lease_id, Load())
        fleet.wait(0.2)
        assert "w0" not in fleet.ids()

    def test_the_grace_of_a_fleet_that_never_stops_coming_ends(self) -> None:
        fleet = Fleet()
        fleet.join("dead")
        for i in range(30 * 15):
            fleet.join(f"w{i}", check_heartbeat=False)
            fleet.wait(1 / 15)
        assert "dead" not in fleet.ids()


class TestModels:
    def test_an_unknown_model_is_not_found(self, fleet: Fleet) -> None:
        fleet.join()
        with pytest.raises(ModelNotFound):
            fleet.registry.pool("other")

    def test_a_known_model_without_a_worker_is_unavailable(self, fleet: Fleet) -> None:
        fleet.join("b", models="other")
        worker = fleet.join()
        fleet.registry.deregister(worker.lease_id)
        with pytest.raises(NoLiveWorker):
            fleet.registry.pool("m")

    def test_an_empty_name_means_the_only_model(self, fleet: Fleet) -> None:
        fleet.join("a")
        assert fleet.registry.pool("")[0] == "m"
        fleet.join("b", "n")
        with pytest.raises(InvalidArgument, match="2 models"):
            fleet.registry.pool("")

    def test_an_empty_name_in_an_empty_fleet_is_unavailable(self, fleet: Fleet) -> None:
        with pytest.raises(NoLiveWorker):
            fleet.registry.pool("")

    def test_workers_are_listed_by_id_and_by_model(self, fleet: Fleet) -> None:
        fleet.join("b", "m,n")
        fleet.join("a", "m")
        assert fleet.ids() == ["a", "b"]
        assert fleet.ids("n") == ["b"]
        assert fleet.ids("x") == []
        assert fleet.registry.models() == ["m", "n"]

    def test_equal_descriptions_are_held_once(self, fleet: Fleet) -> None:
        assert fleet.join("a").spec.models[0] is fleet.join("b").spec.models[0]


class TestTiers:
    @pytest.mark.parametrize(
        ("state", "tier"),
        [
            (WorkerState.STARTING, Tier.NONE),
            (WorkerState.SERVING, Tier.READY),
            (WorkerState.DEGRADED, Tier.DEGRADED),
            (WorkerState.DRAINING, Tier.NONE),
        ],
    )
    def test_a_state_decides_the_tier(self, fleet: Fleet, state: WorkerState, tier: Tier) -> None:
        worker = fleet.join()
        fleet.registry.heartbeat(worker.lease_id, Load(state=state))
        assert worker.tier is tier

    def test_a_suspect_is_not_ready_until_its_next_heartbeat(self, fleet: Fleet) -> None:
        worker = fleet.join()
        fleet.registry.suspect(worker)
        assert ready(fleet) == []
        assert fleet.registry.recovering("m")
        fleet.registry.heartbeat(worker.lease_id, Load())
        assert ready(fleet) == ["a"]
        assert not fleet.registry.recovering("m")

    def test_a_suspect_without_heartbeats_is_tried_again_after_a_while(self, fleet: Fleet) -> None:
        worker = fleet.join(check_heartbeat=False)
        fleet.registry.suspect(worker)
        fleet.wait(5)
        assert ready(fleet) == []
        fleet.wait(2)
        assert ready(fleet) == ["a"]

    def test_an_unreachable_worker_is_not_ready_whatever_it_says(self, fleet: Fleet) -> None:
        worker = fleet.join()
        fleet.registry.set_reachable(worker, False)
        fleet.registry.heartbeat(worker.lease_id, Load())
        assert ready(fleet) == []
        fleet.registry.set_reachable(worker, True)
        assert ready(fleet) == ["a"]

    def test_an_unreachable_worker_that_nobody_watches_is_ready_after_its_heartbeat(self, fleet: Fleet) -> None:
        worker = fleet.join()
        fleet.registry.set_reachable(worker, False)
        fleet.wait(2)
        fleet.registry.heartbeat(worker.lease_id, Load())
        assert ready(fleet) == ["a"]

    def test_an_unreachable_worker_is_tried_again_when_its_watch_ends(self, fleet: Fleet) -> None:
        worker = fleet.join(check_heartbeat=False)
        fleet.registry.set_reachable(worker, False)
        fleet.registry.set_reachable(worker, None)
        assert ready(fleet) == ["a"]

    def test_a_drained_worker_takes_nothing_new_and_keeps_its_lease(self, fleet: Fleet) -> None:
        worker = fleet.join()
        fleet.registry.drain("a", 3.0)
        assert ready(fleet) == []
        assert fleet.registry.heartbeat(worker.lease_id, Load()).health.drain is not None
        assert fleet.ids() == ["a"]

    def test_a_new_instance_of_a_drained_worker_is_ready(self, fleet: Fleet) -> None:
        fleet.join(instance="one")
        fleet.registry.drain("a", None)
        fleet.join(instance="two")
        assert ready(fleet) == ["a"]

    def test_draining_an_unknown_worker_is_not_found(self, fleet: Fleet) -> None:
        with pytest.raises(WorkerNotFound):
            fleet.registry.drain("nobody", None)


class TestBreaker:
    @pytest.fixture
    def fleet(self) -> Fleet:
        return Fleet(breaker=BreakerConfig(min_failures=2, cooldown_s=2))

    def test_failures_take_a_worker_out_and_time_lets_one_probe_in(self, fleet: Fleet) -> None:
        worker = fleet.join(check_heartbeat=False)
        fleet.registry.failed(worker)
        assert ready(fleet) == ["a"]
        fleet.registry.failed(worker)
        assert ready(fleet) == []
        fleet.wait(2)
        assert ready(fleet) == ["a"]
        probe = fleet.registry.reserve(worker)
        assert ready(fleet) == [], "one probe at a time"
        probe.succeeded()
        assert ready(fleet) == ["a"]

    def test_one_broken_connection_is_one_failure_however_many_requests_it_cost(self, fleet: Fleet) -> None:
        worker = fleet.join()
        for _ in range(20):
            fleet.registry.lost(worker)
        assert ready(fleet) == []
        fleet.registry.heartbeat(worker.lease_id, Load())
        assert ready(fleet) == ["a"]
        fleet.registry.lost(worker)
        fleet.registry.heartbeat(worker.lease_id, Load())
        assert ready(fleet) == [], "it breaks again and again"

    def test_a_failed_probe_takes_it_out_again(self, fleet: Fleet) -> None:
        worker = fleet.join(check_heartbeat=False)
        fleet.registry.failed(worker)
        fleet.registry.failed(worker)
        fleet.wait(2)
        probe = fleet.registry.reserve(worker)
        probe.failed()
        probe.release()
        assert ready(fleet) == []
        fleet.wait(2)
        assert ready(fleet) == []
        fleet.wait(2)
        assert ready(fleet) == ["a"]

    def test_a_probe_without_a_verdict_gives_its_place_to_another(self, fleet: Fleet) -> None:
        worker = fleet.join(check_heartbeat=False)
        fleet.registry.failed(worker)
        fleet.registry.failed(worker)
        fleet.wait(2)
        fleet.registry.reserve(worker).release()
        assert ready(fleet) == ["a"]

    def test_a_probe_that_takes_long_does_not_keep_others_out_for_long(self, fleet: Fleet) -> None:
        worker = fleet.join(check_heartbeat=False)
        fleet.registry.failed(worker)
        fleet.registry.failed(worker)
        fleet.wait(2)
        long = fleet.registry.reserve(worker)
        assert ready(fleet) == []
        fleet.wait(2)
        assert ready(fleet) == ["a"]
        short = fleet.registry.reserve(worker)
        assert ready(fleet) == []
        short.succeeded()
        short.release()
        assert ready(fleet) == ["a"]
        long.release()
        assert ready(fleet) == ["a"]

    def test_a_request_of_before_that_ends_well_does_not_close_it(self, fleet: Fleet) -> None:
        worker = fleet.join(check_heartbeat=False)
        old = fleet.registry.reserve(worker)
        fleet.registry.failed(worker)
        fleet.registry.failed(worker)
        fleet.wait(2)
        probe = fleet.registry.reserve(worker)
        old.succeeded()
        old.release()
        assert ready(fleet) == [], "the probe has not ended"
        probe.failed()
        probe.release()
        fleet.wait(2)
        assert ready(fleet) == [], "twice the time"

    def test_heartbeats_do_not_close_it(self, fleet: Fleet) -> None:
        worker = fleet.join()
        fleet.registry.failed(worker)
        fleet.registry.failed(worker)
        fleet.registry.heartbeat(worker.lease_id, Load())
        assert ready(fleet) == []


class TestLoad:
    def test_reservations_count_until_released_and_twice_is_harmless(self, fleet: Fleet) -> None:
        worker = fleet.join()
        reservation = fleet.registry.reserve(worker)
        assert (worker.score, worker.reserved_count) == (1, 1)
        reservation.release()
        reservation.release()
        assert (worker.score, worker.reserved_count) == (0, 0)

    def test_own_requests_in_a_report_are_not_counted_twice(self, fleet: Fleet) -> None:
        worker = fleet.join()
        reservations = [fleet.registry.reserve(worker) for _ in range(3)]
        fleet.registry.heartbeat(worker.lease_id, Load(running=4, waiting=1))
        assert worker.score == 5
        reservations[0].release()
        assert worker.score == 4

    def test_weight_divides_the_queue(self, fleet: Fleet) -> None:
        worker = fleet.join(weight=4.0, load=Load(running=6))
        assert worker.score == 1.5

    def test_a_full_worker_without_heartbeats_is_picked_again_after_an_interval(self, fleet: Fleet) -> None:
        worker = fleet.join(check_heartbeat=False, load=Load(max_running=4, max_waiting=2))
        fleet.join("b", load=Load(running=3))
        fleet.registry.full(worker)
        assert worker.score == 6
        fleet.wait(2)
        assert worker.score == 0

    def test_figures_that_make_no_sense_do_not_draw_requests(self, fleet: Fleet) -> None:
        worker = fleet.join(load=Load(running=-1000, max_running=-4))
        assert (worker.score, worker.load.running) == (0, 0)
        fleet.registry.heartbeat(worker.lease_id, Load(waiting=-1000, kv_cache_usage=float("nan")))
        assert (worker.score, worker.load.waiting, worker.load.kv_cache_usage) == (0, 0, 0)

    def test_requests_of_a_gateway_whose_end_was_lost_are_forgotten_after_two_heartbeats(self, fleet: Fleet) -> None:
        worker = fleet.join()
        for _ in range(100):
            fleet.registry.reserve(worker)
        carried = fleet.registry.reserve(worker, lambda: None)
        for _ in range(4):
            fleet.wait(2)
            fleet.registry.heartbeat(worker.lease_id, Load(running=1))
        assert (worker.score, worker.reserved_count) == (1, 1)
        carried.release()
        assert worker.score == 0

    def test_a_full_worker_counts_as_full_until_its_next_heartbeat(self, fleet: Fleet) -> None:
        worker = fleet.join(load=Load(max_running=4, max_waiting=2))
        fleet.registry.full(worker)
        assert worker.score == 6
        fleet.registry.heartbeat(worker.lease_id, Load(running=1))
        assert worker.score == 1


class TestTrouble:
    def reserve(self, fleet: Fleet) -> list[str]:
        """Reserve on worker a; the list tells whether trouble came."""
        heard: list[str] = []
        fleet.registry.reserve(fleet.registry.worker("a"), lambda: heard.append("trouble"))
        return heard

    def test_expiry_tells_those_who_run_there(self, fleet: Fleet) -> None:
        fleet.join()
        heard = self.reserve(fleet)
        fleet.wait(7)
        assert heard == ["trouble"]

    def test_replacement_tells_those_who_run_there(self, fleet: Fleet) -> None:
        fleet.join(instance="one")
        heard = self.reserve(fleet)
        fleet.join(instance="two")
        assert heard == ["trouble"]

    def test_a_worker_that_says_it_makes_no_progress_tells_them_once(self, fleet: Fleet) -> None:
        worker = fleet.join()
        heard = self.reserve(fleet)
        for _ in range(2):
            fleet.registry.heartbeat(worker.lease_id, Load(state=WorkerState.DEGRADED))
        assert heard == ["trouble"]

    def test_leaving_in_good_order_lets_them_go_on(self, fleet: Fleet) -> None:
        worker = fleet.join()
        heard = self.reserve(fleet)
        fleet.registry.deregister(worker.lease_id)
        assert heard == []

    def test_nobody_is_told_after_release(self, fleet: Fleet) -> None:
        fleet.join()
        heard: list[str] = []
        fleet.registry.reserve(fleet.registry.worker("a"), lambda: heard.append("trouble")).release()
        fleet.wait(7)
        assert heard == []


def test_listeners_hear_every_change_in_order_until_they_leave(fleet: Fleet) -> None:
    heard: list[tuple[ChangeKind, Removal | None]] = []
    leave = fleet.registry.subscribe(lambda change: heard.append((change.kind, change.removal)))
    worker = fleet.join()
    fleet.registry.heartbeat(worker.lease_id, Load(running=1))
    fleet.registry.heartbeat(worker.lease_id, Load(state=WorkerState.DRAINING))
    fleet.registry.deregister(worker.lease_id)
    leave()
    fleet.join()
    assert heard == [
        (ChangeKind.ADDED, None),
        (ChangeKind.LOAD, None),
        (ChangeKind.STATE, None),
        (ChangeKind.REMOVED, Removal.DEREGISTERED),
    ]


def test_a_change_holds_the_worker_that_changed(fleet: Fleet) -> None:
    heard: list[Change] = []
    fleet.registry.subscribe(heard.append)
    worker = fleet.join()
    assert heard[0].worker is worker
