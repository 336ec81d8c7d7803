"""A controller that restarts under a large fleet, simulated with the real registry (see tools/bench/restart.py)."""

from __future__ import annotations

import pytest

from tools.bench.restart import Simulation


@pytest.mark.parametrize("seed", [1, 2])
def test_no_worker_that_lives_expires_when_a_large_fleet_comes_back_at_once(seed: int) -> None:
    # 20,000 workers at a fifth of the size: calls cost five times as much, a fifth of the rate is allowed.
    outcome = Simulation(4000, slowness=5, max_heartbeats_per_s=200, seed=seed).run(60)
    assert outcome.longest_queue_s > 5, "else this tests nothing"
    assert outcome.false_expiries == 0
    assert outcome.all_known_s is not None
    assert outcome.all_known_s < 10
    assert outcome.expired_after_death_s is not None
    assert outcome.expired_after_death_s < 62, "who is dead is still missed, after one time to live"


def test_no_heartbeat_is_missed_that_waits_behind_the_registrations_of_others() -> None:
    # Too few workers to be given longer leases, and a controller that takes 7.5 s to let them all in: whoever came
    # first would be missed while its heartbeats wait for that, were it not for the grace of a storm.
    outcome = Simulation(375, register_s=0.02).run(60)
    assert outcome.longest_queue_s > 6
    assert outcome.false_expiries == 0
    assert outcome.expired_after_death_s is not None
    assert outcome.expired_after_death_s < 6.3


def test_a_controller_that_is_slower_than_usual_expires_nobody_either() -> None:
    outcome = Simulation(1000, slowness=40, max_heartbeats_per_s=50).run(90)
    assert outcome.longest_queue_s > 12
    assert outcome.false_expiries == 0
