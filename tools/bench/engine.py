"""The Transformers engine: throughput over gRPC beside its peers, latency under a long prompt, profile, leaks."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tools.bench.engine_peers import MOST_STREAMS, PEERS, ask_all
from tools.bench.processes import child, role, table

NAME = "engine"
HELP = "tokens/s at 1, 8 and 32 streams beside transformers and others, TTFT under load, step profile, leaks"

PARTS = ("throughput", "ttft", "profile", "leaks")
ANIMALS = ("dragon", "otter", "falcon", "badger", "heron", "lynx", "tortoise", "raven", "salmon", "marten", "beetle")
LONG_PROMPT_TOKENS = 4000
ROLE = "tools.bench.engine_roles"

Measured = dict[int, dict[str, float]]
"""By number of streams: tokens_per_s and ttft_s."""


def run(args: list[str]) -> dict[str, object]:
    """Measure what is asked for, and print it."""
    parser = argparse.ArgumentParser(prog="bench engine", description=HELP)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all but leaks)")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="the best of so many is shown")
    parser.add_argument("--ours", default="fp32,8bit", help="of fp32, 8bit; comma separated")
    parser.add_argument(
        "--peers", default="generate", help=f"of generate, {', '.join(PEERS)}; comma separated, or none"
    )
    options = parser.parse_args(args)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part}")
    result: dict[str, object] = {}
    for part in options.parts or PARTS[:-1]:
        print(f"\n{part}", flush=True)
        measure = {"throughput": throughput, "ttft": ttft, "profile": profile, "leaks": leaks}[part]
        result[part] = measure(options)
    return result


def prompts(count: int, base: int = 0) -> list[str]:
    """Distinct chat prompts of about 48 tokens with SmolLM2's template."""
    return [
        f"Tell me a short story number {base + i} about a {ANIMALS[i % len(ANIMALS)]} in the hills."
        for i in range(count)
    ]


# ------------------------------------------------------------------------------- throughput


def throughput(options: argparse.Namespace) -> dict[str, object]:
    """Tokens per second of each server; they take turns over the rounds."""
    counts = [int(n) for n in options.streams.split(",")]
    runners: dict[str, Callable[[], Measured]] = {
        f"fastchat_grpc {kind}": partial(_ours, kind, counts, options) for kind in options.ours.split(",")
    }
    for peer in [] if options.peers == "none" else options.peers.split(","):
        measure = _generate if peer == "generate" else partial(ask_peer, peer)
        runners["transformers generate" if peer == "generate" else peer] = partial(measure, counts, options)
    rows: dict[str, Measured] = {}
    for _ in range(options.rounds):
        for name, runner in runners.items():
            for count, measured in runner().items():
                best = rows.setdefault(name, {}).get(count)
                if best is None or measured["tokens_per_s"] > best["tokens_per_s"]:
                    rows[name][count] = measured
    _print_throughput(rows, counts)
    return {"best_of": options.rounds, "rows": rows}


def _print_throughput(rows: dict[str, Measured], counts: list[int]) -> None:
    head = ["tokens/s", *(f"{n} streams" for n in counts), *(f"TTFT s at {n}" for n in counts)]
    table(
        head,
        [
            [
                name,
                *(f"{row[n]['tokens_per_s']:.1f}" if n in row else "-" for n in counts),
                *(f"{row[n]['ttft_s']:.2f}" if "ttft_s" in row.get(n, {}) else "-" for n in counts),
            ]
            for name, row in rows.items()
        ],
    )


def _ours(kind: str, counts: list[int], options: argparse.Namespace) -> Measured:
    with child(role(ROLE, "worker", kind)) as worker:
        return asyncio.run(ask_ours(worker.answer, counts, options.tokens))


async def ask_ours(address: str, counts: list[int], tokens: int) -> Measured:
    """Ask a worker of ours for each count of streams in turn."""
    from fastchat_grpc.client import AsyncClient

    async with AsyncClient(address) as client:
        await _stream(client, "Hello", 8)
        measured = {}
        for n, count in enumerate(counts):
            began = time.perf_counter()
            answers = await asyncio.gather(*(_stream(client, p, tokens) for p in prompts(count, 1000 * n)))
            seconds = time.perf_counter() - began
            total = sum(received for received, _ in answers)
            first = statistics.median(first for _, first in answers)
            measured[count] = {"tokens_per_s": total / seconds, "ttft_s": first}
        return measured


async def _stream(client: Any, prompt: str, tokens: int) -> tuple[int, float]:
    """One chat as a stream: tokens that came, and seconds to the first."""
    from fastchat_grpc.core import Delta

    began, first, received = time.perf_counter(), 0.0, 0
    messages = [{"role": "user", "content": prompt}]
    async for event in client.generate(messages, temperature=0.7, max_new_tokens=tokens, ignore_eos=True):
        if isinstance(event, Delta) and event.token_ids:
            first = first or time.perf_counter() - began
            received += len(event.token_ids)
    return received, first


def ask_peer(name: str, counts: list[int], options: argparse.Namespace) -> Measured:
    """Start a peer, and ask it for each count of streams that it can serve in time."""
    from fastchat_grpc.models.embedded import embedded_model

    with PEERS[name](embedded_model()) as stream:
        stream("Hello", 8)
        most = MOST_STREAMS.get(name, max(counts))
        wanted = [(n, count) for n, count in enumerate(counts) if count <= most]
        return {count: ask_all(stream, prompts(count, 1000 * n), options.tokens) for n, count in wanted}


def _generate(counts: list[int], options: argparse.Namespace) -> Measured:
    with child(role(ROLE, "generate", ",".join(map(str, counts)), str(options.tokens))) as process:
        return {int(n): measured for n, measured in json.loads(process.answer).items()}


# ------------------------------------------------------------------------------- the other parts


def ttft(options: argparse.Namespace) -> dict[str, object]:
    """First token of a short prompt, alone and while a long prompt is prefilled; and the long one's."""
    with child(role(ROLE, "worker", options.ours.partition(",")[0])) as worker:
        measured = asyncio.run(_ttft(worker.answer))
    table(["seconds", ""], [[name, f"{value:.3f}"] for name, value in measured.items()])
    return dict(measured)


async def _ttft(address: str) -> dict[str, float]:
    from fastchat_grpc.client import AsyncClient
    from fastchat_grpc.core import Delta

    async with AsyncClient(address) as client:
        await _stream(client, "Hello", 8)
        alone = [(await _stream(client, p, 2))[1] for p in prompts(3)]
        arrivals: list[float] = []

        async def watch() -> None:
            options = {"max_new_tokens": 400, "ignore_eos": True, "stream_interval": 1}
            async for event in client.generate("Once upon a time", **options):  # type: ignore[arg-type]
                if isinstance(event, Delta):
                    arrivals.append(time.perf_counter())

        async def prefill() -> float:
            began = time.perf_counter()
            long_ids = [100 + i % 3000 for i in range(LONG_PROMPT_TOKENS)]
            await client.complete(long_ids, max_new_tokens=1, ignore_eos=True)
            return time.perf_counter() - began

        watching = asyncio.create_task(watch())
        await asyncio.sleep(1)
        began = time.perf_counter()
        prefilling = asyncio.create_task(prefill())
        await asyncio.sleep(0.5)
        short = [(await _stream(client, p, 2))[1] for p in prompts(3, 50)]
        seconds = await prefilling
        watching.cancel()
    during = [t for t in arrivals if began <= t <= began + seconds]
    gaps = [b - a for a, b in itertools.pairwise(during)]
    return {
        "short prompt alone": statistics.median(alone),
        "short prompt while 4,000 tokens prefill, worst of 3": max(short),
        "longest gap of a running stream meanwhile": max(gaps, default=0.0),
        "the long prompt itself": seconds,
    }


def profile(options: argparse.Namespace) -> dict[str, object]:
    """Where a step's time goes at 32 streams."""
    results: dict[str, dict[str, float]] = {}
    for kind in options.ours.split(","):
        with child(role(ROLE, "profile", kind, "32")) as process:
            results[kind] = json.loads(process.answer)
    parts = list(next(iter(results.values())))
    table(["ms per step", *results], [[part, *(f"{r[part]:.2f}" for r in results.values())] for part in parts])
    return dict(results)


def leaks(options: argparse.Namespace) -> dict[str, object]:
    """Memory after 1,000 sequential and 256 concurrent short requests, and what is left in the worker."""
    with child(role(ROLE, "worker", options.ours.partition(",")[0], "kv_cache_tokens=4096")) as worker:
        measured = asyncio.run(_leaks(worker.answer, lambda: worker.memory_mb))
    table(["", ""], [[name, f"{value:.1f}"] for name, value in measured.items()])
    return dict(measured)


async def _leaks(address: str, memory_mb: Callable[[], float]) -> dict[str, float]:
    from fastchat_grpc.client import AsyncClient

    measured = {}
    async with AsyncClient(address) as client:
        for i in range(150):  # until the cache has been filled once
            await _stream(client, f"Warm up {i}", 2)
        await asyncio.gather(*(_stream(client, f"Warm up {i}", 2) for i in range(256)))
        measured["MB before"] = memory_mb()
        for i in range(1000):
            await _stream(client, f"Say {i}", 2)
        measured["MB after 1,000 in turn"] = memory_mb()
        for turn in (1, 2):
            await asyncio.gather(*(_stream(client, f"Say {turn} {i}", 2) for i in range(256)))
            measured[f"MB after 256 at once, {turn}"] = memory_mb()
        load = (await client.status()).load
        measured["running"], measured["waiting"] = load.running_count, load.waiting_count
        measured["cache in use"] = load.kv_cache_usage
    return measured


if __name__ == "__main__":
    run(sys.argv[1:])
