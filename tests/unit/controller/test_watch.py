"""Watching the registry."""

from __future__ import annotations

from fastchat_grpc.controller.fleet import ChangeKind
from fastchat_grpc.controller.watch import Watch
from fastchat_grpc.core import Load
from tests.unit.controller.fleet import Fleet


async def told(watch: Watch) -> list[tuple[str, str]]:
    return [(kind.value, worker.spec.worker_id) for kind, worker in await watch.next()]


async def test_it_begins_with_the_live_workers_and_goes_on_with_changes() -> None:
    fleet = Fleet()
    first = fleet.join("a")
    watch = Watch(fleet.registry)
    assert watch.initial == [first]
    fleet.join("b")
    fleet.registry.deregister(first.lease_id)
    assert await told(watch) == [("added", "b"), ("removed", "a")]


async def test_changes_of_load_are_merged_while_nobody_reads() -> None:
    fleet = Fleet()
    worker = fleet.join("a")
    watch = Watch(fleet.registry)
    for running in range(100):
        fleet.registry.heartbeat(worker.lease_id, Load(running=running))
    changes = await watch.next()
    assert [(kind, seen.load.running) for kind, seen in changes] == [(ChangeKind.LOAD, 99)]


async def test_a_worker_that_came_and_went_is_not_mentioned() -> None:
    fleet = Fleet()
    watch = Watch(fleet.registry)
    fleet.registry.deregister(fleet.join("a").lease_id)
    fleet.join("b")
    assert await told(watch) == [("added", "b")]


async def test_a_replacement_is_a_removal_and_an_addition() -> None:
    fleet = Fleet()
    fleet.join("a", instance="one")
    watch = Watch(fleet.registry)
    fleet.join("a", instance="two")
    assert await told(watch) == [("removed", "a"), ("added", "a")]


async def test_only_workers_of_the_model_are_told() -> None:
    fleet = Fleet()
    watch = Watch(fleet.registry, "n")
    fleet.join("a", "m")
    fleet.join("b", "n")
    assert await told(watch) == [("added", "b")]
    fleet.join("b", "m")  # the same process, now with another model
    assert await told(watch) == [("removed", "b")]


async def test_closing_ends_it() -> None:
    fleet = Fleet()
    watch = Watch(fleet.registry)
    watch.close()
    fleet.join("a")
    assert await told(watch) == []
