"""The gateway: what goes through Envoy, in each of its modes."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import struct
from typing import Any

import grpc
import pytest

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import GatewayConfig
from fastchat_grpc.errors import ConfigError, InvalidArgument, ModelNotFound
from fastchat_grpc.gateway.app import GatewayApp
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.v1 import generation_pb2 as pb
from fastchat_grpc.v1 import generation_pb2_grpc, registry_pb2, registry_pb2_grpc
from tests.conftest import eventually
from tests.e2e.gateway_site import Site, content, running_site, sse

pytestmark = pytest.mark.slow
MODES = ("direct", "relay", "sidecar")
JSON_HEAD = "content-type: application/json\r\n"


@pytest.mark.parametrize("mode", MODES)
async def test_every_path_of_the_api_answers(mode: str) -> None:
    async with running_site(mode) as site:
        assert (await site.http.get("/health")).status_code == 200
        models = (await site.http.get("/v1/models")).json()
        assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [("echo", 4096)]
        assert (await site.http.get("/v1/models/echo")).json()["id"] == "echo"
        reply = await site.chat("hello")
        assert reply.headers["content-type"] == "application/json"
        assert not [name for name in reply.headers if name.startswith("grpc")]
        assert reply.json()["choices"][0]["message"]["content"] == "hello"
        events = [event async for event in site.stream("hello", stream_options={"include_usage": True})]
        assert content(events) == "hello"
        assert events[0]["choices"][0]["delta"]["role"] == "assistant"
        assert events[-2]["usage"]["completion_tokens"] == 6
        assert events[-1] == "[DONE]"
        text = await site.http.post("/v1/completions", json={"model": "echo", "prompt": "abc", "max_tokens": 2})
        assert text.json()["choices"][0]["text"] == "ab"
        vectors = await site.http.post("/v1/embeddings", json={"model": "echo", "input": ["a", "b"]})
        assert len(vectors.json()["data"]) == 2
        counted = await site.http.post("/tokenize", json={"model": "echo", "prompt": "abc"})
        assert counted.json()["tokens"] == [97, 98, 99]
        back = await site.http.post("/detokenize", json={"model": "echo", "tokens": [97, 98]})
        assert back.json() == {"prompt": "ab"}
        check = {"prompts": [{"model": "echo", "prompt": "abc", "max_tokens": 5}]}
        fits = await site.http.post("/api/v1/token_check", json=check)
        assert fits.json()["prompts"][0]["fits"] is True


async def test_typed_generation_streams_as_events_and_the_fleet_can_be_read() -> None:
    async with running_site() as site:
        body = {"model": "echo", "prompt": "abc", "sampling": {"temperature": 0}}
        async with site.http.stream("POST", "/v1/generate", json=body) as response:
            assert response.headers["content-type"] == "text/event-stream"
            events = [event async for event in sse(response)]
        assert "".join(event["delta"]["text"] for event in events if "delta" in event) == "abc"
        assert events[-1]["completion"]["finish_reason"] == "FINISH_REASON_STOP"
        workers = (await site.http.get("/v1/workers")).json()["workers"]
        assert [worker["address"] for worker in workers] == [site.workers[0].address]
        one = (await site.http.get(f"/v1/workers/{workers[0]['worker_id']}")).json()["worker"]
        assert one["address"] == site.workers[0].address
        none = (await site.http.get("/v1/workers", params={"worker_id_prefix": "none of these"})).json()["workers"]
        assert none == []
        pick = await site.http.post("/v1/workers:pick", json={"model": "echo"})
        assert pick.status_code == 403, "for those who can reach workers and the controller themselves"
        assert (await site.http.get("/v1/workers:pick")).status_code == 404, "what changes something is no GET"
        models = (await site.http.get("/v1/fleet/models")).json()["models"]
        assert models[0]["worker_count"] == 1
        info = (await site.http.get("/v1/model_info", params={"model": "echo"})).json()
        assert info["model"]["context_length"] == 4096
        async with site.http.stream("GET", "/v1/workers:watch") as watched:
            first = await anext(sse(watched))
        assert first["changes"][0]["type"] == "WORKER_CHANGE_TYPE_ADDED"


async def test_native_grpc_goes_through_the_same_listener() -> None:
    async with running_site() as site, AsyncClient(site.gateway.address) as client:
        assert "".join([getattr(event, "text", "") async for event in client.generate("abc", model="echo")]) == "abc"
        with pytest.raises(ModelNotFound):
            _ = [event async for event in client.generate("abc", model="nope")]
        with pytest.raises(InvalidArgument) as caught:
            _ = [event async for event in client.generate("", model="echo")]
        assert caught.value.field == "prompt"
        assert [worker.address for worker in await client.workers()] == [site.workers[0].address]


async def test_the_fleet_cannot_be_changed_through_the_gateway() -> None:
    async with running_site() as site:
        worker_id = site.workers[0].worker_id
        refused = await site.http.post(f"/v1/workers/{worker_id}:drain", json={})
        assert refused.status_code == 403
        assert refused.json()["error"]["type"] == "permission_error"
        async with open_channel(site.gateway.address) as channel:
            stub = registry_pb2_grpc.ControllerServiceStub(channel)
            for method in (stub.Register, stub.Heartbeat, stub.Deregister, stub.DrainWorker, stub.RefreshWorkers):
                with pytest.raises(Exception, match="PERMISSION_DENIED"):
                    await method(registry_pb2.RegisterRequest())
            for path in ("/envoy.service.auth.v3.Authorization/Check", "/grpc.channelz.v1.Channelz/GetServers"):
                with pytest.raises(Exception, match="UNIMPLEMENTED"):
                    await channel.unary_unary(path)(b"")
        assert (await site.chat()).status_code == 200


async def test_grpc_web_and_cors_serve_a_web_page() -> None:
    async with running_site() as site:
        message = pb.GenerateRequest(model="echo", prompt="abc").SerializeToString()
        framed = b"\0" + struct.pack(">I", len(message)) + message
        kind = "application/grpc-web-text"
        headers = {"content-type": kind, "accept": kind, "origin": "http://localhost:3000", "x-grpc-web": "1"}
        reply = await site.http.post(
            "/fastchat_grpc.v1.GenerationService/Generate", content=base64.b64encode(framed), headers=headers
        )
        assert reply.headers["access-control-allow-origin"] == "http://localhost:3000"
        data = b"".join(base64.b64decode(part + "=" * (-len(part) % 4)) for part in reply.text.split("=") if part)
        assert pb.GenerateResponse.FromString(data[5 : 5 + data[4]]).delta.text == "a"
        assert b"grpc-status:0" in data
        preflight = {
            "origin": "http://127.0.0.1:8080",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        answer = await site.http.options("/v1/chat/completions", headers=preflight)
        assert answer.status_code == 200
        assert "authorization" in answer.headers["access-control-allow-headers"]
        stranger = await site.http.options(
            "/v1/chat/completions", headers={**preflight, "origin": "https://evil.example"}
        )
        assert "access-control-allow-origin" not in stranger.headers


async def test_a_stream_reaches_the_caller_token_by_token() -> None:
    async with running_site(workers=[{"options": {"delay_ms": "50"}}]) as site:
        times = []
        async for event in site.stream("0123456789" * 2):
            if event != "[DONE]" and event["choices"][0]["delta"].get("content"):
                times.append(asyncio.get_running_loop().time())
        assert len(times) > 5
        assert times[-1] - times[0] > 0.5


async def test_a_caller_that_leaves_stops_its_generation() -> None:
    async with running_site(workers=[{"options": {"delay_ms": "20"}}]) as site:
        stream = site.stream("x" * 2000, max_tokens=2000)
        await anext(stream)
        assert site.running == 1
        await stream.aclose()
        await eventually(lambda: site.running == 0, timeout_s=1.0)
        # A whole reply is given up, too, when nobody waits for it.
        task = asyncio.create_task(site.chat("x" * 2000, max_tokens=2000))
        await eventually(lambda: site.running == 1)
        task.cancel()
        await eventually(lambda: site.running == 0, timeout_s=1.0)


async def test_reservations_end_with_their_requests() -> None:
    async with running_site(workers=[{}, {}]) as site:
        bridge = site.controller.bridge
        assert bridge is not None
        await asyncio.gather(*(site.chat(f"hello {i}") for i in range(20)))
        assert (await site.chat("x", temperature=-1)).status_code == 400
        await eventually(lambda: len(bridge.tickets) == 0)
        await eventually(lambda: all(worker.reserved_count == 0 for worker in site.controller.registry.workers()))


async def test_picking_spreads_requests_over_the_workers_of_a_model() -> None:
    slow = {"options": {"delay_ms": "10"}}
    async with running_site(workers=[slow, slow, {"model": "other"}]) as site:
        tasks = [asyncio.create_task(site.chat("x" * 60)) for _ in range(10)]
        await eventually(lambda: site.running == 10)
        assert [worker._generation.admission.running for worker in site.workers] == [5, 5, 0]
        assert [(await task).status_code for task in tasks] == [200] * 10
        other = await site.http.post("/v1/completions", json={"model": "other", "prompt": "x"})
        assert other.json()["model"] == "other"


async def test_a_worker_that_joins_is_used_and_one_that_drains_finishes_its_streams() -> None:
    async with running_site(workers=[{"drain_timeout_s": 10.0, "options": {"delay_ms": "10"}}]) as site:
        first = site.workers[0]
        stream = site.stream("x" * 100)
        events = [await anext(stream)]
        await site.add_worker()
        leaving = asyncio.create_task(first.stop())
        await eventually(lambda: len(site.controller.registry) == 1)
        for i in range(5):
            assert (await site.chat(f"hello {i}")).json()["choices"][0]["message"]["content"] == f"hello {i}"
        events += [event async for event in stream]
        assert content(events) == "x" * 100
        await leaving


async def test_the_clients_request_id_goes_all_the_way() -> None:
    async with running_site() as site:
        reply = await site.http.post(
            "/v1/chat/completions",
            json={"model": "echo", "messages": [{"role": "user", "content": "x"}]},
            headers={"x-request-id": "mine-123"},
        )
        assert reply.headers["x-request-id"] == "mine-123"


async def test_envoy_is_started_again_when_it_dies() -> None:
    async with running_site() as site:
        # A port of its own choice would change; this test is about the process.
        before = site.gateway.pid
        os.kill(before, signal.SIGKILL)
        await eventually(lambda: site.gateway.pid not in (before, 0), timeout_s=20)


async def test_stopping_the_gateway_lets_running_streams_end() -> None:
    async with running_site(workers=[{"options": {"delay_ms": "10"}}], drain_timeout_s=10.0) as site:
        stream = site.stream("x" * 100)
        events = [await anext(stream)]
        stopping = asyncio.create_task(site.gateway.stop())
        events += [event async for event in stream]
        assert content(events) == "x" * 100
        await asyncio.wait_for(stopping, 10)


async def test_a_taken_port_is_said_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        app = GatewayApp(GatewayConfig(port=taken.getsockname()[1]))
        with pytest.raises(ConfigError, match="port is in use"):
            await app.start()
        await app.stop()


async def test_a_second_gateway_does_not_share_the_port_of_the_first() -> None:
    async with running_site() as site:
        port = int(site.gateway.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match="in use"):
            await GatewayApp(GatewayConfig(port=port, controller_addresses=("127.0.0.1:1",))).start()
        assert (await site.chat()).status_code == 200


async def test_a_gateway_that_is_killed_takes_envoy_with_it() -> None:
    code = (
        "import asyncio, time\n"
        "from fastchat_grpc.config import GatewayConfig\n"
        "from fastchat_grpc.gateway.app import GatewayApp\n"
        "async def main():\n"
        "    app = GatewayApp(GatewayConfig(port=0, concurrency=1))\n"
        "    await app.start()\n"
        "    print(app.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    import sys

    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    pid = int(await asyncio.wait_for(process.stdout.readline(), 30))
    process.kill()
    await process.wait()
    await eventually(lambda: not _alive(pid))


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------------- errors of the bridge


async def _raw(site: Site, request: bytes, timeout_s: float = 10.0) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of a request that no HTTP library would send."""
    host, _, port = site.gateway.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        async with asyncio.timeout(timeout_s):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in head[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        return int(head[0].split()[1]), headers, json.loads(body)
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v2", 404),
        ("POST", "/v1/models", 405),
        ("DELETE", "/v1/chat/completions", 405),
        ("POST", "/v1//chat/../../etc", 404),
    ],
)
async def test_paths_and_methods_that_do_not_exist_are_answered_in_openais_shape(
    method: str, path: str, status: int
) -> None:
    async with running_site() as site:
        found, headers, body = await _raw(
            site, f"{method} {path} HTTP/1.1\r\nhost: x\r\n{JSON_HEAD}content-length: 2\r\n\r\n{{}}".encode()
        )
        assert found in (status, 404)
        assert headers["content-type"] == "application/json"
        assert set(body["error"]) == {"message", "type", "param", "code"}


async def test_what_is_too_large_is_refused_over_http_and_grpc() -> None:
    async with running_site(max_body_bytes=100_000) as site:
        reply = await site.chat("x" * 200_000)
        assert reply.status_code == 413
        assert reply.json()["error"]["message"] == "body: must have at most 100000 bytes"
        assert reply.json()["error"]["param"] == "body"
        assert (await site.chat("x" * 2000)).status_code == 200
        async with open_channel(site.gateway.address) as channel:
            generate = generation_pb2_grpc.GenerationServiceStub(channel).Generate
            # Of some of them most has come before the key is known, of others it has not.
            wrong = [(n * 100_000, "", "body: must have at most 100000 bytes") for n in (7, 9, 11, 20, 60)]
            for size, header, message in [*wrong, (1, "x" * 15_000, "the headers are too large")]:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await generate(pb.GenerateRequest(prompt="x" * size), metadata=[("x-more", header)]).read()
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "as gRPC itself calls it"
                assert caught.value.details() == message


async def test_all_addresses_are_those_of_both_families() -> None:
    async with running_site("relay", host="::") as site:
        port = site.gateway.address.rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]"):
            assert (await site.http.get(f"http://{host}:{port}/health")).status_code == 200


@pytest.mark.parametrize("mode", ["direct", "relay"])
async def test_ten_megabytes_are_refused_and_seven_are_read(mode: str) -> None:
    async with running_site(mode) as site:
        assert (await site.chat("x" * 10_000_000)).status_code == 413
        reply = await site.chat("x" * 7_000_000)
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "context_length_exceeded"
        assert reply.json()["error"]["param"] == "messages"


async def test_an_upload_that_does_not_end_is_refused_with_408() -> None:
    async with running_site(upload_timeout_s=0.5) as site:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        status, _, body = await _raw(site, head + b'transfer-encoding: chunked\r\n\r\n5\r\n{"mod\r\n')
        assert status == 408
        assert body["error"]["type"] == "timeout_error"


async def test_a_slow_upload_in_pieces_is_served() -> None:
    async with running_site() as site:
        data = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "hello"}]}).encode()

        async def pieces() -> Any:
            for i in range(0, len(data), 7):
                yield data[i : i + 7]
                await asyncio.sleep(0.005)

        reply = await site.http.post(
            "/v1/chat/completions", content=pieces(), headers={"content-type": "application/json"}
        )
        assert reply.json()["choices"][0]["message"]["content"] == "hello"


async def test_an_unknown_model_is_404_and_a_model_without_workers_503() -> None:
    async with running_site() as site:
        reply = await site.chat(model="nope")
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "model_not_found"
        assert reply.json()["error"]["param"] == "model"
        await site.workers[0].stop()
        await eventually(lambda: len(site.controller.registry) == 0)
        gone = await site.chat()
        assert gone.status_code == 503
        assert gone.json()["error"]["code"] == "no_live_worker"


async def test_a_failure_midway_is_told_in_the_stream() -> None:
    async with running_site(workers=[{"options": {"fail_after": "6", "delay_ms": "1"}}]) as site:
        events = [event async for event in site.stream("0123456789")]
        assert content(events)
        assert events[-2]["error"]["code"] == "backend_failed"
        assert events[-2]["error"]["type"] == "server_error"
        assert events[-1] == "[DONE]"
