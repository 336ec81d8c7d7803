"""What a worker says of itself: speed, stalls, and when to tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from fastchat_grpc.backends.base import Backend, BackendLoad
from fastchat_grpc.core import WorkerState
from fastchat_grpc.worker.generation import LocalGeneration
from fastchat_grpc.worker.monitor import Monitor


@dataclass
class Counts:
    """Stands for admission, generation and backend: what the monitor reads of them."""

    running: int = 0
    waiting: int = 0
    max_running: int = 8
    max_waiting: int = 8
    oldest_waiting_s: float | None = None
    output_tokens: int = 0
    processed: int = 0
    now: float = 100.0
    broken: bool = False
    told: int = 0
    urgent: int = 0
    unread: int = 0
    monitor: Monitor = field(init=False)

    def __post_init__(self) -> None:
        self.monitor = Monitor(
            cast(Backend, self), cast(LocalGeneration, self), 10.0, self._tell, clock=lambda: self.now
        )
        self.monitor.set_state(WorkerState.SERVING)
        self.told = self.urgent = 0

    @property
    def admission(self) -> Any:
        return self

    def load(self) -> BackendLoad:
        if self.broken:
            raise RuntimeError("the backend cannot say its load")
        return BackendLoad(max_running=8, processed_tokens=self.processed)

    @property
    def awaiting(self) -> int:
        return self.running - self.unread

    def _tell(self, urgent: bool) -> None:
        self.told += 1
        self.urgent += urgent

    def after(self, seconds: float, tokens: int = 0) -> None:
        self.now += seconds
        self.processed += tokens
        self.output_tokens += tokens
        self.monitor.sample()


def test_a_busy_engine_without_progress_degrades_the_worker_until_it_moves() -> None:
    counts = Counts(running=1)
    counts.after(9)
    assert counts.monitor.load().state is WorkerState.SERVING
    counts.after(2)
    assert counts.monitor.load().state is WorkerState.DEGRADED
    counts.after(1, tokens=1)
    assert counts.monitor.load().state is WorkerState.SERVING


def test_an_idle_engine_is_not_stalled_however_long_it_idles() -> None:
    counts = Counts()
    counts.after(1000)
    counts.running = 1
    counts.after(9)
    assert counts.monitor.load().state is WorkerState.SERVING


def test_the_time_that_loading_took_is_no_stall() -> None:
    counts = Counts()
    counts.monitor.set_state(WorkerState.STARTING)
    counts.now += 1000
    counts.monitor.set_state(WorkerState.SERVING)
    counts.running = 1
    counts.after(0.25)
    assert counts.monitor.load().state is WorkerState.SERVING


def test_a_draining_worker_stays_draining_when_it_stalls() -> None:
    counts = Counts(running=1)
    counts.monitor.set_state(WorkerState.DRAINING)
    counts.after(20)
    assert counts.monitor.load().state is WorkerState.DRAINING


def test_speed_follows_the_tokens_and_falls_when_they_end() -> None:
    counts = Counts(running=1)
    for _ in range(20):
        counts.after(1, tokens=50)
    assert 45 < counts.monitor.load().tokens_per_second <= 50
    for _ in range(20):
        counts.after(1)
    assert counts.monitor.load().tokens_per_second < 1


def test_controllers_are_told_early_of_a_great_change_and_only_then() -> None:
    counts = Counts()
    counts.monitor.load()
    counts.running = 1
    counts.after(0.25, tokens=1)
    assert counts.told == 0
    counts.running = 2
    counts.after(0.25, tokens=1)
    assert counts.told == 1
    counts.monitor.load()
    counts.after(0.25, tokens=1)
    assert counts.told == 1


def test_a_reader_that_does_not_read_stalls_nobody() -> None:
    counts = Counts(running=1, unread=1)
    counts.after(1000)
    assert counts.monitor.load().state is WorkerState.SERVING
    counts.running = 2
    counts.after(11)
    assert counts.monitor.load().state is WorkerState.DEGRADED, "one whose reader waits does"


def test_a_backend_that_cannot_say_its_load_degrades_the_worker_and_ends_nothing(caplog) -> None:
    counts = Counts(running=1, processed=7)
    counts.monitor.load()
    counts.broken = True
    for _ in range(10):
        counts.after(0.25)
        assert counts.monitor.load().state is WorkerState.DEGRADED
    assert len([record for record in caplog.records if "cannot say its load" in record.message]) == 1
    assert counts.urgent == 1, "controllers hear of it at once"
    counts.broken = False
    counts.after(0.25, tokens=1)
    assert counts.monitor.load().state is WorkerState.SERVING


def test_the_speed_of_a_worker_that_begins_to_drain_is_that_of_before() -> None:
    counts = Counts(running=1)
    for _ in range(20):
        counts.after(1, tokens=20)
    before = counts.monitor.load().tokens_per_second
    counts.monitor.set_state(WorkerState.DRAINING)
    for _ in range(3):
        counts.after(1, tokens=20)
    assert abs(counts.monitor.load().tokens_per_second - before) < 1


def test_a_small_worker_tells_that_it_is_full_and_that_it_has_room_but_not_each_request() -> None:
    counts = Counts(max_running=4)
    counts.monitor.load()
    told = []
    for running in (1, 0, 1, 0, 1, 2, 3, 4, 4, 3):
        counts.running = running
        before = counts.told
        counts.after(0.25, tokens=1)
        told.append(counts.told - before)
        if counts.told > before:
            counts.monitor.load()
    assert told == [0, 0, 0, 0, 0, 1, 0, 1, 0, 1]
    assert counts.urgent == 0, "the load alone is no reason to exceed the controller's rate"
