"""What the relay costs: CPU of the relaying process per token, beside a minimal relay of raw bytes."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator
from statistics import median
from typing import Any

import grpc

from tools.bench.controller_role import serve_controller
from tools.bench.processes import Child, child, percentile, role, table

NAME = "relay"
HELP = "CPU per relayed token and idle time to first token, ours beside a minimal grpc.aio relay"

GENERATE = "/fastchat_grpc.v1.GenerationService/Generate"
ROUNDS = 5
MINIMAL, OURS = "minimal grpc.aio relay", "fastchat_grpc controller"


def run(args: list[str]) -> dict[str, object]:
    """Both relays before the same mock worker, paced and flat out, in alternating rounds."""
    parser = argparse.ArgumentParser(prog="bench relay", description=HELP)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--interval-ms", type=float, default=50.0, help="pace of the paced rounds")
    options = parser.parse_args(args)
    results: dict[str, dict[str, list[float]]] = {}
    with (
        child(role("tools.bench.relay", "worker")) as worker,
        child(role("tools.bench.relay", "minimal", worker.answer)) as minimal,
        child(role("tools.bench.relay", "ours", worker.answer)) as ours,
    ):
        for _ in range(ROUNDS):
            for name, relay in ((MINIMAL, minimal), (OURS, ours)):
                measured = asyncio.run(_measure(relay, options))
                for key, value in measured.items():
                    results.setdefault(name, {}).setdefault(key, []).append(value)
    rows = {name: {key: median(values) for key, values in row.items()} for name, row in results.items()}
    # Rounds that lie side by side share what else the machine was doing.
    ratios = {
        key: median(ours / base for ours, base in zip(results[OURS][key], values, strict=True))
        for key, values in results[MINIMAL].items()
    }
    table(
        ["relay (medians)", "us/token paced", "us/token flat", "idle TTFT ms"],
        [
            *([name, *(f"{value:.1f}" for value in row.values())] for name, row in rows.items()),
            ["ratio", *(f"{value:.2f}" for value in ratios.values())],
        ],
    )
    return {"rounds": ROUNDS, "medians": rows, "ratios": ratios, "all": results}


async def _measure(relay: Child, options: argparse.Namespace) -> dict[str, float]:
    async with grpc.aio.insecure_channel(relay.answer) as channel:
        call = channel.unary_stream(GENERATE)
        await _stream(call, 3, 0.0)
        first = [await _stream(call, 1, 0.0) for _ in range(30)]
        return {
            "paced_us": await _cost(relay, call, options, options.interval_ms / 1000),
            "flat_us": await _cost(relay, call, options, 0.0),
            "ttft_ms": percentile(first, 0.5) * 1000,
        }


async def _cost(relay: Child, call: Any, options: argparse.Namespace, interval_s: float) -> float:
    before = relay.cpu_s
    repeat = 1 if interval_s else 5  # flat out is over too soon for the kernel's clock of CPU time
    for _ in range(repeat):
        await asyncio.gather(*(_stream(call, options.tokens, interval_s) for _ in range(options.streams)))
    return (relay.cpu_s - before) / (repeat * options.streams * options.tokens) * 1e6


async def _stream(call: Any, tokens: int, interval_s: float) -> float:
    """Read a whole stream; the time to its first message."""
    from fastchat_grpc.v1 import generation_pb2 as pb

    request = pb.GenerateRequest(model="mock", prompt=f"{tokens} {interval_s}")
    started = time.monotonic()
    first = 0.0
    count = 0
    async for _ in call(request.SerializeToString()):
        first = first or time.monotonic() - started
        count += 1
    if count != tokens + 1:
        raise RuntimeError(f"expected {tokens} tokens and a completion, got {count} messages")
    return first


# ------------------------------------------------------------------------------- the processes


async def _serve_worker() -> None:
    """A worker without a model: sends as many equal tokens as the prompt says, at its pace."""
    from fastchat_grpc.v1 import generation_pb2 as pb

    delta = pb.GenerateResponse(
        delta=pb.Delta(
            text=" token", token_ids=[1234], usage=pb.Usage(prompt_token_count=48, completion_token_count=100)
        )
    ).SerializeToString()
    end = pb.GenerateResponse(
        completion=pb.Completion(finish_reason=pb.FINISH_REASON_LENGTH, usage=pb.Usage(prompt_token_count=48))
    ).SerializeToString()

    async def generate(request: pb.GenerateRequest, context: Any) -> AsyncIterator[bytes]:
        count, interval = request.prompt.split()
        for _ in range(int(count)):
            yield delta
            if float(interval):
                await asyncio.sleep(float(interval))
        yield end

    await _serve(grpc.unary_stream_rpc_method_handler(generate, pb.GenerateRequest.FromString), as_ours=True)


async def _serve_minimal(worker: str) -> None:
    """The least that a relay in grpc.aio can do."""
    channel = grpc.aio.insecure_channel(worker)
    call = channel.unary_stream(GENERATE)

    async def generate(request: bytes, context: Any) -> AsyncIterator[bytes]:
        async for message in call(request):
            yield message

    await _serve(grpc.unary_stream_rpc_method_handler(generate))


async def _serve(handler: Any, *, as_ours: bool = False) -> None:
    from fastchat_grpc.rpc.channels import SERVER_OPTIONS

    # As real workers have it: with grpc's defaults a server would take our keepalive pings for abuse.
    server = grpc.aio.server(options=SERVER_OPTIONS if as_ours else None)
    service, _, method = GENERATE[1:].partition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"ready 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


async def _serve_ours(worker: str) -> None:
    await serve_controller(worker, "mock")


if __name__ == "__main__":
    _roles = {"worker": _serve_worker, "minimal": _serve_minimal, "ours": _serve_ours}
    asyncio.run(_roles[sys.argv[1]](*sys.argv[2:]))
