"""Background tasks under supervision: what is started again, what is said, and what health says."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest

from fastchat_grpc.rpc.supervise import Backoff, ErrorLog, Restarts, Supervisor

QUICK = Backoff(first_s=0.001, most_s=0.002, steady_s=0.05, failing_after=3)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_delays_double_up_to_the_most_and_half_of_each_is_random(clock):
    restarts = Restarts(Backoff(first_s=1, most_s=8, steady_s=60), clock, random.Random(0))
    delays = [restarts.fail() for _ in range(100)]
    for delay, full in zip(delays, [1, 2, 4, 8, *[8] * 96], strict=True):
        assert full / 2 <= delay <= full
    assert len({round(delay, 6) for delay in delays[3:]}) > 50


def test_a_long_run_ends_a_row_of_failures(clock):
    restarts = Restarts(Backoff(first_s=1, most_s=64, steady_s=60, failing_after=2), clock, random.Random(0))
    restarts.fail()
    restarts.fail()
    assert not restarts.healthy
    restarts.start()
    clock.now += 60
    assert restarts.fail() <= 1
    assert restarts.healthy


def test_a_run_that_is_too_short_does_not(clock):
    restarts = Restarts(Backoff(first_s=1, most_s=64, steady_s=60, failing_after=2), clock, random.Random(0))
    restarts.fail()
    restarts.start()
    clock.now += 59
    assert restarts.fail() > 0.5
    assert not restarts.healthy


def test_without_a_backoff_the_first_failure_is_the_last(clock):
    restarts = Restarts(None, clock)
    assert restarts.healthy
    assert restarts.fail() is None
    assert restarts.dead
    assert not restarts.healthy


def test_the_last_allowed_failure_is_death(clock):
    restarts = Restarts(Backoff(max_failures=2), clock)
    assert restarts.fail() is not None
    assert restarts.fail() is None
    assert restarts.dead


def _error(kind: type[Exception], message: str = "") -> Exception:
    try:
        raise kind(message)
    except Exception as error:
        return error


def test_an_error_is_reported_once_in_a_period_with_a_count_of_the_rest(clock):
    log = ErrorLog(10, clock)
    assert log.report("a", _error(ValueError, "1")) == 0
    assert [log.report("a", _error(ValueError, str(i))) for i in range(5)] == [None] * 5
    assert log.report("a", _error(KeyError)) == 0, "another type is another error"
    assert log.report("b", _error(ValueError)) == 0, "another task, too"
    clock.now += 10
    assert log.report("a", _error(ValueError)) == 5


def test_errors_that_all_differ_are_bounded(clock):
    log = ErrorLog(10, clock)
    for number in range(1000):
        log.report(f"task {number}", _error(ValueError))
    assert len(log._seen) <= 64


async def test_a_task_that_fails_is_started_again_and_its_traceback_is_in_the_log(caplog):
    runs, done = 0, asyncio.Event()

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise RuntimeError("a fault of the test")
        done.set()

    supervisor = Supervisor()
    supervisor.spawn("the work", work, restart=QUICK)
    await asyncio.wait_for(done.wait(), 10)
    await supervisor.close()
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1, "the same error twice is reported once"
    assert "the work failed" in errors[0].getMessage()
    assert "a fault of the test" in caplog.text
    assert "in work" in caplog.text


async def test_one_task_that_fails_leaves_the_others_alone():
    beats = 0
    enough = asyncio.Event()

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            if beats > 20:
                enough.set()
            await asyncio.sleep(0.001)

    async def fail() -> None:
        raise UnicodeError("label empty")

    supervisor = Supervisor()
    beating = supervisor.spawn("beat", beat)
    supervisor.spawn("fail", fail, restart=QUICK)
    supervisor.spawn("fail once", fail, restart=None)
    await asyncio.wait_for(enough.wait(), 10)
    assert beating.running
    assert beating.restarts.failures == 0
    await supervisor.close()


async def test_health_follows_a_task_that_fails_again_and_again_and_recovers(caplog):
    caplog.set_level(logging.INFO)
    told: asyncio.Queue[bool] = asyncio.Queue()
    broken = True

    async def work() -> None:
        if broken:
            raise RuntimeError
        await asyncio.Event().wait()

    supervisor = Supervisor(told.put)
    supervisor.spawn("work", work, restart=QUICK)
    assert await asyncio.wait_for(told.get(), 10) is False
    assert not supervisor.healthy
    assert supervisor.unhealthy == ["work"]
    broken = False
    assert await asyncio.wait_for(told.get(), 10) is True
    assert supervisor.healthy
    assert "work works again" in caplog.text
    await supervisor.close()
    assert told.empty()


async def test_a_single_failure_does_not_change_health():
    told: list[bool] = []
    second = asyncio.Event()

    async def tell(healthy: bool) -> None:
        told.append(healthy)

    failed = False

    async def work() -> None:
        nonlocal failed
        if not failed:
            failed = True
            raise RuntimeError
        second.set()
        await asyncio.Event().wait()

    supervisor = Supervisor(tell)
    supervisor.spawn("work", work, restart=QUICK)
    await asyncio.wait_for(second.wait(), 10)
    assert told == []
    await supervisor.close()


async def test_a_task_that_stays_dead_is_told_of_and_stays_unhealthy():
    deaths: list[BaseException] = []
    told: asyncio.Queue[bool] = asyncio.Queue()

    async def work() -> None:
        raise OSError("gone")

    supervisor = Supervisor(told.put)
    task = supervisor.spawn("work", work, restart=None, on_death=deaths.append)
    await asyncio.wait_for(task.ended(), 10)
    assert [str(error) for error in deaths] == ["gone"]
    assert await told.get() is False
    assert supervisor.unhealthy == ["work"]
    assert not task.running
    await supervisor.close()


async def test_health_that_cannot_be_told_harms_nobody(caplog):
    async def tell(healthy: bool) -> None:
        raise ConnectionError("no server")

    runs = 0
    enough = asyncio.Event()

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs > 6:
            enough.set()
        raise RuntimeError

    supervisor = Supervisor(tell)
    supervisor.spawn("work", work, restart=QUICK)
    await asyncio.wait_for(enough.wait(), 10)
    assert "health could not be told" in caplog.text
    await supervisor.close()


async def test_a_cancelled_call_inside_a_task_is_a_failure_and_not_its_end():
    """grpc raises CancelledError to whoever awaits a call that was cancelled, as when its channel closes."""
    runs, again = 0, asyncio.Event()

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise asyncio.CancelledError
        again.set()
        await asyncio.Event().wait()

    supervisor = Supervisor()
    supervisor.spawn("work", work, restart=QUICK)
    await asyncio.wait_for(again.wait(), 10)
    await supervisor.close()


async def test_closing_ends_every_task_and_waits_for_its_farewell():
    farewells = 0
    started = asyncio.Event()

    async def work() -> None:
        nonlocal farewells
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            farewells += 1

    supervisor = Supervisor()
    tasks = [supervisor.spawn(f"work {number}", work) for number in range(3)]
    await started.wait()
    await supervisor.close()
    assert farewells == 3
    assert not any(task.running for task in tasks)
    await supervisor.close()
    late = supervisor.spawn("late", work)
    assert not late.running
    await late.ended()


async def test_closing_that_is_cancelled_has_cancelled_every_task():
    started, release = asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            await release.wait()

    supervisor = Supervisor()
    task = supervisor.spawn("stubborn", stubborn)
    await started.wait()
    closing = asyncio.create_task(supervisor.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    release.set()
    await asyncio.wait_for(task.ended(), 10)


async def test_a_task_that_will_not_end_is_named(caplog):
    started, release = asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            await release.wait()

    supervisor = Supervisor()
    task = supervisor.spawn("the stubborn one", stubborn)
    await started.wait()
    await supervisor.close(timeout_s=0.01)
    assert "the stubborn one has not ended" in caplog.text
    release.set()
    await task.ended()


async def test_cancelling_one_task_ends_it_alone():
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        await asyncio.Event().wait()

    supervisor = Supervisor()
    one, other = supervisor.spawn("one", work), supervisor.spawn("other", work)
    await started.wait()
    one.cancel()
    await asyncio.wait_for(one.ended(), 10)
    assert other.running
    assert supervisor.healthy
    await supervisor.close()


async def test_a_successor_of_the_same_name_takes_the_place_of_the_dead():
    async def fail() -> None:
        raise RuntimeError

    async def work() -> None:
        await asyncio.Event().wait()

    supervisor = Supervisor()
    await supervisor.spawn("work", fail, restart=None).ended()
    assert not supervisor.healthy
    supervisor.spawn("work", work)
    assert supervisor.healthy
    await supervisor.close()
