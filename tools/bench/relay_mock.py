"""Workers without a model for the relay benchmark: they say the same token again and again, on a schedule.

    python relay_mock.py http                  OpenAI's HTTP API
    python relay_mock.py fastchat CONTROLLER   FastChat's worker API, registered with its controller
    python relay_mock.py smg MODEL_FOLDER      SMG's gRPC API for vLLM (in SMG's environment)
    python relay_mock.py ours [CONTROLLER]     our worker, with a backend of this file

A request asks for `max_tokens` tokens; temperature 0 means flat out, else one each 50 ms. Prints its port.
All but the last need nothing of this project, so that they run in the environments of its peers.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from typing import Any, ClassVar

WORD = " hello"
TOKEN_ID = 33662
"""WORD's id in the vocabulary of SmolLM2; set by the caller where it differs."""
PACE_S = 0.05
MODEL = "mock"


async def schedule(count: int, flat_out: bool) -> AsyncIterator[int]:
    """Token numbers, each at its time: a late one does not delay those after it."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    for number in range(count):
        await asyncio.sleep(0 if flat_out else max(0.0, start + number * PACE_S - loop.time()))
        yield number


# ------------------------------------------------------------------------ HTTP, by hand


class Http:
    """As little of an HTTP/1.1 server as the peers need."""

    async def serve(self) -> int:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=2**22)
        return int(self._server.sockets[0].getsockname()[1])

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
                if headers.get("transfer-encoding") == "chunked":
                    body = b""
                    while size := int(await reader.readline(), 16):
                        body += await reader.readexactly(size)
                        await reader.readline()
                    await reader.readline()
                else:
                    body = await reader.readexactly(int(headers.get("content-length", "0")))
                await self.answer(head[0].split()[1].partition("?")[0], json.loads(body or b"{}"), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError

    def json(self, writer: asyncio.StreamWriter, value: object) -> None:
        data = json.dumps(value).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data
        )

    def begin(self, writer: asyncio.StreamWriter, kind: str) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n".encode())

    def chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n" % len(data) + data + b"\r\n")


class OpenAI(Http):
    """A worker that speaks OpenAI's API."""

    async def answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if path != "/v1/chat/completions":
            card = {"id": MODEL, "object": "model", "max_model_len": 8192}
            self.json(writer, {"object": "list", "data": [card], "status": "ok", "model_path": MODEL})
            return
        self.begin(writer, "text/event-stream")
        base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": int(time.time()), "model": MODEL}

        def event(delta: dict[str, str], finish: str | None = None) -> None:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            self.chunk(writer, b"data: " + json.dumps({**base, "choices": [choice]}).encode() + b"\n\n")

        event({"role": "assistant", "content": ""})
        async for _ in schedule(body["max_tokens"], body.get("temperature") == 0):
            event({"content": WORD})
        event({}, "length")
        self.chunk(writer, b"data: [DONE]\n\n")
        self.chunk(writer, b"")


class FastChat(Http):
    """A worker that speaks FastChat's API: frames that end with a zero byte, each with the whole text so far."""

    STATUS: ClassVar = {"model_names": [MODEL], "speed": 1, "queue_length": 0}

    async def answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        match path:
            case "/worker_generate_stream":
                self.begin(writer, "application/octet-stream")
                text = ""
                usage = {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5}
                count = body["max_new_tokens"]
                async for number in schedule(count, body["temperature"] < 1e-3):
                    text += WORD
                    finish = "length" if number == count - 1 else None
                    frame = {"text": text, "error_code": 0, "usage": usage, "finish_reason": finish, "logprobs": None}
                    self.chunk(writer, json.dumps(frame).encode() + b"\0")
                self.chunk(writer, b"")
            case "/worker_get_conv_template":
                conv = {
                    "name": "raw",
                    "system_template": "{system_message}",
                    "system_message": "",
                    "roles": ["U", "A"],
                    "messages": [],
                    "offset": 0,
                    "sep_style": 1,
                    "sep": "\n",
                    "sep2": None,
                    "stop_str": None,
                    "stop_token_ids": None,
                }
                self.json(writer, {"conv": conv})
            case "/model_details":
                self.json(writer, {"context_length": 8192})
            case "/count_token":
                self.json(writer, {"count": 5, "error_code": 0})
            case _:
                self.json(writer, self.STATUS)

    def register(self, controller: str, port: int) -> None:
        body = {"worker_name": f"http://127.0.0.1:{port}", "check_heart_beat": False, "worker_status": self.STATUS}
        request = urllib.request.Request(
            f"{controller}/register_worker", json.dumps({**body, "multimodal": False}).encode()
        )
        request.add_header("content-type", "application/json")
        urllib.request.urlopen(request, timeout=10).read()


# --------------------------------------------------------------------------------- gRPC


async def serve_smg(model_folder: str, token_id: int) -> int:
    """A worker that speaks SMG's protocol for vLLM: token ids only."""
    import grpc
    from smg_grpc_proto import vllm_engine_pb2 as pb
    from smg_grpc_proto import vllm_engine_pb2_grpc

    class Engine(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc]
        async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
            count = request.sampling_params.max_tokens
            async for number in schedule(count, request.sampling_params.temperature == 0):
                chunk = pb.GenerateStreamChunk(token_ids=[token_id], prompt_tokens=5, completion_tokens=number + 1)
                yield pb.GenerateResponse(chunk=chunk)
            done = pb.GenerateComplete(
                output_ids=[token_id] * count, finish_reason="length", prompt_tokens=5, completion_tokens=count
            )
            yield pb.GenerateResponse(complete=done)

        async def HealthCheck(self, request: Any, context: Any) -> Any:
            return pb.HealthCheckResponse(healthy=True)

        async def GetModelInfo(self, request: Any, context: Any) -> Any:
            return pb.GetModelInfoResponse(
                model_path=model_folder,
                tokenizer_path=model_folder,
                served_model_name=MODEL,
                is_generation=True,
                max_context_length=8192,
                vocab_size=49152,
                model_type="llama",
                architectures=["LlamaForCausalLM"],
            )

        async def GetServerInfo(self, request: Any, context: Any) -> Any:
            return pb.GetServerInfoResponse(server_type="vllm", data_parallel_size=1)

        async def GetLoads(self, request: Any, context: Any) -> Any:
            return pb.GetLoadsResponse(dp_rank_count=1)

        async def Abort(self, request: Any, context: Any) -> Any:
            return pb.AbortResponse()

    server = grpc.aio.server()
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(Engine(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    globals()["_keep"] = server
    return int(port)


class MockBackend:
    """A backend for our worker that says WORD on schedule."""

    async def start(self) -> Any:
        from fastchat_grpc.core import Capability, ModelInfo

        capabilities = frozenset({Capability.GENERATE, Capability.CHAT, Capability.RESUME})
        return [ModelInfo(name=MODEL, context_length=8192, capabilities=capabilities, backend="mock")]

    async def generate(self, request: Any) -> Any:
        from fastchat_grpc.core import Completion, Delta, FinishReason, Usage

        count = request.stopping.max_new_tokens
        async for number in schedule(count, request.sampling.greedy):
            usage = Usage(prompt_tokens=5, completion_tokens=number + 1)
            yield Delta(index=0, text=WORD, token_ids=(TOKEN_ID,), usage=usage)
        yield Completion(
            index=0,
            finish_reason=FinishReason.LENGTH,
            usage=Usage(prompt_tokens=5, completion_tokens=count),
        )

    def load(self) -> Any:
        from fastchat_grpc.backends.base import BackendLoad

        return BackendLoad(max_running=1024)

    def chat_template(self, model: str) -> str:
        return ""

    async def close(self) -> None:
        pass


async def serve_ours(controllers: tuple[str, ...]) -> int:
    """Our own worker, admission, servicers and all."""
    from fastchat_grpc.backends import registry
    from fastchat_grpc.config import BackendConfig, ListenConfig, ModelConfig, WorkerConfig
    from fastchat_grpc.worker.app import WorkerApp

    registry.create = lambda config: MockBackend()  # type: ignore[assignment, return-value]
    app = WorkerApp(
        WorkerConfig(
            backend=BackendConfig(name="echo", model=ModelConfig(path=MODEL)),
            listen=ListenConfig(port=0),
            controller_addresses=controllers,
        )
    )
    await app.start()
    globals()["_keep"] = app
    return int(app.address.rpartition(":")[2])


async def main(kind: str, *rest: str) -> None:
    match kind:
        case "http":
            port = await OpenAI().serve()
        case "fastchat":
            worker = FastChat()
            port = await worker.serve()
            await asyncio.to_thread(worker.register, rest[0], port)
        case "smg":
            port = await serve_smg(rest[0], int(rest[1]))
        case "ours":
            port = await serve_ours(rest)
        case _:
            sys.exit(__doc__)
    print(port, flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
