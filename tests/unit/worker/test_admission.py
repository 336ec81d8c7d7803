"""Slots and the queue in front of them."""

from __future__ import annotations

import asyncio
import random

import pytest

from fastchat_grpc.errors import Draining, QueueFull
from fastchat_grpc.worker.admission import Admission


class Holder:
    """A task that holds a slot until released."""

    def __init__(self, admission: Admission, priority: int = 0) -> None:
        self.inside = False
        self._release = asyncio.Event()
        self.task = asyncio.create_task(self._hold(admission, priority))

    async def _hold(self, admission: Admission, priority: int) -> None:
        async with admission.slot(priority):
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
        async with admission.slot(rng.randint(0, 2)):
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
        assert admission.waiting <= 10
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (admission.running, admission.waiting) == (0, 0)
    assert await asyncio.wait_for(admission.idle(), 1) is None
