"""API keys at the gateway: nobody passes without one, by any road; and nobody sees one."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
import subprocess
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest

from fastchat_grpc.config import ApiKeyConfig, TlsConfig
from fastchat_grpc.controller.envoy import names
from fastchat_grpc.rpc.api_keys import key_line, new_key
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.v1 import generation_pb2 as pb
from fastchat_grpc.v1 import generation_pb2_grpc, registry_pb2, registry_pb2_grpc
from tests.e2e.gateway_site import ADMIN_KEY, KEY, KEYS, Site, running_gateway, running_site

pytestmark = pytest.mark.slow

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
GENERATE = pb.GenerateRequest(model="echo", prompt="abc")
FRAMED = b"\0" + struct.pack(">I", GENERATE.ByteSize()) + GENERATE.SerializeToString()
GRPC_PATH = "/fastchat_grpc.v1.OpenAIService/ChatCompletions"
ROADS: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/v1/chat/completions", {"json": CHAT}),
    ("POST", "/v1/chat/completions", {"json": {**CHAT, "stream": True}}),
    ("POST", "/v1/completions", {"json": {"model": "echo", "prompt": "x"}}),
    ("POST", "/v1/embeddings", {"json": {"model": "echo", "input": "x"}}),
    ("POST", "/v1/generate", {"json": {"model": "echo", "prompt": "x"}}),
    ("POST", "/v1/embed", {"json": {"model": "echo", "inputs": [{"text": "x"}]}}),
    ("POST", "/v1/count_tokens", {"json": {"model": "echo", "prompt": "x"}}),
    ("POST", "/tokenize", {"json": {"model": "echo", "prompt": "x"}}),
    ("POST", "/detokenize", {"json": {"model": "echo", "tokens": [97]}}),
    ("POST", "/api/v1/token_check", {"json": {"prompts": [{"model": "echo", "prompt": "x", "max_tokens": 1}]}}),
    ("GET", "/v1/models", {}),
    ("GET", "/v1/models/echo", {}),
    ("GET", "/v1/workers", {}),
    ("GET", "/v1/fleet/models", {}),
    ("GET", "/v1/status", {}),
    ("POST", "/v1/chat/completions?x=1", {"json": CHAT}),
    ("POST", "//v1/chat/completions", {"json": CHAT}),
    ("POST", "/v1/./chat/completions", {"json": CHAT}),
    ("POST", GRPC_PATH, {"json": CHAT}),
    ("POST", GRPC_PATH, {"content": FRAMED, "headers": {"content-type": "application/grpc-web+proto"}}),
    (
        "POST",
        "/fastchat_grpc.v1.GenerationService/Generate",
        {"content": FRAMED, "headers": {"content-type": "application/grpc-web"}},
    ),
]


def _calls(site: Site) -> int:
    """Requests that reached a worker, of whatever kind."""
    return sum(worker._generation.output_tokens for worker in site.workers)


@pytest.mark.parametrize("mode", ["direct", "relay"])
async def test_without_a_key_no_road_leads_to_a_worker(mode: str) -> None:
    async with running_site(mode, controller={"api_keys": KEYS}) as site:
        for wrong in ({}, {"authorization": "Bearer sk-wrong"}, {"authorization": KEY}, {"x-api-key": "sk-wrong"}):
            for method, path, request in ROADS:
                headers = {**request.get("headers", {}), **wrong}
                reply = await site.http.request(method, path, **{**request, "headers": headers})
                told = reply.headers.get("grpc-status") or _grpc_web_status(reply)
                assert reply.status_code in (400, 401, 404, 415) or told == "16", (method, path, reply.status_code)
                if path in ("/v1/chat/completions", "/v1/models", "/v1/workers"):
                    assert reply.status_code == 401
                    assert reply.json()["error"]["type"] == "authentication_error"
                    assert reply.json()["error"]["code"] == "invalid_api_key"
        assert _calls(site) == 0
        assert (await site.http.get("/health")).status_code == 200


def _grpc_web_status(reply: httpx2.Response) -> str:
    _, _, rest = reply.content.partition(b"grpc-status:")
    return rest[:2].decode() if rest else ""


@pytest.mark.parametrize("mode", ["direct", "relay"])
async def test_with_a_key_every_road_of_the_api_is_open(mode: str) -> None:
    async with running_site(mode, controller={"api_keys": KEYS}) as site:
        for shown in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}, {"api-key": KEY}):
            for method, path, request in ROADS[:15]:
                reply = await site.http.request(method, path, **{**request, "headers": shown})
                assert reply.status_code == (403 if path == "/v1/workers" else 200), (path, reply.text)
        for shown in ({"authorization": f"Bearer {ADMIN_KEY}"}, {"x-api-key": ADMIN_KEY}):
            assert (await site.http.get("/v1/workers", headers=shown)).status_code == 200
        assert site.controller.keys.uses["alice"] > 0


@pytest.mark.parametrize("mode", ["direct", "relay"])
async def test_native_grpc_is_asked_for_the_same_key(mode: str) -> None:
    async with (
        running_site(mode, controller={"api_keys": KEYS}) as site,
        open_channel(site.gateway.address) as through,
        open_channel(site.controller.address) as straight,
    ):
        for channel in (through, straight):
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            for metadata in ((), (("authorization", "Bearer sk-wrong"),)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await _collect(stub.Generate(GENERATE, metadata=metadata))
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            good = (("authorization", f"Bearer {KEY}"),)
            assert await _collect(stub.Generate(GENERATE, metadata=good)) == "abc"
            registry = registry_pb2_grpc.ControllerServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await registry.ListWorkers(registry_pb2.ListWorkersRequest())
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await registry.ListWorkers(registry_pb2.ListWorkersRequest(), metadata=good)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            admin = (("authorization", f"Bearer {ADMIN_KEY}"),)
            assert len((await registry.ListWorkers(registry_pb2.ListWorkersRequest(), metadata=admin)).workers) == 1


async def _collect(call: Any) -> str:
    return "".join([event.delta.text async for event in call])


async def test_a_json_request_reaches_the_picker() -> None:
    """With the wrong kind of `disabled` on another route, transcoded requests skip the check altogether."""
    async with running_site(controller={"api_keys": KEYS}, key=KEY) as site:
        before = site.controller.keys.uses["alice"]
        assert (await site.chat()).status_code == 200
        assert site.controller.keys.uses["alice"] == before + 1
        assert (await site.http.get("/v1/models")).status_code == 200
        assert (await site.chat(temperature="x")).status_code == 400  # a wrong type: the worker looked at it


async def test_the_log_has_the_name_of_the_key_and_never_the_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    log = tmp_path / "access.log"
    async with running_site(controller={"api_keys": KEYS}, key=KEY, access_log=str(log)) as site:
        assert (await site.chat("a secret prompt")).status_code == 200
        assert (await site.http.get("/v1/models", headers={"authorization": "Bearer sk-wrong-one"})).status_code == 401
        await site.gateway.stop()
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    (entry,) = [line for line in lines if line["path"] == "/v1/chat/completions"]
    assert entry["client"] == "alice"
    assert entry["model"] == "echo"
    text = log.read_text() + caplog.text
    for secret in (KEY, "sk-wrong-one", "a secret prompt"):
        assert secret not in text


async def test_the_key_goes_no_further_than_the_picker_and_its_name_does() -> None:
    async with running_site(controller={"api_keys": KEYS}, key=KEY) as site:
        seen: list[dict[str, str]] = []
        from fastchat_grpc.openai import servicer

        original = servicer.request_id

        def spy(given: str, metadata: Any) -> str:
            seen.append(dict(metadata))
            return original(given, metadata)

        servicer.request_id = spy
        try:
            headers = {"x-fastchat-client": "mallory", "x-fastchat-ticket": "forged"}
            assert (await site.http.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200
        finally:
            servicer.request_id = original
        assert seen[0]["x-fastchat-client"] == "alice"
        assert seen[0]["x-fastchat-ticket"] != "forged"
        assert "authorization" not in seen[0]
        assert KEY not in str(seen)


async def test_a_key_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    first, second = new_key(), new_key()
    path = tmp_path / "keys"
    path.write_text(f"# who may ask\n{key_line('first', first)}\n")
    async with running_site(controller={"api_keys": ApiKeyConfig(file=path)}) as site:
        assert await _status(site, first) == 200
        assert await _status(site, second) == 401
        path.write_text(key_line("second", second) + "\n")
        async with asyncio.timeout(10):
            while await _status(site, second) != 200:
                await asyncio.sleep(0.1)
        assert await _status(site, first) == 401
        path.write_text("nonsense\n")
        await asyncio.sleep(1.2)
        assert await _status(site, second) == 200


async def _status(site: Site, key: str) -> int:
    return (await site.http.get("/v1/models", headers={"x-api-key": key})).status_code


async def test_a_gateway_without_the_join_token_picks_nothing() -> None:
    async with running_site(controller={"join_token": "fleet-secret"}, workers=[], join_token="fleet-secret") as site:
        await site.add_worker(join_token="fleet-secret")
        assert (await site.chat()).status_code == 200
        async with running_gateway(site) as stranger, httpx2.AsyncClient(trust_env=False) as http:
            reply = await http.post(f"http://{stranger.address}/v1/chat/completions", json=CHAT)
            assert reply.status_code == 503


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, Path]:
    """An authority, and a certificate of it for 127.0.0.1."""

    def openssl(arguments: str) -> None:
        subprocess.run(["openssl", *arguments.split()], check=True, capture_output=True, cwd=tmp_path)

    openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=test-ca")
    openssl("req -newkey rsa:2048 -nodes -keyout host.key -out host.csr -subj /CN=host")
    (tmp_path / "san").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    openssl("x509 -req -in host.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san -out host.pem")
    return {name: tmp_path / f"{name}.pem" for name in ("ca", "host")} | {"key": tmp_path / "host.key"}


async def test_tls_before_and_behind_the_gateway(certificates: dict[str, Path]) -> None:
    mutual = TlsConfig(cert=certificates["host"], key=certificates["key"], ca=certificates["ca"])
    front = TlsConfig(cert=certificates["host"], key=certificates["key"])
    async with running_site(hop_tls=mutual, tls=front, tls_port=0) as site:
        context = ssl.create_default_context(cafile=str(certificates["ca"]))
        url = f"https://{site.gateway.tls_address}"
        async with httpx2.AsyncClient(base_url=url, verify=context, trust_env=False) as http:
            reply = await http.post("/v1/chat/completions", json=CHAT)
        assert reply.json()["choices"][0]["message"]["content"] == "hello"
        async with open_channel(site.gateway.tls_address, TlsConfig(ca=certificates["ca"])) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            assert await _collect(stub.Generate(GENERATE)) == "abc"
        with pytest.raises(grpc.aio.AioRpcError):  # a worker takes no caller without a certificate
            async with open_channel(site.workers[0].address, TlsConfig(ca=certificates["ca"])) as channel:
                await _collect(generation_pb2_grpc.GenerationServiceStub(channel).Generate(GENERATE, timeout=5))
        async with running_gateway(site, upstream_tls=None) as bare, httpx2.AsyncClient(trust_env=False) as client:
            reply = await client.post(f"http://{bare.address}/v1/chat/completions", json=CHAT)
            assert reply.status_code == 503


async def test_callers_can_be_asked_for_a_certificate(certificates: dict[str, Path]) -> None:
    mutual = TlsConfig(cert=certificates["host"], key=certificates["key"], ca=certificates["ca"])
    async with running_site(tls=mutual, tls_port=0) as site:
        context = ssl.create_default_context(cafile=str(certificates["ca"]))
        url = f"https://{site.gateway.tls_address}/v1/models"
        with pytest.raises((httpx2.HTTPError, ssl.SSLError)):
            async with httpx2.AsyncClient(verify=context, trust_env=False) as stranger:
                await stranger.get(url)
        context.load_cert_chain(str(certificates["host"]), str(certificates["key"]))
        async with httpx2.AsyncClient(verify=context, trust_env=False) as member:
            assert (await member.get(url)).status_code == 200


async def test_a_certificate_of_the_authority_is_not_enough(certificates: dict[str, Path]) -> None:
    """It must be of the host that is connected to, or have a name that is asked for."""
    mutual = TlsConfig(cert=certificates["host"], key=certificates["key"], ca=certificates["ca"])

    async def status(site: Site, **settings: Any) -> int:
        async with running_gateway(site, probe=False, **settings) as gateway:
            async with httpx2.AsyncClient(trust_env=False) as client:
                reply = await client.post(f"http://{gateway.address}/v1/chat/completions", json=CHAT)
                return reply.status_code

    async with running_site(hop_tls=mutual) as site:
        assert await status(site, upstream_sans=("127.0.0.1",)) == 200
        assert await status(site, upstream_sans=("other.example", "localhost")) == 200
        assert await status(site, upstream_sans=("other.example", "spiffe://fleet/*")) == 503


async def test_a_worker_that_is_known_by_a_name_must_have_a_certificate_of_it(
    certificates: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutual = TlsConfig(cert=certificates["host"], key=certificates["key"], ca=certificates["ca"])

    def addresses(host: str, port: int) -> list[tuple[int, str]]:
        return [(socket.AF_INET, "127.0.0.1")]

    monkeypatch.setattr(names, "_addresses", addresses)
    async with running_site(hop_tls=mutual, workers=[]) as site:
        for host, status in (("localhost", 200), ("another.example", 503)):
            worker = await site.add_worker(host, advertised_host=host)
            reply = await site.http.post("/v1/chat/completions", json={**CHAT, "model": host})
            assert reply.status_code == status, reply.text
            assert worker.registered


async def test_with_tls_the_port_without_it_is_closed(certificates: dict[str, Path]) -> None:
    front = TlsConfig(cert=certificates["host"], key=certificates["key"], ca=certificates["ca"])
    async with running_site() as site:
        async with running_gateway(site, probe=False, tls=front, tls_port=0, plaintext=False) as gateway:
            assert gateway.address == ""
            assert gateway.tls_address
