"""The picker without Envoy: what it answers, and whom it reserves."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.config import ApiKeyConfig, DispatchMethod
from fastchat_grpc.controller.dispatch import PickRequest
from fastchat_grpc.controller.envoy import ext_authz
from fastchat_grpc.controller.fleet import Worker
from fastchat_grpc.core import Capability
from fastchat_grpc.rpc.bridge import (
    CHOICES_KEY,
    CLUSTER_HEADER,
    FINAL_KEY,
    KEY_ONLY_KEY,
    MISSED_HEADER,
    STREAM_HEADER,
)
from fastchat_grpc.v1 import generation_pb2 as pb
from tests.conftest import eventually
from tests.unit.controller.envoy_site import (
    CHAT,
    GENERATE,
    KEY,
    Site,
    chat_body,
    frame,
    header,
    places,
    refused,
    ticket,
)


@pytest.fixture
def site() -> Site:
    return Site()


async def test_the_first_place_is_reserved_and_others_follow(site: Site) -> None:
    workers = [site.add(number) for number in range(5)]
    response = await site.chat()
    found = places(response)
    assert len(found) == len(set(found)) == 3
    reserved = [worker for worker in workers if worker.reserved_count]
    assert [worker.spec.address for worker in reserved] == found[:1]
    assert len(site.bridge.tickets) == 1


@pytest.mark.parametrize("method", list(DispatchMethod))
async def test_a_gateway_that_knows_few_of_many_workers_costs_few_picks(
    method: DispatchMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(method=method)
    for number in range(300):
        site.add(number)
    picks = 0
    choose = site.dispatcher.choose

    def counted(request: PickRequest) -> tuple[str, Worker]:
        nonlocal picks
        picks += 1
        return choose(request)

    monkeypatch.setattr(site.dispatcher, "choose", counted)
    site.known = {"127.0.0.1:5007", "127.0.0.1:5299"}
    assert set(places(await site.chat())) == site.known
    assert picks <= 4, "each is a walk over the fleet at worst"


async def test_only_workers_of_the_model_are_named(site: Site) -> None:
    site.add(1, "m")
    site.add(2, "other")
    for _ in range(5):
        assert places(await site.chat()) == ["127.0.0.1:5001"]
        assert places(await site.chat(model="other")) == ["127.0.0.1:5002"]


async def test_typed_requests_are_read_too_even_compressed(site: Site) -> None:
    site.add(1)
    message = pb.GenerateRequest(model="m", prompt="x").SerializeToString()
    assert places(await site.check(GENERATE, frame(message))) == ["127.0.0.1:5001"]
    squeezed = frame(gzip.compress(message), compressed=True)
    assert places(await site.check(GENERATE, squeezed, grpc_encoding="gzip")) == ["127.0.0.1:5001"]
    bomb = frame(gzip.compress(b"x" * 50_000_000), compressed=True)
    assert refused(await site.check(GENERATE, bomb, grpc_encoding="gzip"))[0] == 400
    assert refused(await site.check(GENERATE, squeezed, grpc_encoding="br"))[0] == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, b""),
        (CHAT, b"\0\0\0"),
        (CHAT, b"\0\xff\xff\xff\xff"),
        (CHAT, frame(b"\xff\xff")),
        (CHAT, frame(HttpBody(data=b"nonsense").SerializeToString())),
        (CHAT, frame(HttpBody(data=b'{"model": 5}').SerializeToString())),
        (GENERATE, frame(b"\x0a\xff")),
        ("/grpc.health.v1.Health/Check", frame(b"")),
        ("/fastchat_grpc.v1.ControllerService/Register", frame(b"")),
    ],
)
async def test_what_cannot_be_read_is_refused_and_reserves_nothing(site: Site, path: str, body: bytes) -> None:
    worker = site.add(1)
    assert refused(await site.check(path, body))[0] == 400
    assert worker.reserved_count == 0


async def test_refusals_have_the_status_that_a_worker_would_give(site: Site) -> None:
    assert refused(await site.chat())[0] == 503, "nobody is there, so nothing is known"
    worker = site.add(1)
    assert refused(await site.chat(model="nobody's"))[0] == 404
    site.registry.deregister(worker.lease_id)
    assert refused(await site.chat())[0] == 503
    site.add(2, "a")
    site.add(3, "b")
    assert refused(await site.chat(model=""))[0] == 400


async def test_the_key_is_checked_before_anything_is_read() -> None:
    site = Site(keys=ApiKeyConfig(keys=(("alice", KEY),)))
    site.add(1)
    assert refused(await site.check(CHAT, b"nonsense"))[0] == 401
    assert refused(await site.check(CHAT, b"nonsense", authorization="Bearer wrong"))[0] == 401
    body = frame(HttpBody(data=b'{"model": "m"}').SerializeToString())
    response = await site.check(CHAT, body, authorization=f"Bearer {KEY}")
    assert places(response)
    assert response.dynamic_metadata["client"] == "alice"
    assert "authorization" in response.ok_response.headers_to_remove
    assert KEY not in str(response)


async def test_equal_prefixes_go_to_one_worker() -> None:
    site = Site(method=DispatchMethod.PREFIX_AFFINITY)
    for number in range(8):
        site.add(number)
    firsts = set()
    for _ in range(5):
        response = await site.chat(messages=[{"role": "user", "content": "the same"}])
        firsts.add(places(response)[0])
        site.bridge.tickets.take(ticket(response))
    assert len(firsts) == 1
    others = {places(await site.chat(prompt_cache_key=f"session {i}"))[0] for i in range(20)}
    assert len(others) > 1


async def test_as_many_retries_are_allowed_as_there_are_further_workers(site: Site) -> None:
    site.add(1)
    assert header(await site.chat(), "x-envoy-max-retries") == "0"
    site.add(2, "other")
    assert header(await site.chat(), "x-envoy-max-retries") == "0"
    for number in range(3, 9):
        site.add(number)
    assert header(await site.chat(), "x-envoy-max-retries") == "2"
    site.extensions[CHOICES_KEY] = "5"
    assert header(await site.chat(), "x-envoy-max-retries") == "4"
    assert len(places(await site.chat())) == 5
    site.extensions[CHOICES_KEY] = "1"
    assert len(places(await site.chat())) == 1


async def test_the_cluster_is_named_and_whether_the_answer_comes_in_pieces(site: Site) -> None:
    site.add(1)
    response = await site.chat()
    assert header(response, CLUSTER_HEADER) == "workers_0"
    assert header(response, STREAM_HEADER) == ""
    assert header(await site.chat(stream=True), STREAM_HEADER) == "1"


async def test_the_key_alone_is_checked_where_nothing_else_is_asked() -> None:
    site = Site(keys=ApiKeyConfig(keys=(("alice", KEY),)))
    worker = site.add(1)
    site.extensions = {KEY_ONLY_KEY: "1"}
    response = await site.check(CHAT, b"")
    assert refused(response)[0] == 401
    assert json.loads(response.denied_response.body)["error"]["code"] == "invalid_api_key"
    assert (await site.check(CHAT, b"", authorization=f"Bearer {KEY}")).status.code == 0
    assert worker.reserved_count == 0


async def test_what_another_server_has_begun_goes_to_those_that_can_go_on_with_it(site: Site) -> None:
    site.add(1)
    request = pb.GenerateRequest(model="m", prompt="x")
    assert places(await site.check(GENERATE, frame(request.SerializeToString()))) == ["127.0.0.1:5001"]
    request.resume.choices.add(index=0, output_token_ids=[1, 2])
    assert refused(await site.check(GENERATE, frame(request.SerializeToString())))[0] == 503
    site.add(2, capabilities=frozenset({Capability.RESUME}))
    assert places(await site.check(GENERATE, frame(request.SerializeToString()))) == ["127.0.0.1:5002"]


SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
LARGE = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": ["x" * 100] * 2000}}}
EMBEDDINGS = CHAT.replace("ChatCompletions", "Embeddings")
COMPLETIONS = CHAT.replace("ChatCompletions", "Completions")
GRAMMAR = Capability.STRUCTURED_OUTPUT


@pytest.mark.parametrize(
    ("path", "values", "asked"),
    [
        (CHAT, {}, Capability.CHAT),
        (CHAT, {"response_format": SCHEMA}, GRAMMAR),
        (CHAT, {"response_format": LARGE}, GRAMMAR),
        (CHAT, {"response_format": SCHEMA, "messages": [{"role": "user", "content": "x" * 100_000}]}, GRAMMAR),
        (CHAT, {"response_format": {"type": "text"}}, None),
        (CHAT, {"guided_regex": "a+"}, GRAMMAR),
        (CHAT, {"structured_outputs": {"choice": ["a"]}}, GRAMMAR),
        (CHAT, {"tool_choice": "required"}, GRAMMAR),
        (CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, GRAMMAR),
        (CHAT, {"tool_choice": "auto", "seed": None}, None),
        (CHAT, {"logprobs": True}, Capability.LOGPROBS),
        (CHAT, {"logprobs": False}, None),
        (COMPLETIONS, {"logprobs": 0}, Capability.LOGPROBS),
        (COMPLETIONS, {"seed": 0}, Capability.SEED),
        (EMBEDDINGS, {"input": "x"}, Capability.EMBED),
    ],
    ids=str,
)
async def test_a_request_goes_where_it_can_be_done(path: str, values: dict[str, Any], asked: Capability | None) -> None:
    """A worker that cannot do it is named only where nobody can, and is the first otherwise."""
    usual = frozenset({Capability.CHAT}) - {asked}
    site = Site()
    site.add(1, weight=1e9, capabilities=usual)
    assert places(await site.check(path, chat_body(**values))) == ["127.0.0.1:5001"]
    site.add(2, capabilities=usual | ({asked} if asked else {GRAMMAR}))
    named = places(await site.check(path, chat_body(**values)))
    assert named[0] == ("127.0.0.1:5002" if asked else "127.0.0.1:5001")
    assert len(named) == (1 if asked else 2)


async def test_so_does_a_typed_one(site: Site) -> None:
    site.add(1, weight=1e9)
    site.add(2, capabilities=frozenset({GRAMMAR, Capability.LOGPROBS, Capability.SEED}))
    plain = pb.GenerateRequest(model="m", prompt="x")
    assert places(await site.check(GENERATE, frame(plain.SerializeToString())))[0] == "127.0.0.1:5001"
    for request in (
        pb.GenerateRequest(structured_output=pb.StructuredOutput(regex="a")),
        pb.GenerateRequest(output=pb.OutputOptions(logprobs=0)),
        pb.GenerateRequest(sampling=pb.SamplingParams(seed=0)),
    ):
        request.MergeFrom(plain)
        assert places(await site.check(GENERATE, frame(request.SerializeToString()))) == ["127.0.0.1:5002"]


async def test_what_a_seed_began_goes_on_at_its_backend(site: Site) -> None:
    able = frozenset({Capability.RESUME, Capability.SEEDED_RESUME})
    site.add(1, weight=1e9, capabilities=able, backend="another")
    site.add(2, capabilities=able, backend="engine")
    request = pb.GenerateRequest(model="m", prompt="x", sampling=pb.SamplingParams(seed=1))
    request.resume.choices.add(index=0, output_token_ids=[1, 2])
    request.resume.backend = "engine"
    assert places(await site.check(GENERATE, frame(request.SerializeToString()))) == ["127.0.0.1:5002"]
    request.sampling.temperature = 0
    assert places(await site.check(GENERATE, frame(request.SerializeToString())))[0] == "127.0.0.1:5001"


# ------------------------------------------------------------------------------------ several controllers


async def test_a_controller_that_is_not_the_last_one_leaves_what_it_lacks_to_the_others(site: Site) -> None:
    del site.extensions[FINAL_KEY]
    worker = site.add(1)
    response = await site.chat(model="nobody's")
    assert response.HasField("ok_response")
    assert places(response) == []
    assert header(response, CLUSTER_HEADER) == ""
    assert header(response, MISSED_HEADER) == "5"
    site.registry.deregister(worker.lease_id)
    assert header(await site.chat(), MISSED_HEADER) == "14"
    # What one of them said of its workers is not forgotten by the next, which has never had any.
    told = await site.check(CHAT, chat_body(model="nobody's"), **{MISSED_HEADER: "14"})
    assert header(told, MISSED_HEADER) == "14"


async def test_the_last_controller_speaks_for_all(site: Site) -> None:
    site.add(1)
    assert refused(await site.check(CHAT, chat_body(model="x"), **{MISSED_HEADER: "5"}))[0] == 404
    assert refused(await site.check(CHAT, chat_body(model="x"), **{MISSED_HEADER: "14"}))[0] == 503


async def test_a_gateway_that_is_not_connected_here_is_told_to_wait_and_never_that_there_is_no_model(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ext_authz, "PATIENCE_S", 0.05)
    site.add(1)
    site.known = set()
    response = await site.chat()
    assert refused(response)[0] == 503
    assert {item.header.key: item.header.value for item in response.denied_response.headers}["retry-after"] == "1"


async def test_a_worker_that_comes_back_to_a_young_controller_is_waited_for() -> None:
    site = Site(settled=False)
    asked = asyncio.create_task(site.chat())
    await asyncio.sleep(0.01)
    assert not asked.done()
    site.add(1)
    async with asyncio.timeout(30):
        assert places(await asked) == ["127.0.0.1:5001"]


async def test_a_young_controller_says_try_again_and_not_that_there_is_no_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ext_authz, "COMING_PATIENCE_S", 0.05)
    site = Site(settled=False)
    assert refused(await site.chat())[0] == 503
    del site.extensions[FINAL_KEY]
    assert header(await site.chat(), MISSED_HEADER) == "14"


@pytest.mark.parametrize("model", ["m", ""])
async def test_the_only_worker_is_waited_for_when_it_was_lost_a_moment_ago(site: Site, model: str) -> None:
    worker = site.add(1)
    site.registry.lost(worker)
    asked = asyncio.create_task(site.chat(model=model))
    await eventually(lambda: site.registry.room.waiting("m") == 1)
    site.registry.heartbeat(worker.lease_id, worker.load)
    async with asyncio.timeout(30):
        assert places(await asked) == ["127.0.0.1:5001"]


async def test_who_waits_for_a_lost_worker_in_vain_is_told_to_come_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ext_authz, "COMING_PATIENCE_S", 0.05)
    site.registry.lost(site.add(1))
    assert refused(await site.chat())[0] == 503


async def test_nobody_is_waited_for_who_is_not_known_to_come_back_or_may_be_well_elsewhere(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ext_authz, "COMING_PATIENCE_S", 1e9)
    site.registry.drain(site.add(1).spec.worker_id, None)
    async with asyncio.timeout(30):
        assert refused(await site.chat())[0] == 503
        site.registry.lost(site.add(2, "other"))
        del site.extensions[FINAL_KEY]  # another controller is asked next
        assert header(await site.chat(model="other"), MISSED_HEADER) == "14"
