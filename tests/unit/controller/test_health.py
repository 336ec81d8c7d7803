"""The health of one worker: which report is ended by what."""

from __future__ import annotations

import math

import pytest

from fastchat_grpc.config import BreakerConfig
from fastchat_grpc.controller.health import REPORT_LIFETIME_S, Drain, Health, Tier
from fastchat_grpc.core import WorkerState

SERVING = WorkerState.SERVING


@pytest.fixture
def health() -> Health:
    return Health(SERVING, 0.0, BreakerConfig(min_failures=2, cooldown_s=2.0))


def test_a_report_that_nobody_repeats_ends_with_the_next_heartbeat(health: Health) -> None:
    health.lost_connection(10.0)
    assert health.tier is Tier.NONE
    health.heard(SERVING, 10.0 + REPORT_LIFETIME_S - 0.1)
    assert health.tier is Tier.NONE, "a heartbeat may have been under way when the connection broke"
    health.heard(SERVING, 10.0 + REPORT_LIFETIME_S + 0.1)
    assert health.tier is Tier.READY


def test_a_report_that_is_repeated_stands_whatever_the_worker_says(health: Health) -> None:
    for now in range(10, 20):
        health.lost_connection(float(now))
        health.heard(SERVING, now + 0.9)
    assert health.tier is Tier.NONE
    health.connected(20.0)
    assert health.tier is Tier.READY


def test_a_report_ends_with_the_watch_that_made_it(health: Health) -> None:
    health.lost_connection(10.0)
    assert health.unwatched()
    assert health.tier is Tier.READY
    assert health.recovered_at == 0.0, "that is no sign of life"


def test_what_counts_as_a_sign_of_life(health: Health) -> None:
    health.heard(SERVING, 1.0)
    assert health.recovered_at == 1.0
    health.lost_connection(2.0)
    health.suspected(math.inf)
    assert health.recovered_at == 1.0
    health.connected(3.0)
    assert health.recovered_at == 3.0


def test_reports_do_not_end_each_other(health: Health) -> None:
    health.suspected(math.inf)
    health.lost_connection(1.0)
    health.connected(2.0)
    assert health.tier is Tier.NONE, "still suspect"
    health.drain = Drain(None)
    health.heard(SERVING, 9.0)
    assert not health.recovering
    assert health.tier is Tier.NONE, "still to drain"


def test_only_the_probe_closes_a_half_open_breaker(health: Health) -> None:
    health.failed(0.0)
    assert health.failed(0.0) == 2.0
    health.on_time(2.0)
    assert health.tier is Tier.READY
    assert health.begin_probe(math.inf)
    assert not health.succeeded(2.5, probe=False), "a request of before the failures came to its end"
    assert health.tier is Tier.NONE
    assert health.succeeded(3.0, probe=True)
    assert health.tier is Tier.READY
    assert health.failed(3.0) is None, "closed: it takes several failures again"


def test_a_worker_that_fails_each_probe_is_left_alone_for_longer_each_time(health: Health) -> None:
    health.failed(0.0)
    due = health.failed(0.0)
    waits = []
    for _ in range(3):
        assert due is not None
        health.on_time(due)
        assert health.begin_probe(math.inf)
        again = health.failed(due)
        assert again is not None
        waits.append(again - due)
        due = again
    assert waits == [4.0, 8.0, 16.0]


def test_a_drain_that_is_taken_back_is_told_until_the_worker_serves_again() -> None:
    health = Health(WorkerState.SERVING, 0.0, BreakerConfig())
    health.drained(Drain(None))
    health.heard(WorkerState.DRAINING, 1.0)
    health.undrained()
    assert (health.tier, health.undrain) == (Tier.NONE, True), "it does not take work yet"
    health.heard(WorkerState.DRAINING, 2.0)
    assert health.undrain
    health.heard(WorkerState.SERVING, 3.0)
    assert (health.tier, health.undrain) == (Tier.READY, False)


def test_a_drain_that_is_taken_back_before_the_worker_hears_of_it_was_none() -> None:
    health = Health(WorkerState.SERVING, 0.0, BreakerConfig())
    health.drained(Drain(None))
    health.undrained()
    health.heard(WorkerState.SERVING, 1.0)
    assert (health.tier, health.undrain) == (Tier.READY, False)
