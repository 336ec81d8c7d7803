"""Picker, tickets and completions without Envoy: what they answer, and what they count."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from typing import Any

import pytest
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2
from envoy.service.auth.v3 import external_auth_pb2 as auth
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.config import ApiKeyConfig, DispatchMethod, FailoverConfig
from fastchat_grpc.controller.dispatch import Dispatcher, PickRequest
from fastchat_grpc.controller.envoy import als, ext_authz
from fastchat_grpc.controller.envoy.services import EnvoyServices
from fastchat_grpc.controller.envoy.tickets import LIFETIME_S, Tickets
from fastchat_grpc.controller.fleet import Worker, WorkerSpec
from fastchat_grpc.controller.health import Tier
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.controller.relay import Relay
from fastchat_grpc.core import Capability, Load, ModelInfo
from fastchat_grpc.errors import (
    BackendFailed,
    Cancelled,
    DeadlineExceeded,
    Draining,
    FastChatError,
    InvalidArgument,
    ModelNotFound,
    NotSupported,
    QueueFull,
)
from fastchat_grpc.rpc.api_keys import ApiKeys
from fastchat_grpc.rpc.bridge import (
    CHOICES_KEY,
    CLUSTER_HEADER,
    FINAL_KEY,
    GATEWAY_KEY,
    KEY_ONLY_KEY,
    MISSED_HEADER,
    PLACES_KEY,
    STREAM_HEADER,
    TICKET_HEADER,
)
from fastchat_grpc.rpc.pool import ChannelPool
from fastchat_grpc.rpc.security import JoinToken
from fastchat_grpc.rpc.status import error_to_status
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

    def __init__(
        self,
        *,
        keys: ApiKeyConfig = NO_KEYS,
        method: DispatchMethod = DispatchMethod.LOTTERY,
        settled: bool = True,
    ) -> None:
        self.registry = Registry()
        if settled:
            self.registry.settle()
        self.dispatcher = Dispatcher(self.registry, method)
        relay = Relay(self.dispatcher, ChannelPool(None, max_message_bytes=2**20), FailoverConfig())
        self.bridge = EnvoyServices(relay, ApiKeys(keys), JoinToken(None), settle_s=0.0)
        self.known: set[str] | None = None
        """Places that the gateway has; None: all."""
        self.extensions = {GATEWAY_KEY: "g", FINAL_KEY: "1"}
        self.bridge.endpoints.location = self._location  # type: ignore[method-assign]
        self.bridge.endpoints.cluster = lambda gateway: "workers_0"  # type: ignore[method-assign]

    def _location(self, worker: Worker, gateway: str) -> str | None:
        place = worker.spec.address
        return place if self.known is None or place in self.known else None

    def add(
        self,
        number: int,
        model: str = "m",
        weight: float = 1.0,
        load: Load = FREE,
        capabilities: frozenset[Capability] = frozenset(),
    ) -> Any:
        spec = WorkerSpec(
            worker_id=f"w{number}",
            instance_id=f"i{number}",
            address=f"127.0.0.1:{5000 + number}",
            models=(ModelInfo(name=model, context_length=10, capabilities=capabilities),),
            weight=weight,
        )
        return self.registry.register(spec, load)

    async def check(self, path: str, body: bytes, **headers: str) -> auth.CheckResponse:
        request = auth.CheckRequest()
        http = request.attributes.request.http
        http.path, http.raw_body = path, body
        request.attributes.context_extensions.update(self.extensions)
        for name, value in headers.items():
            http.headers[name.replace("_", "-")] = value
        return await self.bridge.picker.Check(request, Context())

    async def chat(self, **values: Any) -> auth.CheckResponse:
        return await self.check(CHAT, chat_body(**values))

    def tell(self, *entries: accesslog_pb2.HTTPAccessLogEntry) -> None:
        """What the access log says."""
        for entry in entries:
            self.bridge.completions.tell(entry)


def chat_body(**values: Any) -> bytes:
    return frame(HttpBody(data=json.dumps({"model": "m", **values}).encode()).SerializeToString())


def attempt(
    name: str, port: int, status: int | None = None, error: FastChatError | None = None, **flags: bool
) -> accesslog_pb2.HTTPAccessLogEntry:
    """The log's entry of an attempt at a worker, which answered or refused."""
    found = ended(name)
    common = found.common_properties
    common.access_log_type = accesslog_pb2.UpstreamEnd
    common.upstream_remote_address.socket_address.address = "127.0.0.1"
    common.upstream_remote_address.socket_address.port_value = port
    if status is not None:
        found.response.response_trailers["grpc-status"] = str(status)
    if error is not None:  # as grpc sends a refusal
        found.response.response_headers["grpc-status"] = str(int(error.code))
        details = base64.b64encode(error_to_status(error).SerializeToString()).decode().rstrip("=")
        found.response.response_headers["grpc-status-details-bin"] = details
    for flag, value in flags.items():
        setattr(common.response_flags, flag, value)
    return found


def ended(name: str) -> accesslog_pb2.HTTPAccessLogEntry:
    """The log's entry of a request that has ended."""
    found = accesslog_pb2.HTTPAccessLogEntry()
    found.request.request_headers[TICKET_HEADER] = name
    found.common_properties.access_log_type = accesslog_pb2.DownstreamEnd
    return found


def frame(message: bytes, compressed: bool = False) -> bytes:
    return bytes([compressed]) + len(message).to_bytes(4, "big") + message


def places(response: auth.CheckResponse) -> list[str]:
    named = dict(response.dynamic_metadata).get(PLACES_KEY, "")
    return named.split(",") if named else []


def refused(response: auth.CheckResponse) -> tuple[int, str]:
    assert response.WhichOneof("http_response") == "denied_response", response
    headers = {item.header.key: item.header.value for item in response.denied_response.headers}
    return response.denied_response.status.code, headers["grpc-message"]


def header(response: auth.CheckResponse, name: str) -> str:
    return next((item.header.value for item in response.ok_response.headers if item.header.key == name), "")


def ticket(response: auth.CheckResponse) -> str:
    return header(response, TICKET_HEADER)


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


# ------------------------------------------------------------------------------------ several controllers


async def test_a_controller_that_is_not_the_last_one_leaves_what_it_lacks_to_the_others(site: Site) -> None:
    del site.extensions[FINAL_KEY]
    response = await site.chat(model="nobody's")
    assert response.HasField("ok_response")
    assert places(response) == []
    assert header(response, CLUSTER_HEADER) == ""
    assert header(response, MISSED_HEADER) == "5"
    worker = site.add(1)
    site.registry.deregister(worker.lease_id)
    assert header(await site.chat(), MISSED_HEADER) == "14"
    # What one of them said of its workers is not forgotten by the next, which has never had any.
    told = await site.check(CHAT, chat_body(model="nobody's"), **{MISSED_HEADER: "14"})
    assert header(told, MISSED_HEADER) == "14"


async def test_the_last_controller_speaks_for_all(site: Site) -> None:
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
    monkeypatch.setattr(ext_authz, "YOUNG_PATIENCE_S", 0.05)
    site = Site(settled=False)
    assert refused(await site.chat())[0] == 503
    del site.extensions[FINAL_KEY]
    assert header(await site.chat(), MISSED_HEADER) == "14"


# ------------------------------------------------------------------------------------ attempts and ends


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
    assert (await after(error=ModelNotFound("x"))).health.suspect
    for error in (InvalidArgument("f", "x"), DeadlineExceeded("x"), Cancelled("x"), NotSupported("x")):
        worker = await after(error=error)
        assert not worker.health.suspect
        assert worker.ledger.room == 4
        assert worker.tier is Tier.READY


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
