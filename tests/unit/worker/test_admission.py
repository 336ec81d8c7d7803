"""Slots and the queue in front of them."""

from __future__ import annotations

import asyncio
import random

import pytest

from fastchat_grpc.errors import Draining, QueueFull
from fastchat_grpc.worker.admission import Admission


class Holder:
    """A task that holds a slot until released."""

    def __init__(self, admission: Admission, priority: int = 0, *, weight: int = 1, resumed: bool = False) -> None:
        self.inside = False
        self._release = asyncio.Event()
        self.task = asyncio.create_task(self._hold(admission, priority, weight, resumed))

    async def _hold(self, admission: Admission, priority: int, weight: int, resumed: bool) -> None:
        async with admission.slot(priority, weight=weight, resumed=resumed):
            self.inside = True
            await self._release.wait()

    async def end(self) -> None:
        self._release.set()
        await self.task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_requests_beyond_the_slots_wait_their_turn() -> None:
    admission = Admission(max_running=1, max_waiting=2)
    first, second, third = (Holder(admission) for _ in range(3))
    await settle()
    assert [h.inside for h in (first, second, third)] == [True, False, False]
    assert (admission.running, admission.waiting) == (1, 2)
    await first.end()
    await settle()
    assert [second.inside, third.inside] == [True, False]
    await second.end()
    await third.end()
    assert (admission.running, admission.waiting) == (0, 0)


async def test_a_full_queue_refuses_at_once_and_says_when_to_retry() -> None:
    admission = Admission(max_running=1, max_waiting=0)
    holder = Holder(admission)
    await settle()
    with pytest.raises(QueueFull, match="all 1 slots are taken") as caught:
        async with admission.slot():
            pytest.fail("entered")
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0
    await holder.end()


async def test_lower_priority_numbers_run_first_and_equals_in_order() -> None:
    admission = Admission(max_running=1, max_waiting=9)
    running = Holder(admission)
    await settle()
    waiting = [Holder(admission, priority) for priority in (5, 0, 5, -1)]
    await settle()
    order = []
    current = running
    for _ in waiting:
        await current.end()
        await settle()
        current = next(h for h in waiting if h.inside and h not in order)
        order.append(current)
    assert [waiting.index(h) for h in order] == [3, 1, 0, 2]
    await current.end()


async def test_a_cancelled_waiter_leaves_the_queue() -> None:
    admission = Admission(max_running=1, max_waiting=1)
    running, waiting = Holder(admission), Holder(admission)
    await settle()
    waiting.task.cancel()
    await settle()
    assert admission.waiting == 0
    await running.end()
    assert admission.running == 0


async def test_a_slot_that_meets_a_cancel_is_passed_on() -> None:
    admission = Admission(max_running=1, max_waiting=2)
    running, cancelled, last = Holder(admission), Holder(admission), Holder(admission)
    await settle()
    running._release.set()
    await running.task  # hands the slot to `cancelled`, which has not run yet
    cancelled.task.cancel()
    await settle()
    assert last.inside
    await last.end()
    assert (admission.running, admission.waiting) == (0, 0)


async def test_closing_refuses_new_requests_and_lets_the_rest_end() -> None:
    admission = Admission(max_running=1, max_waiting=1)
    running, waiting = Holder(admission), Holder(admission)
    await settle()
    admission.close()
    with pytest.raises(Draining):
        async with admission.slot():
            pytest.fail("entered")
    await running.end()
    await waiting.end()
    await asyncio.wait_for(admission.idle(), 1)


async def test_no_slot_leaks_under_random_cancels_and_errors() -> None:
    rng = random.Random(7)
    admission = Admission(max_running=3, max_waiting=10)

    async def use() -> None:
        async with admission.slot(rng.randint(0, 2), weight=rng.randint(1, 4), resumed=rng.random() < 0.2):
            for _ in range(rng.randint(0, 5)):
                await asyncio.sleep(0)
            if rng.random() < 0.3:
                raise ValueError

    tasks = []
    for _ in range(500):
        tasks.append(asyncio.create_task(use()))
        if rng.random() < 0.5:
            await asyncio.sleep(0)
        if rng.random() < 0.3:
            rng.choice(tasks).cancel()
        assert admission.running <= 3
        assert admission._waiting[False] <= 10
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (admission.running, admission.waiting) == (0, 0)
    assert await asyncio.wait_for(admission.idle(), 1) is None


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_requests_that_lost_their_worker_pass_a_full_queue_and_go_first() -> None:
    admission = Admission(max_running=1, max_waiting=1)
    running, waiting = Holder(admission), Holder(admission, priority=-5)
    await settle()
    resumed = [Holder(admission, resumed=True) for _ in range(3)]
    await settle()
    assert admission.waiting == 4
    with pytest.raises(QueueFull):
        async with admission.slot():
            pytest.fail("entered")
    order = []
    current = running
    for _ in range(4):
        await current.end()
        await settle()
        current = next(h for h in (*resumed, waiting) if h.inside and h not in order)
        order.append(current)
    assert order == [*resumed, waiting]
    await current.end()


async def test_requests_that_lost_their_worker_are_bounded_too() -> None:
    admission = Admission(max_running=1, max_waiting=0)
    running = Holder(admission)
    resumed = [Holder(admission, resumed=True) for _ in range(admission.max_resumed)]
    await settle()
    assert admission.waiting == admission.max_resumed
    with pytest.raises(QueueFull):
        async with admission.slot(resumed=True):
            pytest.fail("entered")
    for holder in (running, *resumed):
        await holder.end()


async def test_the_queue_of_those_who_left_is_bounded_while_slots_are_held() -> None:
    admission = Admission(max_running=1, max_waiting=8)
    running = Holder(admission)
    await settle()
    for i in range(1000):
        waiting = Holder(admission, priority=i % 3)
        await settle()
        waiting.task.cancel()
        await settle()
    assert admission.waiting == 0
    assert len(admission._queue) <= 2
    await running.end()
    assert admission.running == 0


@pytest.mark.parametrize("priority", [5, 60, 2**31 - 1])
async def test_nobody_starves_behind_a_stream_of_more_urgent_requests(priority: int) -> None:
    clock = Clock()
    admission = Admission(max_running=1, max_waiting=10_000, clock=clock)
    current = Holder(admission)
    await settle()
    starved = Holder(admission, priority)
    holders = []
    for _ in range(300):  # a second each: two come, the more urgent one is served
        clock.now += 1
        holders += [Holder(admission, -priority), Holder(admission, -priority)]
        await settle()
        await current.end()
        await settle()
        if starved.inside:
            break
        current = next(h for h in holders if h.inside and not h.task.done())
    assert starved.inside
    for holder in (starved, *holders):
        holder._release.set()
    await asyncio.gather(*(holder.task for holder in (starved, *holders)))


async def test_choices_count_as_the_sequences_they_are() -> None:
    admission = Admission(max_running=4, max_waiting=9)
    three = Holder(admission, weight=3)
    two, one = Holder(admission, weight=2), Holder(admission)
    await settle()
    assert admission.running == 3
    assert [two.inside, one.inside] == [False, False], "the smaller one does not overtake"
    await three.end()
    await settle()
    assert [two.inside, one.inside] == [True, True]
    assert admission.running == 3
    huge = Holder(admission, weight=128)
    await two.end()
    await one.end()
    await settle()
    assert huge.inside, "what is larger than the worker has it for itself"
    assert admission.running == 4
    await huge.end()
    assert admission.running == 0


async def test_those_behind_a_large_request_that_leaves_move_up() -> None:
    admission = Admission(max_running=4, max_waiting=9)
    running, large, small = Holder(admission, weight=2), Holder(admission, weight=4), Holder(admission)
    await settle()
    assert not small.inside
    large.task.cancel()
    await settle()
    assert small.inside
    await running.end()
    await small.end()


async def test_a_slot_that_is_given_back_early_is_given_back_once() -> None:
    admission = Admission(max_running=1, max_waiting=1)
    async with admission.slot() as slot:
        waiting = Holder(admission)
        await settle()
        slot.release()
        await settle()
        assert waiting.inside
    assert admission.running == 1
    await waiting.end()
    assert admission.running == 0


async def test_retry_after_knows_how_long_slots_are_held_and_how_many_free() -> None:
    clock = Clock()
    admission = Admission(max_running=4, max_waiting=0, clock=clock)
    holders = [Holder(admission) for _ in range(4)]
    await settle()

    async def retry_after_s() -> float:
        with pytest.raises(QueueFull) as caught:
            async with admission.slot():
                pytest.fail("entered")
        assert caught.value.retry_after_s is not None
        return caught.value.retry_after_s

    assert await retry_after_s() == pytest.approx(0.25), "four slots of a second each"
    clock.now += 40  # nothing has ended yet, so a second it is not
    assert await retry_after_s() == pytest.approx(10)
    for holder in holders:
        await holder.end()
    large = Holder(admission, weight=4)
    await settle()
    clock.now += 20
    assert await retry_after_s() >= 20, "one holder frees all"
    await large.end()


async def test_a_worker_that_reopens_takes_requests_again() -> None:
    admission = Admission(max_running=1, max_waiting=1)
    admission.close()
    with pytest.raises(Draining):
        async with admission.slot():
            pytest.fail("entered")
    admission.reopen()
    async with admission.slot():
        pass


async def test_the_age_of_the_oldest_waiting_request_is_told() -> None:
    now = [100.0]
    admission = Admission(max_running=1, max_waiting=5, clock=lambda: now[0])
    first = Holder(admission)
    await settle()
    assert admission.oldest_waiting_s is None
    second = Holder(admission, priority=5)
    await settle()
    now[0] = 103.0
    third = Holder(admission, priority=-60)
    await settle()
    now[0] = 104.0
    assert admission.oldest_waiting_s == 4.0
    second.task.cancel()
    await settle()
    assert admission.oldest_waiting_s == 1.0
    await first.end()
    await third.end()
    assert admission.oldest_waiting_s is None
