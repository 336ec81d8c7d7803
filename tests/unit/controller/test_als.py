"""Tickets and the access log without Envoy: what attempts and ends say of workers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from envoy.service.accesslog.v3 import als_pb2

from fastchat_grpc.controller.dispatch import PickRequest
from fastchat_grpc.controller.envoy import als
from fastchat_grpc.controller.envoy.tickets import LIFETIME_S, Tickets
from fastchat_grpc.controller.health import Tier
from fastchat_grpc.core import Load
from fastchat_grpc.errors import (
    AdapterNotFound,
    BackendFailed,
    Cancelled,
    DeadlineExceeded,
    Draining,
    FailoverExhausted,
    FastChatError,
    InvalidArgument,
    ModelNotFound,
    NoLiveWorker,
    NotResumable,
    NotSupported,
    QueueFull,
    TooManyCalls,
)
from tests.unit.controller.envoy_site import (
    Context,
    Site,
    attempt,
    ended,
    places,
    refused,
    ticket,
)


@pytest.fixture
def site() -> Site:
    return Site()


async def test_a_logged_end_releases_the_reservation(site: Site) -> None:
    worker = site.add(1)
    response = await site.chat()
    assert worker.reserved_count == 1
    site.tell(ended("another controller's"))
    assert worker.reserved_count == 1
    site.tell(attempt(ticket(response), 5001, status=0), ended(ticket(response)))
    assert worker.reserved_count == 0
    assert not worker.health.suspect
    site.tell(ended(ticket(response)))
    assert worker.reserved_count == 0


async def test_what_a_worker_said_is_what_counts(site: Site) -> None:
    """Envoy's flags would say the same of all of these: the worker answered, and the request ended."""

    async def after(**said: Any) -> Any:
        fresh = Site()
        worker = fresh.add(1, load=Load(max_running=4))
        response = await fresh.chat()
        fresh.tell(attempt(ticket(response), 5001, **said), ended(ticket(response)))
        assert worker.reserved_count == 0
        return worker

    draining = await after(error=Draining("x"))
    assert draining.health.suspect
    assert (await after(error=QueueFull("x"))).ledger.room == 0
    assert (await after(error=TooManyCalls("x"))).ledger.room == 0
    assert (await after(error=ModelNotFound("x"))).health.suspect
    others = (
        InvalidArgument("f", "x"),
        DeadlineExceeded("x"),
        Cancelled("x"),
        NotSupported("x"),
        AdapterNotFound("x"),  # the words of a request can bring it about, at a worker that is well
        # What a controller below says of its own workers.
        NoLiveWorker("x"),
        FailoverExhausted("x"),
        NotResumable("x"),
    )
    for error in others:
        worker = await after(error=error)
        assert not worker.health.suspect
        assert worker.ledger.room == 4
        assert worker.tier is Tier.READY


@pytest.mark.parametrize("error", [ModelNotFound("x"), AdapterNotFound("x"), TooManyCalls("x"), NoLiveWorker("x")])
async def test_a_request_that_envoy_takes_elsewhere_counts_there(site: Site, error: FastChatError) -> None:
    first, second = site.add(1, weight=1e9), site.add(2)
    name = ticket(await site.chat())
    site.tell(attempt(name, 5001, error=error))
    assert (first.reserved_count, second.reserved_count) == (0, 1)


async def test_a_worker_that_fails_everything_fast_is_left_alone(site: Site) -> None:
    broken = site.add(1)
    for _ in range(20):
        if broken.tier is not Tier.READY:
            break
        response = await site.chat()
        site.tell(attempt(ticket(response), 5001, error=BackendFailed("x")), ended(ticket(response)))
    assert broken.tier is Tier.NONE
    assert refused(await site.chat())[0] == 503


async def test_client_errors_never_open_the_breaker(site: Site) -> None:
    worker = site.add(1)
    for _ in range(200):
        response = await site.chat()
        error = InvalidArgument("messages", "x")
        site.tell(attempt(ticket(response), 5001, error=error), ended(ticket(response)))
    assert worker.tier is Tier.READY


async def test_a_request_that_goes_on_elsewhere_counts_there(site: Site) -> None:
    first = site.add(1, weight=1e9)
    response = await site.chat()  # nobody else was there to be named
    second = site.add(2)
    site.tell(ended(ticket(response)))
    response = await site.chat()
    name = ticket(response)
    assert places(response) == ["127.0.0.1:5001", "127.0.0.1:5002"]
    site.tell(attempt(name, 5001, error=QueueFull("x")))
    assert (first.reserved_count, second.reserved_count) == (0, 1)
    site.tell(attempt(name, 5002, status=0), ended(name))
    assert (first.reserved_count, second.reserved_count) == (0, 0)
    assert not second.health.suspect


async def test_a_worker_that_was_passed_over_without_a_word_gives_its_place_to_the_next(site: Site) -> None:
    first, second = site.add(1, weight=1e9), site.add(2)
    name = ticket(await site.chat())
    site.tell(attempt(name, 5002, status=0))
    assert (first.reserved_count, second.reserved_count) == (0, 1)
    site.tell(ended(name))
    assert (first.reserved_count, second.reserved_count) == (0, 0)


@pytest.mark.parametrize(
    "flag", ["upstream_connection_failure", "upstream_remote_reset", "upstream_connection_termination"]
)
async def test_a_broken_connection_counts_against_the_worker(site: Site, flag: str) -> None:
    worker = site.add(1)
    response = await site.chat()
    site.tell(attempt(ticket(response), 5001, **{flag: True}))
    assert worker.health.suspect


async def test_another_server_where_a_worker_was_counts_against_it(site: Site) -> None:
    worker = site.add(1)
    response = await site.chat()
    entry = attempt(ticket(response), 5001)
    entry.response.response_code.value = 404
    site.tell(entry)
    assert worker.health.suspect


async def test_a_client_that_left_does_not(site: Site) -> None:
    worker = site.add(1)
    response = await site.chat()
    entry = attempt(ticket(response), 5001, downstream_connection_termination=True)
    entry.response.response_code.value = 200
    site.tell(entry, ended(ticket(response)))
    assert not worker.health.suspect
    assert worker.reserved_count == 0


async def test_tickets_of_a_gateway_that_is_gone_are_void(site: Site) -> None:
    worker = site.add(1)
    for _ in range(3):
        await site.chat()
    assert site.bridge.tickets.void("another") == 0
    assert site.bridge.tickets.void("g", before=0.0) == 0
    assert site.bridge.tickets.void("g") == 3
    assert worker.reserved_count == 0


async def test_tickets_whose_end_was_lost_with_a_log_stream_are_void_after_a_while(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(als, "LOST_S", 0.05)
    worker = site.add(1)
    await site.chat()

    async def log() -> Any:
        message = als_pb2.StreamAccessLogsMessage()
        message.identifier.node.id = "g"
        yield message

    other = asyncio.Event()

    async def another_log() -> Any:  # of another thread of the same Envoy
        message = als_pb2.StreamAccessLogsMessage()
        message.identifier.node.id = "g"
        yield message
        await other.wait()

    staying = asyncio.create_task(site.bridge.completions.StreamAccessLogs(another_log(), Context()))  # type: ignore[arg-type]
    await site.bridge.completions.StreamAccessLogs(log(), Context())  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await site.chat()
    assert worker.reserved_count == 2
    async with asyncio.timeout(30):
        while worker.reserved_count > 1:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.06)
    assert worker.reserved_count == 1  # what began since the stream broke is not touched
    other.set()
    await staying


async def test_a_ticket_that_nobody_ends_is_void_after_its_lifetime(site: Site) -> None:
    worker = site.add(1)
    now = [0.0]
    tickets = Tickets(lambda: now[0])
    tickets.issue("g", site.dispatcher.pick(PickRequest(model="m")), "x", {})
    now[0] = LIFETIME_S + 1
    tickets.issue("g", site.dispatcher.pick(PickRequest(model="m")), "x", {})
    assert len(tickets) == 1
    assert worker.reserved_count == 1
