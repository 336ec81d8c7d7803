"""A server of the OpenAI API for tests: this product's own service behind a few lines of HTTP/1.1, over echo.

It counts the requests that it holds, so that a test can see that a client's leaving reaches the engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.backends import registry
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.errors import Code, FastChatError
from fastchat_grpc.openai.servicer import OpenAIServicer
from fastchat_grpc.rpc.http_errors import HTTP_STATUS, error_object
from fastchat_grpc.v1 import openai_pb2 as pb
from fastchat_grpc.worker.admission import Admission
from fastchat_grpc.worker.generation import LocalGeneration

KEY = "test-key"


class NoContext:
    """What the service asks of a gRPC context."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def send_initial_metadata(self, metadata: object) -> None:
        """Over HTTP/1 nobody asks for it here."""


class OpenAIServer:
    """Serves one model, "served", of an echo backend."""

    def __init__(self, context_length: int, delay_ms: str = "1") -> None:
        model = ModelConfig(path="served", context_length=context_length)
        self._backend = registry.create(BackendConfig(name="echo", model=model, options={"delay_ms": delay_ms}))
        self._generation = LocalGeneration(self._backend)
        self._service = OpenAIServicer(self._generation)
        self._server: asyncio.Server | None = None
        self.running = 0
        self.bodies: list[dict[str, Any]] = []
        self.failures: list[tuple[int, bytes]] = []
        """Answers (status, body) to give instead, one each to the next requests."""
        self.cut_after: int | None = None
        """Chunks after which the connection is cut."""

    async def start(self) -> str:
        """Listen; returns the address of the API."""
        models = await self._backend.start()
        self._generation.open(models, Admission(256, 4096))  # servers of this API let all wait
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=4096)
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"http://{host}:{port}/v1"

    async def stop(self) -> None:
        """Stop listening."""
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while line := await reader.readline():
                method, path, _ = line.decode().split()
                headers = {}
                while (header := (await reader.readline()).decode().strip()) != "":
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self._answer(method, path, headers, body, reader, writer)
        writer.close()

    async def _answer(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if headers.get("authorization") != f"Bearer {KEY}":
            return await _write(writer, 401, b"{}")
        if method == "POST" and self.failures:
            return await _write(writer, *self.failures.pop(0))
        if method == "POST":
            self.bodies.append(json.loads(body))
        self.running += 1
        gone = asyncio.create_task(_until_gone(reader))
        work = asyncio.create_task(self._call(path, body, writer))
        try:
            # The client leaves a stream by closing its connection; nothing else may come before the answer's end.
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
            with suppress(asyncio.CancelledError, ConnectionError):
                await work
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            self.running -= 1
        return None

    async def _call(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        context: Any = NoContext()
        request = HttpBody(data=body)
        service = self._service
        try:
            match path:
                case "/v1/models":
                    answer = await service.ListModels(pb.ListOpenAIModelsRequest(), context)
                case "/tokenize":
                    answer = await service.Tokenize(request, context)
                case "/detokenize":
                    answer = await service.Detokenize(request, context)
                case "/v1/embeddings":
                    answer = await service.Embeddings(request, context)
                case "/v1/chat/completions":
                    return await self._stream(service.ChatCompletions(request, context), writer)
                case "/v1/completions":
                    return await self._stream(service.Completions(request, context), writer)
                case _:
                    return await _write(writer, 404, b"{}")
            await _write(writer, 200, answer.data)
        except FastChatError as error:
            status = HTTP_STATUS.get(error.code, 500) if error.code is not Code.OK else 500
            await _write(writer, status, json.dumps(error_object(error)).encode())

    async def _stream(self, chunks: AsyncGenerator[HttpBody, None], writer: asyncio.StreamWriter) -> None:
        count = 0
        async with aclosing(chunks):
            async for chunk in chunks:
                if count == 0:
                    writer.write(
                        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                    )
                writer.write(b"%x\r\n%s\r\n" % (len(chunk.data), chunk.data))
                await writer.drain()
                count += 1
                if self.cut_after is not None and count > self.cut_after:
                    writer.close()
                    return
        writer.write(b"0\r\n\r\n")
        await writer.drain()


async def _write(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    head = f"HTTP/1.1 {status} -\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


async def _until_gone(reader: asyncio.StreamReader) -> None:
    """Return when the client has closed; it sends nothing while it waits for an answer."""
    while not reader.at_eof():
        await asyncio.sleep(0.005)


@asynccontextmanager
async def openai_server(context_length: int = 512, **settings: Any) -> AsyncIterator[tuple[OpenAIServer, str]]:
    """A running server, and its address."""
    server = OpenAIServer(context_length, **settings)
    url = await server.start()
    try:
        yield server, url
    finally:
        await server.stop()
