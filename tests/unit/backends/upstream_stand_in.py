"""A stand-in for servers of the OpenAI API, on a loopback socket: it answers as tests say, and keeps what it got."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """An answer that is no stream."""

    status: int
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)


Answer = Refusal | Sequence[Any]
"""A refusal, or the data of a stream: objects, or text as it is."""


def chat(content: str | None = None, *, finish: str | None = None, index: int = 0, **delta: Any) -> dict[str, Any]:
    """One chunk of a chat."""
    said = delta if content is None else {"content": content, **delta}
    return {"choices": [{"index": index, "delta": said, "finish_reason": finish}]}


def usage(prompt: int, completion: int) -> dict[str, Any]:
    """The chunk with a request's tokens."""
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


class UpstreamServer:
    """`answer` makes the answer to a POST of (path, body); `get` holds the answers to GETs by path."""

    def __init__(self) -> None:
        self.answer: Callable[[str, dict[str, Any]], Answer] = lambda path, body: [chat("hi", finish="stop"), "[DONE]"]
        self.get: dict[str, Any] = {"/v1/models": {"data": [{"id": "served"}]}}
        self.bodies: list[dict[str, Any]] = []
        self.hang_up_after_answer = False
        """Close each connection once it has been used, without having said so."""
        self.connections = 0
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.connections += 1
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split("\r\n")[0].split()
                lengths = [line[15:] for line in head.split("\r\n") if line.lower().startswith("content-length")]
                body = await reader.readexactly(int(lengths[0]) if lengths else 0)
                self._answer(writer, method, path, body)
                await writer.drain()
                if self.hang_up_after_answer and method == "POST":
                    await reader.readuntil(b"\r\n\r\n")  # the next request finds the connection closed
                    break
        writer.close()

    def _answer(self, writer: asyncio.StreamWriter, method: str, path: str, body: bytes) -> None:
        if method == "GET":
            found = self.get.get(path)
            return _reply(writer, Refusal(404, {}) if found is None else Refusal(200, found))
        asked = json.loads(body)
        self.bodies.append(asked)
        answer = self.answer(path, asked)
        if isinstance(answer, Refusal):
            return _reply(writer, answer)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for item in answer:
            data = f"data: {item if isinstance(item, str) else json.dumps(item)}\n\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        writer.write(b"0\r\n\r\n")
        return None


def _reply(writer: asyncio.StreamWriter, answer: Refusal) -> None:
    data = json.dumps(answer.body).encode()
    headers = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
    head = (
        f"HTTP/1.1 {answer.status} -\r\ncontent-type: application/json\r\n{headers}content-length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)


@asynccontextmanager
async def upstream_server() -> AsyncIterator[UpstreamServer]:
    """A server on a free port."""
    server = UpstreamServer()
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    host, port = listener.sockets[0].getsockname()[:2]
    server.url = f"http://{host}:{port}/v1"
    try:
        yield server
    finally:
        listener.close()
