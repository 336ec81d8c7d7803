"""How often a registered server speaks, from what its controller asks for."""

from __future__ import annotations

import random

import pytest

from fastchat_grpc.rpc.pacing import JITTER, Pace, PushBudget


@pytest.mark.parametrize("scale", [0.5, 1, 5, 10, 50])
def test_a_heartbeat_that_is_lost_leaves_time_for_another_within_the_lease(scale):
    pace = Pace(2 * scale, 6 * scale)
    assert pace.interval_s * (1 + JITTER) + 2 * pace.call_timeout_s <= pace.time_to_live_s


@pytest.mark.parametrize(
    ("asked", "lease", "interval"),
    [(0, 0, 2), (0, 6, 2), (-1, 6, 2), (2, 0, 2), (6, 6, 2), (100, 6, 2), (0.001, 6, 0.05), (0.5, 6, 0.5)],
)
def test_an_answer_without_a_usable_interval_gets_a_sane_one(asked, lease, interval):
    assert Pace(asked, lease).interval_s == interval


def test_an_interval_that_would_lose_the_lease_is_lowered_to_the_controllers():
    pace = Pace(2, 6)
    assert pace.too_slow(45)  # FastChat's default
    assert pace.heartbeat_s(45) == 2
    assert pace.heartbeat_s(3) == 3
    assert pace.heartbeat_s(0.5) == 0.5
    assert pace.heartbeat_s(None) == 2
    assert Pace(45, 135).heartbeat_s(45) == 45


def test_a_small_fleet_is_back_at_once_and_a_large_one_without_a_stampede():
    """A controller takes some 2,000 registrations per second; intervals are those it asks a fleet of that size for."""
    assert Pace(2, 6).spread_s <= 0.25
    for size in (5_000, 10_000, 20_000, 100_000):
        interval = size / 1000
        pace = Pace(interval, 3 * interval)
        rng = random.Random(0)
        seconds = [int(rng.uniform(0, pace.spread_s)) for _ in range(size)]
        assert max(map(seconds.count, set(seconds))) <= 4100
        assert pace.spread_s <= interval, "no later than its next heartbeat"


def test_connections_come_back_no_faster_than_registrations():
    assert Pace(2, 6).reconnect_s <= 0.2
    assert Pace(20, 60).reconnect_s >= 5
    assert not Pace(2.2, 6.6).outgrown(Pace(2, 6))
    assert Pace(20, 60).outgrown(Pace())
    assert Pace(2, 6).outgrown(Pace(20, 60))


def test_early_heartbeats_at_most_double_the_rate():
    now = 0.0
    budget = PushBudget(lambda: now)
    pushed = 0
    for _ in range(10_000):
        now += 0.1
        pushed += budget.take(interval_s=10)
    assert pushed <= 10_000 * 0.1 / 10 + 4
    assert pushed >= 90


def test_a_few_early_heartbeats_may_come_at_once():
    now = 0.0
    budget = PushBudget(lambda: now)
    assert [budget.take(2) for _ in range(6)] == [True] * 4 + [False] * 2
    assert budget.wait_s(2) == pytest.approx(2)
    now = 2.0
    assert budget.wait_s(2) == 0
    assert budget.take(2)
