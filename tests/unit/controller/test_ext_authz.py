"""Picker, tickets and completions without Envoy: what they answer, and what they count."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.auth.v3 import external_auth_pb2 as auth
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.config import ApiKeyConfig, DispatchMethod, FailoverConfig
from fastchat_grpc.controller.dispatch import Dispatcher, PickRequest
from fastchat_grpc.controller.envoy.services import EnvoyServices
from fastchat_grpc.controller.envoy.tickets import LIFETIME_S, Tickets
from fastchat_grpc.controller.fleet import WorkerSpec
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.controller.relay import Relay
from fastchat_grpc.core import Load, ModelInfo
from fastchat_grpc.rpc.api_keys import ApiKeys
from fastchat_grpc.rpc.bridge import PLACES_KEY, TICKET_HEADER
from fastchat_grpc.rpc.pool import ChannelPool
from fastchat_grpc.rpc.security import JoinToken
from fastchat_grpc.v1 import generation_pb2 as pb

CHAT = "/fastchat_grpc.v1.OpenAIService/ChatCompletions"
GENERATE = "/fastchat_grpc.v1.GenerationService/Generate"
KEY = "sk-of-alice-1234"
NO_KEYS = ApiKeyConfig()
FREE = Load(max_running=4)


class Context:
    def invocation_metadata(self) -> Any:
        return ()


class Site:
    """A registry with workers, and the bridge over it."""

    def __init__(self, *, keys: ApiKeyConfig = NO_KEYS, method: DispatchMethod = DispatchMethod.LOTTERY) -> None:
        self.registry = Registry()
        self.registry.settle()
        self.dispatcher = Dispatcher(self.registry, method)
        relay = Relay(self.dispatcher, ChannelPool(None, max_message_bytes=2**20), FailoverConfig())
        self.bridge = EnvoyServices(relay, ApiKeys(keys), JoinToken(None), settle_s=0.0)

    def add(self, number: int, model: str = "m", weight: float = 1.0, load: Load = FREE) -> Any:
        spec = WorkerSpec(
            worker_id=f"w{number}",
            instance_id=f"i{number}",
            address=f"127.0.0.1:{5000 + number}",
            models=(ModelInfo(name=model, context_length=10),),
            weight=weight,
        )
        return self.registry.register(spec, load)

    async def check(self, path: str, body: bytes, **headers: str) -> auth.CheckResponse:
        request = auth.CheckRequest()
        http = request.attributes.request.http
        http.path, http.raw_body = path, body
        for name, value in headers.items():
            http.headers[name.replace("_", "-")] = value
        return await self.bridge.picker.Check(request, Context())

    async def chat(self, **values: Any) -> auth.CheckResponse:
        body = HttpBody(data=json.dumps({"model": "m", **values}).encode())
        return await self.check(CHAT, frame(body.SerializeToString()))


def frame(message: bytes, compressed: bool = False) -> bytes:
    return bytes([compressed]) + len(message).to_bytes(4, "big") + message


def places(response: auth.CheckResponse) -> list[str]:
    assert response.WhichOneof("http_response") == "ok_response", response
    return response.dynamic_metadata[PLACES_KEY].split(",")


def refused(response: auth.CheckResponse) -> tuple[int, str]:
    assert response.WhichOneof("http_response") == "denied_response", response
    headers = {item.header.key: item.header.value for item in response.denied_response.headers}
    return response.denied_response.status.code, headers["grpc-message"]


def ticket(response: auth.CheckResponse) -> str:
    return next(item.header.value for item in response.ok_response.headers if item.header.key == TICKET_HEADER)


def entry(name: str, port: int, attempts: int = 1, **flags: bool) -> accesslog_pb2.HTTPAccessLogEntry:
    found = accesslog_pb2.HTTPAccessLogEntry()
    found.request.request_headers[TICKET_HEADER] = name
    common = found.common_properties
    common.upstream_remote_address.socket_address.address = "127.0.0.1"
    common.upstream_remote_address.socket_address.port_value = port
    common.upstream_request_attempt_count = attempts
    common.time_to_first_upstream_rx_byte.nanos = 1
    for flag, value in flags.items():
        setattr(common.response_flags, flag, value)
    return found


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
    assert refused(await site.chat())[0] == 404
    worker = site.add(1)
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


async def test_a_logged_end_releases_the_reservation(site: Site) -> None:
    worker = site.add(1)
    response = await site.chat()
    assert worker.reserved_count == 1
    site.bridge.completions._ended(entry("another controller's", 5001))
    assert worker.reserved_count == 1
    site.bridge.completions._ended(entry(ticket(response), 5001))
    assert worker.reserved_count == 0
    assert not worker.health.suspect
    site.bridge.completions._ended(entry(ticket(response), 5001))
    assert worker.reserved_count == 0


async def test_a_worker_that_was_passed_over_is_suspect_unless_it_was_full(site: Site) -> None:
    broken = site.add(1)
    response = await site.chat()
    site.add(2)
    site.bridge.completions._ended(entry(ticket(response), 5002, attempts=2))
    assert broken.health.suspect
    assert broken.reserved_count == 0
    full = Site()
    worker = full.add(1, load=Load(running=4, max_running=4))
    response = await full.chat()
    full.bridge.completions._ended(entry(ticket(response), 5002, attempts=2))
    assert not worker.health.suspect


async def test_a_broken_connection_counts_against_the_worker(site: Site) -> None:
    worker = site.add(1)
    response = await site.chat()
    site.bridge.completions._ended(entry(ticket(response), 5001, upstream_connection_termination=True))
    assert worker.health.suspect


async def test_a_client_that_left_does_not(site: Site) -> None:
    worker = site.add(1)
    response = await site.chat()
    site.bridge.completions._ended(entry(ticket(response), 5001, downstream_connection_termination=True))
    assert not worker.health.suspect
    assert worker.reserved_count == 0


async def test_tickets_of_a_gateway_that_is_gone_are_void(site: Site) -> None:
    worker = site.add(1)
    for _ in range(3):
        await site.chat()
    assert site.bridge.tickets.void("another") == 0
    assert site.bridge.tickets.void("") == 3
    assert worker.reserved_count == 0


async def test_a_ticket_that_nobody_ends_is_void_after_its_lifetime(site: Site) -> None:
    worker = site.add(1)
    now = [0.0]
    tickets = Tickets(lambda: now[0])
    tickets.issue("g", site.dispatcher.pick(PickRequest(model="m")), "x")
    now[0] = LIFETIME_S + 1
    tickets.issue("g", site.dispatcher.pick(PickRequest(model="m")), "x")
    assert len(tickets) == 1
    assert worker.reserved_count == 1
