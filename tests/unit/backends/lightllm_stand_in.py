"""A stand-in for a LightLLM server, on a loopback socket: `/health` and `/generate_stream`, and nothing else.

Mirrors `lightllm/server/api_lightllm.py` (the events of the stream), `core/objs/sampling_params.py` (the checks,
answered with status 417 and {"message": ...}) and `httpserver/manager.py` (the length check; a closed connection
aborts). The "model" says the prompt again, then EOS.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.unit.backends.folders import EOS, VOCABULARY_SIZE

_PARAMETERS = {
    "do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "input_penalty", "max_new_tokens", "min_new_tokens", "ignore_eos", "add_special_tokens", "skip_special_tokens",
    "regular_constraint", "guided_json",
}  # fmt: skip


class LightllmServer:
    """What was asked, and what became of it."""

    def __init__(self, max_req_total_len: int) -> None:
        self.max_req_total_len = max_req_total_len
        self.requests: list[dict[str, Any]] = []
        self.running = 0
        self.aborted = asyncio.Event()
        self.healthy = True
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection; one request, then it is closed."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(
                (int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length")), 0
            )
            body = await reader.readexactly(length)
            if head.startswith("GET /health "):
                _reply(writer, 200 if self.healthy else 503, {"message": "Ok"})
            elif head.startswith("POST /generate_stream "):
                await self._generate_stream(reader, writer, json.loads(body))
            else:
                _reply(writer, 404, {"message": "no such path"})
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _generate_stream(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]
    ) -> None:
        self.requests.append(body)
        ids, parameters = body["inputs"], body["parameters"]
        if (problem := self._problem(ids, parameters)) is not None:
            _reply(writer, 417, {"message": problem})
            return
        text = bytes(i for i in ids if i < 256)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        gone = asyncio.create_task(reader.read())
        self.running += 1
        try:
            for place in range(parameters["max_new_tokens"]):
                token_id = _token(parameters, ids, place)
                reason = _finish_reason(parameters, token_id, place)
                _chunk(writer, _event(token_id, place, len(ids), reason))
                if text == b"lose" and place == 1:
                    writer.transport.abort()
                    return
                await asyncio.wait({gone}, timeout=0.01 if b"slow" in text else 0)
                if gone.done():
                    self.aborted.set()
                    return
                if reason is not None:
                    break
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            self.running -= 1
            gone.cancel()

    def _problem(self, ids: Any, p: dict[str, Any]) -> str | None:
        assert set(p) <= _PARAMETERS, set(p) - _PARAMETERS
        if not all(isinstance(i, int) and i < VOCABULARY_SIZE for i in ids):
            return "prompt List[int] format contain id > vocab_size"
        if p["presence_penalty"] < 0 or p["frequency_penalty"] < 0:
            return "penalties must >= 0.0"
        if p["repetition_penalty"] < 1.0:
            return "repetition_penalty must >= 1.0"
        if p["do_sample"] and not (
            p["temperature"] > 0 and 0 < p["top_p"] <= 1 and (p["top_k"] == -1 or p["top_k"] > 0)
        ):
            return "temperature, top_p or top_k out of range"
        if not 1 <= p["min_new_tokens"] <= p["max_new_tokens"]:
            return "min_new_tokens must <= max_new_tokens"
        if len(ids) + p["max_new_tokens"] > self.max_req_total_len:
            return f"the input prompt token len {len(ids)} + max_new_tokens > {self.max_req_total_len}"
        return None


@asynccontextmanager
async def lightllm_server(max_req_total_len: int = 128) -> AsyncIterator[LightllmServer]:
    """A stand-in on a free port."""
    state = LightllmServer(max_req_total_len)
    server = await asyncio.start_server(state.handle, "127.0.0.1", 0)
    state.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield state
    finally:
        server.close()


def _token(parameters: dict[str, Any], ids: list[int], place: int) -> int:
    ends = place and place % len(ids) == 0 and place >= parameters["min_new_tokens"] - 1
    return EOS if ends and not parameters["ignore_eos"] else int(ids[place % len(ids)])


def _finish_reason(parameters: dict[str, Any], token_id: int, place: int) -> str | None:
    if token_id == EOS and not parameters["ignore_eos"]:
        return "stop"
    return "length" if place + 1 >= parameters["max_new_tokens"] else None


def _event(token_id: int, place: int, prompt_tokens: int, reason: str | None) -> dict[str, Any]:
    return {
        "token": {
            "id": token_id,
            "text": "not used",
            "logprob": math.log(0.5),
            "special": False,
            "count_output_tokens": place + 1,
            "prompt_tokens": prompt_tokens,
        },
        "generated_text": None,
        "finished": reason is not None,
        "finish_reason": reason,
        "details": None,
    }


def _chunk(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    data = f"data:{json.dumps(event)}\n\n".encode()
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _reply(writer: asyncio.StreamWriter, status: int, content: dict[str, Any]) -> None:
    data = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    writer.write(f"{head}connection: close\r\n\r\n".encode() + data)
