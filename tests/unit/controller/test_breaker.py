"""The breaker of one worker."""

from __future__ import annotations

from fastchat_grpc.config import BreakerConfig
from fastchat_grpc.controller.breaker import MAX_OUTCOMES, Breaker, BreakerState

CONFIG = BreakerConfig(window_s=10, min_failures=3, failure_ratio=0.5, cooldown_s=2, max_cooldown_s=5)


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker(CONFIG)
    for _ in range(3):
        breaker.failure(now)
    assert breaker.state is BreakerState.OPEN
    return breaker


def test_it_opens_after_enough_failures_in_the_window() -> None:
    breaker = Breaker(CONFIG)
    breaker.failure(0)
    breaker.failure(1)
    assert breaker.state is BreakerState.CLOSED
    breaker.failure(2)
    assert breaker.state is BreakerState.OPEN
    assert breaker.ready_at == 4


def test_failures_that_left_the_window_do_not_count() -> None:
    breaker = Breaker(CONFIG)
    breaker.failure(0)
    breaker.failure(1)
    breaker.failure(10.5)
    assert breaker.state is BreakerState.CLOSED
    breaker.failure(10.9)
    assert breaker.state is BreakerState.OPEN


def test_a_small_share_of_failures_leaves_it_closed() -> None:
    breaker = Breaker(CONFIG)
    for i in range(40):
        breaker.success(i / 10)
        if i % 4 == 0:
            breaker.failure(i / 10)
    assert breaker.state is BreakerState.CLOSED


def test_a_good_probe_closes_it() -> None:
    breaker = opened()
    breaker.half_open()
    breaker.success(2)
    assert breaker.state is BreakerState.CLOSED
    breaker.failure(2)
    breaker.failure(2)
    assert breaker.state is BreakerState.CLOSED, "the failures of before are forgotten"


def test_a_bad_probe_opens_it_for_twice_the_time_up_to_the_limit() -> None:
    breaker = opened()
    for cooldown in (4, 5, 5):
        breaker.half_open()
        breaker.failure(100)
        assert breaker.state is BreakerState.OPEN
        assert breaker.ready_at == 100 + cooldown


def test_late_outcomes_of_older_calls_do_not_move_an_open_breaker() -> None:
    breaker = opened()
    breaker.success(1)
    breaker.failure(1)
    assert breaker.state is BreakerState.OPEN
    assert breaker.ready_at == 2


def test_the_window_is_bounded_in_memory() -> None:
    breaker = Breaker(CONFIG)
    for i in range(10 * MAX_OUTCOMES):
        breaker.success(i / 1000)
    assert len(breaker._outcomes) <= MAX_OUTCOMES
