"""HTTP as it comes: raw requests in each mode of the gateway, read byte by byte as no client library would."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from fastchat_grpc.config import GatewayMode
from tests.e2e.gateway_site import Site, running_site

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
MODES = ("direct", "relay", "sidecar")
ORIGIN = "http://localhost:3000"
ALLOWED = "https://chat.example.org"
JSON = "application/json"
CHAT = {"model": "org/echo", "messages": [{"role": "user", "content": "hello"}]}
IDLE_S = 1.5


@dataclass
class Answer:
    """What came back, and whether the connection was left fit for another request."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert self.headers["content-type"] == JSON
        return error  # type: ignore[no-any-return]


class Connection:
    """One connection of HTTP/1. It knows where an answer ends, and complains of every byte too many."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, method: str, path: str, body: bytes = b"", *, version: str = "1.1", **headers: str) -> Answer:
        lines = [f"{method} {path} HTTP/{version}"]
        given = {"host": "gateway", **{name.replace("_", "-"): value for name, value in headers.items()}}
        if body:
            given.setdefault("content-length", str(len(body)))
        lines += [f"{name}: {value}" for name, value in given.items() if value]
        self._writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        async with asyncio.timeout(30):
            return await self._read(bodyless=method == "HEAD")

    async def _read(self, *, bodyless: bool) -> Answer:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in head[1:] if line)}
        status = int(head[0].split()[1])
        body = b""
        if bodyless or status in (204, 304):
            pass
        elif headers.get("transfer-encoding") == "chunked":
            while size := int(await self._reader.readline(), 16):
                body += await self._reader.readexactly(size)
                await self._reader.readexactly(2)
            await self._reader.readexactly(2)
        elif "content-length" in headers:
            body = await self._reader.readexactly(int(headers["content-length"]))
        else:
            body = await self._reader.read()
        return Answer(status, headers, body)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=MODES)
async def site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    """A fleet of one slow-speaking worker, whose gateway has little patience."""
    worker = {"model": "org/echo", "context_length": 4_000_000, "options": {"delay_ms": "0"}}
    origins = ("http://localhost:*", "https://*.example.org")
    async with running_site(request.param, [worker], idle_timeout_s=IDLE_S, allowed_origins=origins) as found:
        yield found


@asynccontextmanager
async def connection(site: Site) -> AsyncIterator[Connection]:
    """A connection to the gateway."""
    host, _, port = site.gateway.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**26)
    yield Connection(reader, writer)
    writer.close()


@pytest_asyncio.fixture(loop_scope="module")
async def http(site: Site) -> AsyncIterator[Connection]:
    """A connection to the gateway."""
    async with connection(site) as http:
        yield http


async def chat(http: Connection, body: bytes = json.dumps(CHAT).encode(), **headers: str) -> Answer:
    headers.setdefault("content_type", JSON)
    return await http.ask("POST", "/v1/chat/completions", body, **headers)


def text_of(answer: Answer) -> str:
    assert answer.status == 200, answer.body[:300]
    return str(json.loads(answer.body)["choices"][0]["message"]["content"])


# ------------------------------------------------------------------------------------ methods and versions


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/models", 200),
        ("/v1/models/org/echo", 200),
        ("/v1/models/nope", 404),
        ("/v1/chat/completions", 404),
        ("/nothing", 404),
        ("/health", 200),
        ("/version", 200),
        ("/", 200),
    ],
)
async def test_head_is_answered_as_get_is_and_without_a_body(http: Connection, path: str, status: int) -> None:
    for _ in range(2):
        head = await http.ask("HEAD", path)
        assert head.status == status
        # A body would now be read as the head of this answer.
        assert (await http.ask("GET", "/v1/models")).status == 200
    whole = await http.ask("GET", path)
    assert whole.status == status
    # RFC 9110, 8.6: it tells the length of what GET would bring, or nothing.
    assert head.headers.get("content-length", str(len(whole.body))) == str(len(whole.body))


async def test_head_of_a_watch_ends(site: Site, http: Connection) -> None:
    for path in ("/v1/workers:watch", "/v1/workers:watch?x=1"):
        watched = site.gateway.mode is not GatewayMode.SIDECAR
        assert (await http.ask("HEAD", path)).status == (200 if watched else 404)
    assert (await http.ask("HEAD", "/v1/models/a:watch")).status == 404


async def test_what_envoy_refuses_itself_is_said_in_words(http: Connection) -> None:
    for method, path in (("GET", "/nothing"), ("PUT", "/v1/chat/completions"), ("GET", "/v1/chat/completions")):
        answer = await http.ask(method, path, content_type=JSON)
        assert answer.status == 404
        assert "no such path" in answer.error["message"]
    answer = await http.ask("GET", "/v1/models/%00")
    assert answer.status == 400
    assert "not a valid HTTP request" in answer.error["message"]


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/version"])
async def test_http_1_0_is_spoken(http: Connection, path: str) -> None:
    assert (await http.ask("GET", path, version="1.0", host="")).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_over_http_1_0_ends_with_its_connection(http: Connection, stream: bool) -> None:
    body = json.dumps({**CHAT, "stream": stream}).encode()
    answer = await chat(http, body, version="1.0")
    assert answer.status == 200
    assert "transfer-encoding" not in answer.headers
    assert answer.body.endswith(b"data: [DONE]\n\n") == stream


@pytest.mark.parametrize(
    "path",
    ["/health", "/health/", "/health?verbose=1", "/healthz", "/readyz", "/livez", "/ping", "/", "/?x=1", "/version"],
)
async def test_probes_of_all_kinds_are_answered(http: Connection, path: str) -> None:
    if path == "/readyz":  # Envoy asks the controllers from time to time, so it learns of a first worker a moment later
        async with asyncio.timeout(10):
            while (await http.ask("GET", path)).status == 503:
                await asyncio.sleep(0.1)
    assert (await http.ask("GET", path)).status == 200
    assert (await http.ask("HEAD", path)).status == 200


# ------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["org/echo", "org%2Fecho", "org%2fecho", "%6frg%2Fecho"])
async def test_a_models_name_may_be_percent_encoded(http: Connection, name: str) -> None:
    answer = await http.ask("GET", f"/v1/models/{name}")
    assert answer.status == 200, answer.body
    assert json.loads(answer.body)["id"] == "org/echo"


# ------------------------------------------------------------------------------------ bodies


@pytest.mark.parametrize(
    "kind", [JSON, "application/json; charset=utf-8", "application/json;charset=UTF-8", "Application/JSON", "text/json"]
)
async def test_json_is_taken_under_its_names(http: Connection, kind: str) -> None:
    assert text_of(await chat(http, content_type=kind)) == "hello"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/v1/generate"]
)
async def test_nothing_else_is(http: Connection, kind: str, path: str) -> None:
    """A page of a foreign origin may send these without asking: it must not drive a gateway that asks no key."""
    answer = await http.ask("POST", path, json.dumps(CHAT).encode(), content_type=kind, origin="https://evil.example")
    assert answer.status == 415
    assert "application/json" in answer.error["message"]
    assert "access-control-allow-origin" not in answer.headers


async def test_nor_is_it_in_pieces(http: Connection) -> None:
    pieces = b"%x\r\n%s\r\n0\r\n\r\n" % (len(json.dumps(CHAT)), json.dumps(CHAT).encode())
    for kind, status in ((JSON, 200), ("text/plain", 415)):
        answer = await chat(http, pieces, content_type=kind, transfer_encoding="chunked", content_length="")
        assert answer.status == status


async def test_a_gzipped_body_is_unpacked(http: Connection) -> None:
    squeezed = gzip.compress(json.dumps(CHAT).encode())
    for name in ("gzip", "x-gzip", "GZIP"):
        assert text_of(await chat(http, squeezed, content_encoding=name)) == "hello"
    for name in ("identity", " "):
        assert text_of(await chat(http, content_encoding=name)) == "hello"


@pytest.mark.parametrize("name", ["br", "zstd", "gzip, gzip"])
async def test_other_encodings_are_refused_by_name(http: Connection, name: str) -> None:
    answer = await chat(http, b"xx", content_encoding=name)
    assert answer.status == 415
    assert "content-encoding" in answer.error["message"]
    assert answer.error["param"] == "content-encoding"


async def test_a_body_that_unpacks_to_too_much_is_refused(http: Connection) -> None:
    bomb = gzip.compress(b'{"model": "' + b"x" * 500_000_000 + b'"}', 9)
    assert len(bomb) < 1_000_000
    answer = await chat(http, bomb, content_encoding="gzip")
    assert answer.status in (400, 413)


async def test_what_is_not_gzip_is_the_callers_fault(site: Site) -> None:
    two = gzip.compress(json.dumps(CHAT).encode()[:9]) + gzip.compress(json.dumps(CHAT).encode()[9:])
    # Of a body that unpacks to more than a hundred times its size, Envoy passes on a part.
    dense = gzip.compress(json.dumps({**CHAT, "messages": [{"role": "user", "content": "y" * 3_000_000}]}).encode())
    for body in (b"\x1f\x8bnonsense", two, dense):
        async with connection(site) as http:
            answer = await chat(http, body, content_encoding="gzip")
        assert answer.status == 400
        assert "as unpacked from gzip" in answer.error["message"]


async def test_large_bodies_and_large_answers_pass(http: Connection) -> None:
    text = "x" * 2_000_000
    body = json.dumps({**CHAT, "messages": [{"role": "user", "content": text}], "max_tokens": 5}).encode()
    assert text_of(await chat(http, body)) == "xxxxx"
    tokens = await http.ask(
        "POST", "/tokenize", json.dumps({"model": "org/echo", "prompt": text}).encode(), content_type=JSON
    )
    assert tokens.status == 200, tokens.body[:300]
    assert len(tokens.body) > 7_000_000
    assert len(json.loads(tokens.body)["tokens"]) == len(text)


async def test_a_large_answer_of_a_picked_worker_passes(http: Connection) -> None:
    asked = {"model": "org/echo", "prompt": "x" * 4000, "echo": True, "logprobs": 5, "max_tokens": 1, "n": 100}
    answer = await http.ask("POST", "/v1/completions", json.dumps(asked).encode(), content_type=JSON)
    assert answer.status == 200, answer.body[:300]
    assert len(answer.body) > 8_500_000
    assert len(json.loads(answer.body)["choices"]) == 100


async def test_an_answer_that_is_larger_than_a_message_is_no_reason_to_come_again(http: Connection) -> None:
    body = json.dumps({"model": "org/echo", "prompt": "x" * 6_000_000}).encode()
    answer = await http.ask("POST", "/tokenize", body, content_type=JSON)
    assert answer.status == 400
    assert "a message has at most 16777216; ask for less at a time" in answer.error["message"]
    assert answer.error["code"] == "answer_too_large"
    assert "retry-after" not in answer.headers


# ------------------------------------------------------------------------------------ headers


async def test_twenty_kilobytes_of_cookies_are_no_trouble(http: Connection) -> None:
    for _ in range(3):
        assert text_of(await chat(http, cookie="a=" + "x" * 20_000)) == "hello"
    assert (await http.ask("GET", "/v1/models", cookie="a=" + "x" * 20_000)).status == 200
    assert text_of(await chat(http, x_own="x" * 20_000)) == "hello"


@pytest.mark.parametrize("count", [60, 88, 94])
async def test_headers_may_be_many(http: Connection, count: int) -> None:
    answer = await chat(http, **{f"x_extra_{i}": "1" for i in range(count)})
    assert answer.status == 200, answer.body


async def test_headers_beyond_ascii_reach_no_log(http: Connection, caplog: pytest.LogCaptureFixture) -> None:
    for headers in ({"x_request_id": "a\u00e9"}, {"authorization": "Bearer sk-cl\u00e9"}, {"x_name": "J\u00f8rgen"}):
        assert text_of(await chat(http, **headers)) == "hello"
        assert (await http.ask("GET", "/v1/models", **headers)).status == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_headers_that_cannot_be_left_out_have_a_bound(http: Connection) -> None:
    answer = await chat(http, user_agent="x" * 20_000)
    assert answer.status == 431
    assert answer.error["type"] == "invalid_request_error"


async def test_a_request_that_is_not_http_is_answered_in_openais_shape(http: Connection) -> None:
    answer = await http.ask("GET", "/v1/models", x_large="x" * 100_000)
    assert answer.status == 431
    assert answer.error["type"] == "invalid_request_error"


# ------------------------------------------------------------------------------------ pages of the web


@pytest.mark.parametrize(
    ("method", "path", "values"),
    [
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/nope", None),
        ("GET", "/nothing", None),
        ("GET", "/version", None),
        ("GET", "/health", None),
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/chat/completions", {**CHAT, "stream": True}),
        ("POST", "/v1/chat/completions", {**CHAT, "temperature": -1}),
        ("POST", "/v1/chat/completions", {**CHAT, "model": "nope"}),
        ("POST", "/tokenize", {"model": "org/echo", "prompt": "x"}),
        ("POST", "/v1/generate", {"model": "org/echo", "prompt": "x"}),
    ],
)
async def test_every_answer_may_be_read_by_an_allowed_page(
    http: Connection, method: str, path: str, values: dict[str, Any] | None
) -> None:
    body = json.dumps(values).encode() if values is not None else b""
    kind = JSON if values is not None else ""
    answer = await http.ask(method, path, body, content_type=kind, origin=ORIGIN)
    assert answer.headers.get("access-control-allow-origin") == ORIGIN, (answer.status, answer.headers)
    assert "retry-after" in answer.headers["access-control-expose-headers"]
    foreign = await http.ask(method, path, body, content_type=kind, origin="https://evil.example")
    assert "access-control-allow-origin" not in foreign.headers


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://evil.example:8000", 403),
        ("https://127.0.0.1.evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("http://localhost:8000", 200),
        ("http://app.localhost:8000", 200),
        ("http://127.0.0.1:8000", 200),
        ("http://[::1]:8000", 200),
        (ALLOWED, 200),
    ],
)
async def test_a_page_whose_name_was_turned_here_drives_no_gateway_of_this_machine(
    http: Connection, origin: str, status: int
) -> None:
    """For a browser it is where the page came from (DNS rebinding): nothing is asked before, and all can be read."""
    answer = await chat(http, host=origin.partition("://")[2], origin=origin)
    assert answer.status == status, answer.body
    if status == 403:
        assert "--allowed-origin" in answer.error["message"]


async def test_who_is_no_page_of_that_name_is_not_refused_for_it(http: Connection) -> None:
    assert text_of(await chat(http, host="models.example:8000")) == "hello"  # a proxy on this machine
    for origin in ("chrome-extension://abc", "null", "https://evil.example"):  # whose browser keeps the answer
        assert text_of(await chat(http, host="127.0.0.1:8000", origin=origin)) == "hello"


async def test_a_preflight_allows_whatever_headers_are_asked_for(http: Connection) -> None:
    asked = "authorization,content-type,x-stainless-helper-method,x-stainless-poll-helper,openai-beta,traceparent"
    answer = await http.ask(
        "OPTIONS",
        "/v1/chat/completions",
        origin=ORIGIN,
        access_control_request_method="POST",
        access_control_request_headers=asked,
        access_control_request_private_network="true",
    )
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    # Fetch: "*" stands for every header but authorization, which has to be named.
    allowed = {name.strip() for name in answer.headers["access-control-allow-headers"].split(",")}
    assert {"*", "authorization"} <= allowed
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-private-network"] == "true"
    foreign = await http.ask(
        "OPTIONS", "/v1/chat/completions", origin="https://evil.example", access_control_request_method="POST"
    )
    assert "access-control-allow-origin" not in foreign.headers


# ------------------------------------------------------------------------------------ time


async def test_a_connection_may_be_idle_between_requests(http: Connection) -> None:
    assert text_of(await chat(http)) == "hello"
    await asyncio.sleep(IDLE_S + 0.3)
    assert text_of(await chat(http)) == "hello"
