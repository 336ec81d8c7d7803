"""Where gateways go on with streams, without Envoy: what is asked, answered, and known of workers afterwards."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.config import FailoverConfig
from fastchat_grpc.controller.envoy import going_on
from fastchat_grpc.core import Capability, Load
from fastchat_grpc.errors import (
    BackendFailed,
    Draining,
    FastChatError,
    InvalidArgument,
    ModelDiffers,
    QueueFull,
)
from fastchat_grpc.rpc.bridge import CONTINUE_KEY, LUA_NAMESPACE
from fastchat_grpc.rpc.status import error_to_status
from fastchat_grpc.v1 import registry_pb2 as pb
from tests.conftest import eventually
from tests.unit.controller.envoy_site import GENERATE, Site, ended, frame, places, ticket

RESUME = frozenset({Capability.RESUME})
SEEDED = RESUME | {Capability.SEEDED_RESUME}


@pytest.fixture
def site() -> Site:
    return Site()


class Stream:
    """A request that was picked for, and what its gateway asks."""

    def __init__(self, site: Site, response: Any) -> None:
        self.site = site
        self.ticket = ticket(response)
        self.place = places(response)[0]
        self.pick = dict(response.dynamic_metadata)[CONTINUE_KEY]

    async def ask(
        self,
        error: FastChatError | None = None,
        *,
        started: bool = True,
        at: Site | None = None,
        once: bool = False,
        **values: Any,
    ) -> pb.ContinueStreamResponse:
        """What a gateway hears at last, of one controller; `once`: of its first question."""
        question = pb.ContinueStreamRequest(pick=self.pick, place=self.place, started=started, **values)
        if error is not None:
            question.status_code = int(error.code)
            question.status_details = base64.b64encode(error_to_status(error).SerializeToString()).decode()
        answer = pb.ContinueStreamResponse(ask_again=True)
        while answer.ask_again:
            answer = await (at or self.site).bridge.going_on.answer(question)
            if once:
                break
        self.place = answer.place or self.place
        return answer


async def chat(site: Site, **values: Any) -> Stream:
    return Stream(site, await site.chat(stream=True, **values))


def patient(site: Site, wait_s: float) -> None:
    site.bridge.going_on._failover.config = FailoverConfig(wait_s=wait_s)


async def test_a_stream_goes_on_at_another_worker_and_its_reservation_with_it(site: Site) -> None:
    first, second = (site.add(number, capabilities=RESUME) for number in (1, 2))
    stream = await chat(site)
    if stream.place.endswith("5002"):
        first, second = second, first
    answer = await stream.ask()
    assert (answer.place, answer.cluster) == (second.spec.address, "workers_0")
    assert (first.reserved_count, second.reserved_count) == (0, 1)
    assert first.health.suspect
    site.tell(ended(stream.ticket))
    assert second.reserved_count == 0
    assert len(site.bridge.tickets) == 0


@pytest.mark.parametrize(
    ("error", "suspect"), [(Draining("x"), True), (QueueFull("x"), False), (BackendFailed("x"), False)]
)
async def test_what_the_worker_said_is_what_counts(site: Site, error: FastChatError, suspect: bool) -> None:
    workers = {worker.spec.address: worker for worker in (site.add(number, capabilities=RESUME) for number in (1, 2))}
    stream = await chat(site)
    worker = workers[stream.place]
    answer = await stream.ask(error, started=False)
    assert worker.health.suspect is suspect
    assert bool(answer.place) is not isinstance(error, BackendFailed)
    assert worker.reserved_count == 0


async def test_a_refusal_of_the_request_is_the_answer_that_the_worker_gave(site: Site) -> None:
    site.add(1)
    site.add(2)
    stream = await chat(site)
    assert await stream.ask(InvalidArgument("f", "x"), started=False) == pb.ContinueStreamResponse()


async def test_no_more_workers_are_tried_before_the_answer_than_the_gateway_says(site: Site) -> None:
    for number in range(5):
        site.add(number)
    stream = await chat(site)
    answers = [await stream.ask(QueueFull("x"), started=False) for _ in range(3)]
    assert [bool(answer.place) for answer in answers] == [True, True, False]
    assert answers[-1].status_code == 0  # as the worker said: it is full


async def test_a_full_fleet_is_not_waited_for_before_the_answer(site: Site) -> None:
    site.add(1)
    stream = await chat(site)
    assert await asyncio.wait_for(stream.ask(QueueFull("x"), started=False), 1) == pb.ContinueStreamResponse()


async def test_a_stream_waits_for_a_worker_to_come(site: Site) -> None:
    site.add(1, capabilities=RESUME)
    stream = await chat(site)
    asked = asyncio.create_task(stream.ask())
    await asyncio.sleep(0.02)
    assert not asked.done()
    site.add(2, capabilities=RESUME)
    assert (await asked).place == "127.0.0.1:5002"


async def test_a_question_is_answered_in_time_if_only_with_ask_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(going_on, "HOLD_S", 0.02)
    worker = site.add(1, capabilities=RESUME)
    stream = await chat(site)
    assert (await stream.ask(once=True, loss_count=1)).ask_again
    journey = site.bridge.tickets.get(stream.ticket).journey
    assert (await stream.ask(once=True, loss_count=1)).ask_again
    assert journey.losses == 1  # the same question again says nothing new
    assert worker.health.suspect


async def test_nobody_comes_and_the_caller_hears_why(site: Site) -> None:
    patient(site, 0.02)
    site.add(1, capabilities=RESUME)
    stream = await chat(site)
    answer = await stream.ask()
    assert answer.status_code == 14
    assert "the stream broke" in answer.status_message
    said = HttpBody.FromString(answer.last_message).data
    assert said.startswith(b'data: {"error":')
    assert said.endswith(b"data: [DONE]\n\n")


async def test_a_stream_of_the_native_api_gets_no_event(site: Site) -> None:
    from fastchat_grpc.v1 import generation_pb2

    patient(site, 0.02)
    site.add(1, capabilities=RESUME)
    request = generation_pb2.GenerateRequest(model="m", prompt="x")
    stream = Stream(site, await site.check(GENERATE, frame(request.SerializeToString())))
    answer = await stream.ask()
    assert answer.status_code == 14
    assert not answer.last_message


async def test_what_was_begun_with_a_seed_goes_on_where_its_numbers_do(site: Site) -> None:
    site.add(1, capabilities=SEEDED, backend="a", weight=1e9)
    stream = await chat(site, seed=7)
    assert stream.place == "127.0.0.1:5001"
    site.add(2, capabilities=RESUME, backend="a")
    site.add(3, capabilities=SEEDED, backend="b")
    site.add(4, capabilities=SEEDED, backend="a")
    assert (await stream.ask(backend="a")).place == "127.0.0.1:5004"


async def test_a_grammar_and_penalties_ask_for_workers_that_keep_their_state(site: Site) -> None:
    stateful = RESUME | {Capability.STATEFUL_RESUME, Capability.STRUCTURED_OUTPUT}
    site.add(1, capabilities=stateful, weight=1e9)
    streams = [await chat(site, **values) for values in ({"presence_penalty": 1}, {"response_format": {"type": "x"}})]
    plain = await chat(site, temperature=0, seed=3)
    site.add(2, capabilities=RESUME)
    patient(site, 0.0)
    for stream in streams:
        assert not (await stream.ask()).place
    assert (await plain.ask()).place == "127.0.0.1:5002"  # nothing is drawn, so that its seed does not matter


async def test_resumes_are_bounded(site: Site) -> None:
    for number in range(20):
        site.add(number, capabilities=RESUME)
    stream = await chat(site)
    for loss in range(1, 6):
        assert (await stream.ask(loss_count=loss)).place
    answer = await stream.ask(loss_count=6)
    assert answer.status_code == 14
    assert "gave up" in answer.status_message


async def test_a_worker_that_cannot_go_on_is_passed_over(site: Site) -> None:
    for number in range(3):
        site.add(number, capabilities=RESUME)
    stream = await chat(site)
    first = stream.place
    second = (await stream.ask(loss_count=1)).place
    third = (await stream.ask(ModelDiffers("x"), loss_count=1)).place
    assert len({first, second, third}) == 3


async def test_a_parked_stream_may_go_on_where_it_was(site: Site) -> None:
    worker = site.add(1, capabilities=RESUME)
    stream = await chat(site)
    assert (await stream.ask(parked=True)).place == worker.spec.address
    assert not worker.health.suspect
    assert worker.reserved_count == 1
    assert site.bridge.tickets.get(stream.ticket).journey.losses == 0


async def test_a_stream_whose_caller_does_not_read_reserves_nothing(site: Site) -> None:
    worker = site.add(1, capabilities=RESUME)
    stream = await chat(site)
    assert not (await stream.ask(parked=True, unread=True)).place
    assert worker.reserved_count == 0
    assert (await stream.ask(parked=True)).place == worker.spec.address
    assert worker.reserved_count == 1
    site.tell(ended(stream.ticket))
    assert worker.reserved_count == 0


async def test_a_controller_that_did_not_pick_answers_too(site: Site) -> None:
    site.add(1, capabilities=RESUME)
    other = Site()
    lost, left = (other.add(number, capabilities=RESUME) for number in (1, 2))
    stream = await chat(site)
    answer = await stream.ask(at=other, worker_id="w1")
    assert answer.place == left.spec.address
    assert lost.health.suspect
    assert left.reserved_count == 1
    for each in (site, other):
        each.tell(ended(stream.ticket))
        assert len(each.bridge.tickets) == 0
    assert left.reserved_count == 0


async def test_others_are_asked_before_anybody_waits(site: Site) -> None:
    site.add(1, capabilities=RESUME)
    stream = await chat(site)
    assert (await asyncio.wait_for(stream.ask(once=True), 1)).ask_again


async def test_a_controller_that_does_not_know_the_model_may_hear_of_it(site: Site) -> None:
    site.add(1, capabilities=RESUME)
    other = Site()
    other.add(9, model="other", capabilities=RESUME)
    stream = await chat(site)
    asked = asyncio.create_task(stream.ask(at=other))
    await asyncio.sleep(0)
    other.add(2, capabilities=RESUME)
    assert (await asked).place == "127.0.0.1:5002"


async def test_a_question_that_comes_after_the_end_of_its_stream_reserves_nothing(site: Site) -> None:
    site.add(1, capabilities=RESUME)
    other = Site()
    workers = [other.add(number, capabilities=RESUME) for number in (1, 2)]
    stream = await chat(site)
    for each in (site, other):
        each.tell(ended(stream.ticket))
        assert not (await stream.ask(at=each)).place
        assert len(each.bridge.tickets) == 0
    assert not any(worker.reserved_count for worker in workers)


async def test_a_question_that_waits_at_the_end_of_its_stream_reserves_nothing(site: Site) -> None:
    site.add(1, capabilities=RESUME)
    stream = await chat(site)
    asked = asyncio.create_task(stream.ask())
    await eventually(lambda: site.bridge.tickets.get(stream.ticket).journey is not None)
    site.tell(ended(stream.ticket))
    helper = site.add(2, capabilities=RESUME)
    assert not (await asked).place
    assert helper.reserved_count == 0
    assert len(site.bridge.tickets) == 0


async def test_a_ticket_that_was_void_is_opened_again_by_its_stream(site: Site) -> None:
    site.add(1, capabilities=RESUME)
    helper = site.add(2, capabilities=RESUME)
    stream = await chat(site)
    site.bridge.tickets.void("g")
    assert (await stream.ask()).place
    site.tell(ended(stream.ticket))
    assert helper.reserved_count == 0


@pytest.mark.parametrize("pick", ["", "{}", "[1]", '{"ticket":""}', '{"ticket":"t","resumed":[1]}'])
async def test_what_is_no_pick_is_refused(site: Site, pick: str) -> None:
    with pytest.raises(InvalidArgument, match="pick"):
        await site.bridge.going_on.answer(pb.ContinueStreamRequest(pick=pick, place="127.0.0.1:1"))


@pytest.mark.parametrize(
    ("end", "suspect", "tier"), [("0", False, 2), ("lost", True, 0), ("13", False, 2), ("", False, 2)]
)
async def test_the_end_of_a_carried_stream_says_how_its_last_worker_did(
    site: Site, end: str, suspect: bool, tier: int
) -> None:
    worker = site.add(1, load=Load(max_running=4))
    stream = await chat(site)
    entry = ended(stream.ticket)
    told = entry.common_properties.metadata.filter_metadata[LUA_NAMESPACE]
    told.update({"place": stream.place, "end": end} if end else {"place": stream.place})
    site.tell(entry)
    assert worker.health.suspect is suspect
    assert worker.tier.value == tier
    assert worker.reserved_count == 0
