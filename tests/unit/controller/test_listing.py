"""Lists and watches of large fleets."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from time import perf_counter

from fastchat_grpc.controller.fleet import ChangeKind
from fastchat_grpc.controller.history import History
from fastchat_grpc.controller.listing import CHANGES_PER_MESSAGE, change_batches, workers_page
from fastchat_grpc.controller.paging import ENTRIES_AT_ONCE, MAX_PAGE_BYTES
from fastchat_grpc.controller.watch import Watch
from fastchat_grpc.core import Load, WorkerState
from fastchat_grpc.v1 import registry_pb2 as pb
from tests.unit.controller.fleet import Fleet


async def test_ten_thousand_workers_are_listed_while_others_get_their_turn() -> None:
    fleet = Fleet()
    for i in range(10_000):
        fleet.join(f"w{i:05}")
    turns: list[float] = []

    async def other() -> None:
        while True:
            turns.append(perf_counter())
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    ids: list[str] = []
    token = ""
    pages = 0
    while True:
        page = await workers_page(fleet.registry, pb.ListWorkersRequest(page_token=token, page_size=1000))
        ids += [worker.worker_id for worker in page.workers]
        pages += 1
        token = page.next_page_token
        if not token:
            break
    task.cancel()
    assert ids == [f"w{i:05}" for i in range(10_000)]
    assert pages == 10
    assert len(turns) >= 10_000 / ENTRIES_AT_ONCE - pages
    gaps = sorted(after - before for before, after in pairwise(turns))
    assert gaps[len(gaps) // 2] < 0.02, "the usual wait; a busy machine may add to single ones"


async def test_a_page_of_workers_with_many_models_is_bounded_by_its_bytes() -> None:
    fleet = Fleet()
    names = ",".join(f"an-adapter-with-a-rather-long-name-{i}" for i in range(1000))
    for i in range(60):
        fleet.join(f"w{i:02}", names)
    first = await workers_page(fleet.registry, pb.ListWorkersRequest())
    assert MAX_PAGE_BYTES < first.ByteSize() < 2 * MAX_PAGE_BYTES
    rest = await workers_page(fleet.registry, pb.ListWorkersRequest(page_token=first.next_page_token))
    assert len(first.workers) + len(rest.workers) <= 60
    assert rest.workers[0].worker_id == f"w{len(first.workers):02}"


def test_a_snapshot_comes_in_messages_of_which_the_last_has_the_version() -> None:
    fleet = Fleet()
    workers = [fleet.join(f"w{i}") for i in range(2 * CHANGES_PER_MESSAGE + 1)]
    changes = [(ChangeKind.ADDED, worker) for worker in workers]
    messages = list(change_batches(changes, fleet.registry, "v", snapshot=True))
    assert [len(message.changes) for message in messages] == [CHANGES_PER_MESSAGE, CHANGES_PER_MESSAGE, 1]
    assert [message.version for message in messages] == ["", "", "v"]
    assert all(message.snapshot for message in messages)


def test_no_message_of_a_snapshot_is_too_large_to_be_sent() -> None:
    fleet = Fleet()
    names = ",".join(f"model-{'x' * 200}-{i}" for i in range(500))
    workers = [fleet.join(f"w{i}", names) for i in range(50)]
    changes = [(ChangeKind.ADDED, worker) for worker in workers]
    messages = list(change_batches(changes, fleet.registry, "v", snapshot=True))
    assert sum(len(message.changes) for message in messages) == 50
    assert max(message.ByteSize() for message in messages) < 2 * MAX_PAGE_BYTES
    assert [message.version for message in messages] == [""] * (len(messages) - 1) + ["v"]


def test_a_change_of_load_tells_nothing_else() -> None:
    fleet = Fleet()
    worker = fleet.join("a", labels={"zone": "x"}, load=Load(running=2))
    (message,) = change_batches([(ChangeKind.LOAD, worker)], fleet.registry, "v")
    told = message.changes[0].worker
    assert (told.worker_id, told.load.running_count) == ("a", 2)
    assert not told.models
    assert not told.labels


async def test_what_was_missed_is_told_once_and_in_order() -> None:
    fleet = Fleet()
    history = History(fleet.registry)
    stays, leaves = fleet.join("stays"), fleet.join("leaves")
    version = history.version
    fleet.registry.heartbeat(stays.lease_id, Load(state=WorkerState.DEGRADED))
    fleet.registry.heartbeat(stays.lease_id, Load(state=WorkerState.SERVING))
    fleet.registry.deregister(fleet.join("passes").lease_id)
    fleet.registry.deregister(leaves.lease_id)
    fleet.join("leaves", instance="again")
    watch = Watch(fleet.registry, loads=False, resumed=history.since(version))
    told = [(kind.value, worker.spec.worker_id) for kind, worker in await watch.next()]
    assert told == [("state", "stays"), ("removed", "leaves"), ("added", "leaves")]
    assert history.since(history.version) == {}


def test_a_version_that_is_too_old_or_of_another_process_is_not_known() -> None:
    fleet = Fleet()
    history = History(fleet.registry, kept=3)
    versions = []
    for name in "abcde":
        versions.append(history.version)
        fleet.join(name)
    assert [history.since(version) is not None for version in versions] == [False, False, True, True, True]
    assert History(fleet.registry).since(versions[-1]) is None
    assert history.since(history.version + "0") is None
