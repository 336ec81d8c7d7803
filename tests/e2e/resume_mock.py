"""A worker whose answers are numbers, for tests of the gateway's module: its state is how many it has said.

    python -m tests.e2e.resume_mock ID

Prints its address once it serves. What it does is in the request, as members of the JSON body:

    n          numbers to say
    ms         pause between two
    at         {ID: {"number": i, "do": WHAT}}: what the worker of that id does before it says the i-th number
    state      bytes of a piece of state; 0: a piece without a value; -1: none at all
    pad        bytes of text beside each number
    whole      one body at the end instead of events
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.api.httpbody_pb2 import HttpBody
from google.protobuf import any_pb2

from fastchat_grpc.rpc.bridge import RESUME_HEADER, WORKER_HEADER

SERVICE = "fastchat_grpc.v1.OpenAIService"
DEFAULTS: dict[str, Any] = {"n": 20, "ms": 2, "at": {}, "state": 8, "pad": 0, "whole": False}


class MockWorker:
    """The server. `began` has the number that each of its answers began with."""

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.began: list[int] = []
        self.running = 0
        self.asked: list[dict[str, str]] = []
        self.hold = asyncio.Event()
        self.server = grpc.aio.server(compression=grpc.Compression.NoCompression)
        handler = grpc.unary_stream_rpc_method_handler(
            self._chat, HttpBody.FromString, lambda m: m if isinstance(m, bytes) else m.SerializeToString()
        )
        self.server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {"ChatCompletions": handler}),)
        )
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    async def _chat(self, request: HttpBody, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        spec = DEFAULTS | json.loads(request.data)
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        self.asked.append(metadata)
        first = len(request.extensions)
        self.began.append(first)
        asks = metadata.get(RESUME_HEADER) == "1"
        fault = spec["at"].get(self.worker_id, {})
        self.running += 1
        try:
            if fault.get("number") == -1:
                await self._do(fault["do"], context)
            knows = ((RESUME_HEADER, "1"),) if spec["state"] >= 0 else ()
            await context.send_initial_metadata(((WORKER_HEADER, self.worker_id), *knows))
            for i in range(first, spec["n"]):
                if fault.get("number") == i and (odd := await self._do(fault["do"], context)) is not None:
                    yield odd
                body = HttpBody(content_type="text/event-stream")
                if not spec["whole"]:
                    body.data = event({"i": i, "by": self.worker_id, "text": "x" * spec["pad"]})
                if asks and spec["state"] >= 0:
                    body.extensions.append(any_pb2.Any(type_url="t/S", value=bytes(spec["state"])))
                yield body
                await asyncio.sleep(spec["ms"] / 1000)
            if spec["whole"]:
                reply = {"numbers": list(range(spec["n"])), "by": self.worker_id}
                yield HttpBody(content_type="application/json", data=json.dumps(reply).encode())
            else:
                yield HttpBody(data=b"data: [DONE]\n\n")
        finally:
            self.running -= 1

    async def _do(self, what: str, context: grpc.aio.ServicerContext[Any, Any]) -> bytes | None:
        match what:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hold":
                await self.hold.wait()
            case "garbage":
                return b"\xff\xff\xff\xff"  # no message of any kind
            case "compress":
                context.set_compression(grpc.Compression.Gzip)
            case "end":
                raise asyncio.CancelledError
            case code:
                await context.abort(grpc.StatusCode[code], "as it was told to")
        return None


def event(values: object) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(values).encode() + b"\n\n"


async def main(worker_id: str) -> None:
    worker = MockWorker(worker_id)
    await worker.server.start()
    print(worker.address, flush=True)
    await worker.server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
