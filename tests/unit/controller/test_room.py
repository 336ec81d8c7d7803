"""Requests that wait for a worker: who is woken, when, and how many."""

from __future__ import annotations

import asyncio

import pytest

from fastchat_grpc.controller.dispatch import Dispatcher, PickRequest
from fastchat_grpc.controller.fleet import Reservation
from fastchat_grpc.core import Load
from fastchat_grpc.errors import FastChatError
from tests.unit.controller.fleet import Fleet

LONG_S = 60.0


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


class Waiters:
    """Requests that pick, and wait where they cannot."""

    def __init__(self, fleet: Fleet) -> None:
        self._room = fleet.registry.room
        self._dispatcher = Dispatcher(fleet.registry)
        self.tasks: list[asyncio.Task[None]] = []
        self.served: list[Reservation] = []
        self.order: list[int] = []
        self.woken = 0

    async def add(self, count: int, model: str = "m", **request: object) -> None:
        for _ in range(count):
            number = len(self.tasks)
            self.tasks.append(asyncio.create_task(self._one(number, PickRequest(model=model, **request))))  # type: ignore[arg-type]
        await settle()

    async def _one(self, number: int, request: PickRequest) -> None:
        while await self._room.wait(request.model, LONG_S, request.accepts):
            self.woken += 1
            try:
                reservation = self._dispatcher.pick(request, lambda: None)
            except FastChatError:
                continue
            self.order.append(number)
            self.served.append(reservation)
            return

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


async def test_a_worker_that_joins_wakes_as_many_as_it_has_room_for(fleet: Fleet) -> None:
    waiters = Waiters(fleet)
    await waiters.add(5000)
    fleet.join(load=Load(max_running=200, max_waiting=64))
    await settle()
    assert len(waiters.served) == waiters.woken == 264
    assert waiters.order == list(range(264)), "first come, first served"
    await waiters.close()
    assert len(fleet.registry.room) == 0


async def test_two_workers_that_join_at_once_wake_for_both(fleet: Fleet) -> None:
    waiters = Waiters(fleet)
    await waiters.add(20)
    for worker_id in "ab":
        fleet.join(worker_id, load=Load(max_running=3, max_waiting=1))
    await settle()
    assert len(waiters.served) == 8
    await waiters.close()


async def test_who_waits_for_another_model_sleeps_on(fleet: Fleet) -> None:
    waiters = Waiters(fleet)
    await waiters.add(10, "other")
    worker = fleet.join("a", "m", load=Load(max_running=100))
    fleet.registry.heartbeat(worker.lease_id, Load(max_running=100))
    fleet.registry.reserve(worker).release()
    await settle()
    assert waiters.woken == 0
    await waiters.close()


async def test_an_end_a_report_and_a_recovery_make_room(fleet: Fleet) -> None:
    worker = fleet.join(load=Load(max_running=1))
    reservation = fleet.registry.reserve(worker)
    waiters = Waiters(fleet)
    await waiters.add(4)
    reservation.release()
    await settle()
    assert len(waiters.served) == 1
    fleet.registry.heartbeat(worker.lease_id, Load(running=1, max_running=2))
    await settle()
    assert len(waiters.served) == 2
    fleet.registry.suspect(worker)
    for served in waiters.served:
        served.release()
    await settle()
    assert len(waiters.served) == 2, "not to a suspect"
    fleet.registry.heartbeat(worker.lease_id, Load(max_running=2))
    await settle()
    assert len(waiters.served) == 4
    await waiters.close()


async def test_a_full_worker_wakes_when_it_is_believed_no_more(fleet: Fleet) -> None:
    worker = fleet.join(check_heartbeat=False, load=Load(max_running=2))
    fleet.registry.full(worker)
    waiters = Waiters(fleet)
    await waiters.add(3)
    fleet.wait(1.9)
    await settle()
    assert waiters.woken == 0
    fleet.wait(0.2)
    await settle()
    assert len(waiters.served) == 2
    await waiters.close()


async def test_a_worker_that_tells_no_bounds_takes_one_at_a_time(fleet: Fleet) -> None:
    waiters = Waiters(fleet)
    await waiters.add(3)
    worker = fleet.join()
    await settle()
    assert len(waiters.served) == 1
    waiters.served[0].release()
    await settle()
    assert len(waiters.served) == 2
    fleet.registry.heartbeat(worker.lease_id, Load(running=1))
    await settle()
    assert len(waiters.served) == 3
    await waiters.close()


async def test_who_cannot_use_a_worker_does_not_keep_others_from_it(fleet: Fleet) -> None:
    worker = fleet.join(load=Load(max_running=1))
    reservation = fleet.registry.reserve(worker)
    waiters = Waiters(fleet)
    await waiters.add(3, excluded={"a"})
    await waiters.add(1)
    reservation.release()
    await settle()
    assert waiters.order == [3]
    await waiters.close()


async def test_a_place_whose_taker_has_left_goes_to_the_next(fleet: Fleet) -> None:
    worker = fleet.join(load=Load(max_running=1))
    reservation = fleet.registry.reserve(worker)
    waiters = Waiters(fleet)
    await waiters.add(2)
    reservation.release()
    waiters.tasks[0].cancel()
    await settle()
    assert waiters.order == [1]
    await waiters.close()
    assert not fleet.registry.room._coming


async def test_a_worker_that_may_be_probed_wakes_one(fleet: Fleet) -> None:
    worker = fleet.join(load=Load(max_running=100))
    for _ in range(20):
        fleet.registry.failed(worker)
    waiters = Waiters(fleet)
    await waiters.add(10)
    fleet.registry.heartbeat(worker.lease_id, Load(max_running=100))
    fleet.wait(2.1)
    await settle()
    assert (len(waiters.served), waiters.woken) == (1, 1)
    await waiters.close()


async def test_who_waits_for_what_is_not_there_hears_so_when_the_fleet_is_whole() -> None:
    fleet = Fleet(young=True)
    fleet.join(models="here", load=Load(max_running=1, running=1))
    for_nothing = asyncio.create_task(fleet.registry.room.wait("nothing", LONG_S))
    for_room = asyncio.create_task(fleet.registry.room.wait("here", LONG_S))
    await settle()
    fleet.wait(4.1)
    await settle()
    assert for_nothing.done()
    assert for_nothing.result()
    assert not for_room.done()
    for_room.cancel()


async def test_patience_ends(fleet: Fleet) -> None:
    assert not await fleet.registry.room.wait("m", 0.01)
    assert len(fleet.registry.room) == 0
