"""The ledger of one worker: what is counted, and what is forgotten when."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastchat_grpc.controller.ledger import Ledger, sane
from fastchat_grpc.core import Load
from fastchat_grpc.rpc import convert

INTERVAL_S = 2.0
BOUNDED = Load(max_running=4, max_waiting=2)


def ledger(load: Load = BOUNDED) -> Ledger:
    return Ledger(load, 1.0, 0.0)


class TestLeaks:
    def test_requests_whose_end_was_never_told_stop_counting_after_two_heartbeats(self) -> None:
        book = ledger()
        for _ in range(50):
            book.reserve(carried=False)
        for beat in range(1, 5):
            book.report(Load(running=1), beat * INTERVAL_S, INTERVAL_S)
        assert book.score == 1
        assert book.reserved == 1

    def test_requests_that_run_on_keep_counting(self) -> None:
        book = ledger()
        marks = [book.reserve(carried=False) for _ in range(5)]
        for beat in range(1, 9):
            book.report(Load(running=5), beat * INTERVAL_S, INTERVAL_S)
            assert (book.score, book.reserved) == (5, 5)
        for mark in marks:
            book.release(mark)
        assert (book.score, book.reserved) == (0, 0)

    def test_requests_that_the_controller_carries_count_whatever_the_worker_says(self) -> None:
        book = ledger()
        for _ in range(3):
            book.reserve(carried=True)
        for beat in range(1, 9):
            book.report(Load(), beat * INTERVAL_S, INTERVAL_S)
        assert book.score == 3

    def test_young_requests_count_though_the_worker_has_not_seen_them(self) -> None:
        book = ledger()
        book.report(Load(), INTERVAL_S, INTERVAL_S)
        book.reserve(carried=False)
        book.report(Load(), INTERVAL_S + 0.1, INTERVAL_S)
        assert book.score == 1

    def test_early_heartbeats_do_not_age_requests(self) -> None:
        book = ledger()
        book.reserve(carried=False)
        for beat in range(1, 20):
            book.report(Load(), beat * 0.1, INTERVAL_S)
        assert book.score == 1

    def test_an_end_that_is_told_late_does_no_harm(self) -> None:
        book = ledger()
        marks = [book.reserve(carried=False) for _ in range(3)]
        for beat in range(1, 5):
            book.report(Load(), beat * INTERVAL_S, INTERVAL_S)
        assert book.score == 0
        for mark in marks:
            book.release(mark)
        assert (book.score, book.reserved) == (0, 0)


class TestFull:
    def test_it_ends_by_itself(self) -> None:
        book = ledger()
        assert book.full(until=2.0)
        assert (book.score, book.room) == (6, 0)
        book.on_time(1.9)
        assert book.score == 6
        book.on_time(2.0)
        assert (book.score, book.room) == (0, 6)

    def test_it_ends_with_the_next_report(self) -> None:
        book = ledger()
        book.full(until=2.0)
        book.report(Load(running=1, max_running=4), 1.0, INTERVAL_S)
        assert (book.score, book.room) == (1, 3)

    def test_an_end_there_makes_room(self) -> None:
        book = ledger()
        mark = book.reserve(carried=True)
        book.full(until=2.0)
        assert book.room == 0
        book.release(mark)
        assert book.room == 1

    def test_a_worker_that_tells_no_bounds_is_passed_over_for_a_while(self) -> None:
        book = ledger(Load())
        assert book.room == 1
        assert book.full(until=2.0)
        assert (book.score, book.room) == (1, 0)
        book.on_time(2.0)
        assert (book.score, book.room) == (0, 1)


NUMBERS = st.integers(-(2**31), 2**31 - 1)
FLOATS = st.floats(allow_nan=True, allow_infinity=True)


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, FLOATS, FLOATS, st.integers(-(2**63), 2**63 - 1), st.none() | FLOATS)
def test_whatever_a_worker_reports_can_be_computed_with(
    running: int,
    waiting: int,
    max_running: int,
    max_waiting: int,
    usage: float,
    rate: float,
    free: int,
    age_s: float | None,
) -> None:
    load = sane(
        Load(
            running=running,
            waiting=waiting,
            max_running=max_running,
            max_waiting=max_waiting,
            kv_cache_usage=usage,
            tokens_per_second=rate,
            kv_free_tokens=free,
            oldest_waiting_s=age_s,
        )
    )
    assert load.running == max(0, running)
    assert load.waiting == max(0, waiting)
    assert load.max_running >= 0
    assert load.max_waiting >= 0
    assert 0 <= load.kv_cache_usage <= 1
    assert 0 <= load.tokens_per_second < math.inf
    assert load.kv_free_tokens >= 0
    assert load.oldest_waiting_s is None or load.oldest_waiting_s >= 0
    for told in (load, fleet_of(load)):
        assert convert.load_from_pb(convert.load_to_pb(told)).state is load.state, "a message holds it"


def fleet_of(load: Load) -> Load:
    """What a controller of a thousand such workers says of them all together."""
    return load._replace(
        running=1000 * load.running,
        waiting=1000 * load.waiting,
        max_running=1000 * load.max_running,
        max_waiting=1000 * load.max_waiting,
        kv_free_tokens=1000 * load.kv_free_tokens,
    )


def test_a_load_in_order_is_left_as_it_is() -> None:
    load = Load(running=3, kv_cache_usage=0.5, tokens_per_second=12.0, kv_free_tokens=7, oldest_waiting_s=0.5)
    assert sane(load) is load


class LedgerMachine(RuleBasedStateMachine):
    """Against a plain list of what was reserved."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.book = Ledger(Load(), 2.0, 0.0)
        self.open: list[tuple[int, float, bool]] = []  # mark, time, carried
        self.reported = 0

    @rule(carried=st.booleans())
    def reserve(self, carried: bool) -> None:
        self.open.append((self.book.reserve(carried=carried), self.now, carried))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.book.release(self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))[0])

    @rule(seconds=st.sampled_from((0.1, 2.0, 7.0)), queue=st.integers(0, 6))
    def report(self, seconds: float, queue: int) -> None:
        self.now += seconds
        self.book.report(Load(running=queue), self.now, INTERVAL_S)
        assert self.book.queue_length >= queue, "at least what the worker itself says"
        # Never below what certainly runs: what is carried, and what was sent within the last interval.
        certain = sum(1 for _, at, carried in self.open if carried or self.now - at < INTERVAL_S)
        assert self.book.queue_length >= certain
        # And all that is older than three intervals, and not carried, fits into the report.
        young = sum(1 for _, at, carried in self.open if carried or self.now - at < 3 * INTERVAL_S)
        if seconds == 7.0 and not young:
            assert self.book.queue_length <= max(queue, len(self.open))

    @invariant()
    def counts_are_never_negative(self) -> None:
        assert 0 <= self.book.reserved <= len(self.open)
        assert self.book.carried == sum(1 for _, _, carried in self.open if carried)
        assert self.book.reserved >= self.book.carried
        assert self.book.score == self.book.queue_length / 2.0


TestLedgerAgainstAList = LedgerMachine.TestCase


@pytest.mark.parametrize("weight", [0.5, 1.0, 4.0])
def test_weight_divides(weight: float) -> None:
    assert Ledger(Load(running=6), weight, 0.0).score == 6 / weight
