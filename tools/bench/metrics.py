"""What metrics cost: throughput of echo with and without them, and a scrape of ten thousand workers' state."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import urllib.request
from collections.abc import Callable
from statistics import median
from typing import Any

import grpc

from tools.bench.controller_role import serve_controller
from tools.bench.processes import Child, child, percentile, role, table

NAME = "metrics"
HELP = "throughput and CPU of echo at 32 streams, on beside off; a scrape of 10,000 workers, and what it holds up"

GENERATE = "/fastchat_grpc.v1.GenerationService/Generate"
OFF, ON = "off", "on"
TICK_S = 0.001


def run(args: list[str]) -> dict[str, object]:
    """Both, in alternating rounds: rounds that lie side by side share what else the machine was doing."""
    parser = argparse.ArgumentParser(prog="bench metrics", description=HELP)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=12, help="of throughput; 0: CPU of the parts and a scrape alone")
    parser.add_argument("--workers", type=int, default=10_000)
    options = parser.parse_args(args)
    result: dict[str, object] = {"in_process": _in_process(), "scrape": asyncio.run(_scrape(options.workers))}
    if not options.rounds:
        return result
    with (
        child(role("tools.bench.metrics", "worker", OFF)) as off,
        child(role("tools.bench.metrics", "worker", ON)) as on,
        child(role("tools.bench.metrics", "controller", OFF, off.answer)) as off_relay,
        child(role("tools.bench.metrics", "controller", ON, on.answer)) as on_relay,
    ):
        result["worker"] = _compare("a worker, asked directly", [off], [on], options)
        result["relayed"] = _compare("a worker behind a controller, both", [off_relay, off], [on_relay, on], options)
    return result


def _compare(title: str, off: list[Child], on: list[Child], options: argparse.Namespace) -> dict[str, object]:
    """The first of each is asked; CPU is that of all."""
    asyncio.run(_measure(off, options))
    asyncio.run(_measure(on, options))  # both are warm
    rounds: dict[str, list[tuple[float, float]]] = {OFF: [], ON: []}
    for number in range(options.rounds):
        order = ((OFF, off), (ON, on)) if number % 2 else ((ON, on), (OFF, off))
        for name, children in order:
            rounds[name].append(asyncio.run(_measure(children, options)))
    rows = {name: [median(values) for values in zip(*measured, strict=True)] for name, measured in rounds.items()}
    pairs = list(zip(rounds[ON], rounds[OFF], strict=True))
    ratios = [median(with_[i] / without[i] for with_, without in pairs) for i in range(2)]
    print(f"\n{title}, {options.streams} streams of {options.tokens} tokens, medians of {options.rounds} rounds:")
    table(
        ["metrics", "tokens/s", "CPU us/token"],
        [
            *([name, f"{row[0]:.0f}", f"{row[1]:.2f}"] for name, row in rows.items()),
            ["on/off", *(f"{ratio:.3f}" for ratio in ratios)],
        ],
    )
    return {"medians": rows, "tokens_per_s_ratio": ratios[0], "cpu_ratio": ratios[1], "rounds": rounds}


async def _measure(children: list[Child], options: argparse.Namespace) -> tuple[float, float]:
    """Tokens per second, and microseconds of CPU per token."""
    async with grpc.aio.insecure_channel(children[0].answer) as channel:
        call = channel.unary_stream(GENERATE)
        before, began = sum(each.cpu_s for each in children), time.monotonic()
        repeat = 4  # less is over too soon for the kernel's clock of CPU time
        for _ in range(repeat):
            await asyncio.gather(*(_stream(call, options.tokens) for _ in range(options.streams)))
        took = time.monotonic() - began
        tokens = repeat * options.streams * options.tokens
        return tokens / took, (sum(each.cpu_s for each in children) - before) / tokens * 1e6


async def _stream(call: Any, tokens: int) -> None:
    from fastchat_grpc.v1 import generation_pb2 as pb

    request = pb.GenerateRequest(
        model="echo",
        prompt="x" * 64,
        stopping=pb.StopConditions(max_new_tokens=tokens, ignore_eos=True),
        output=pb.OutputOptions(stream_interval=1),
    )
    count = 0
    async for _ in call(request.SerializeToString()):
        count += 1
    if count < 2:
        raise RuntimeError(f"expected {tokens} tokens, got {count} messages")


# ----------------------------------------------------------------------------------- in process


def _in_process() -> dict[str, float]:
    """CPU of what is done for a token, a request and a call, in microseconds."""
    from prometheus_client import CollectorRegistry

    from fastchat_grpc.core import Completion, Delta, FinishReason, GenerateRequest, ModelInfo, TextPrompt, Usage
    from fastchat_grpc.metrics.calls import MethodCalls
    from fastchat_grpc.rpc.metering import MeteredCall
    from fastchat_grpc.worker.request_metrics import RequestMetrics

    metrics = RequestMetrics(CollectorRegistry(), [ModelInfo(name="m", context_length=4096)], {"m": False})
    request = GenerateRequest(prompt=TextPrompt("hello"), model="m")
    usages = [Usage(prompt_tokens=5, completion_tokens=made) for made in range(1, 1001)]
    deltas = [Delta(index=0, text="x", token_ids=(1,), usage=usage) for usage in usages]
    end = Completion(index=0, finish_reason=FinishReason.LENGTH, usage=usages[-1])
    calls, context = MethodCalls(), Any

    def generation(events: list[Any]) -> None:
        with metrics.begin(request, "") as record:
            record.admitted()
            for event in events:
                record.event(event)

    def call() -> None:
        with MeteredCall(calls, None, context):
            pass

    whole, short = _cpu_us(lambda: generation([*deltas, end]), 100), _cpu_us(lambda: generation([end]), 5_000)
    found = {"token": (whole - short) / len(deltas), "request": short, "call": _cpu_us(call, 20_000)}
    print("CPU of what is counted, microseconds:")
    table(["for each", "us"], [[name, f"{value:.2f}"] for name, value in found.items()])
    print()
    return found


def _cpu_us(work: Callable[[], None], repeat: int) -> float:
    work()
    began = time.process_time()
    for _ in range(repeat):
        work()
    return (time.process_time() - began) / repeat * 1e6


# ------------------------------------------------------------------------------------- scraping


async def _scrape(workers: int) -> dict[str, object]:
    """How long a scrape takes, and the longest time for which the event loop of the controller does not run."""
    from fastchat_grpc.config import ControllerConfig, ListenConfig, MetricsConfig
    from fastchat_grpc.controller.app import ControllerApp
    from fastchat_grpc.controller.fleet import WorkerSpec
    from fastchat_grpc.core import Load, ModelInfo

    app = ControllerApp(ControllerConfig(listen=ListenConfig(port=0), metrics=MetricsConfig(port=0)))
    await app.start()
    try:
        for i in range(workers):
            models = (ModelInfo(name=f"model-{i % 50}", context_length=4096),)
            spec = WorkerSpec(
                worker_id=f"worker-{i}",
                instance_id=str(i),
                address=f"10.0.{i // 250}.{i % 250}:21002",
                models=models,
                check_heartbeat=False,
            )
            app.registry.register(spec, Load(running=i % 7, kv_cache_usage=0.5))
        url = f"http://{app.metrics_address}/metrics"
        await asyncio.sleep(1.0)
        idle = await _longest_pause(asyncio.sleep(1.0))
        size = len(await asyncio.to_thread(_get, url))
        took, pauses, cpu_before = [], [], time.process_time()
        for _ in range(10):
            began = time.perf_counter()
            pauses.append(await _longest_pause(asyncio.to_thread(_get, url)))
            took.append(time.perf_counter() - began)
        cpu_ms = (time.process_time() - cpu_before) / len(took) * 1000
    finally:
        await app.stop()
    row = {"ms": median(took) * 1000, "pause_ms": median(pauses) * 1000, "worst_ms": max(pauses) * 1000}
    print(f"A scrape of {workers} workers, {size / 1e6:.1f} MB, medians of {len(took)}:")
    table(
        [
            "scrape ms",
            "its CPU, client and ticks included",
            "longest pause of the loop ms",
            "worst of all",
            "pause without one",
        ],
        [
            [
                f"{row['ms']:.0f}",
                f"{cpu_ms:.0f}",
                f"{row['pause_ms']:.1f}",
                f"{row['worst_ms']:.1f}",
                f"{idle * 1000:.1f}",
            ]
        ],
    )
    return {
        **row,
        "cpu_ms": cpu_ms,
        "bytes": size,
        "idle_pause_ms": idle * 1000,
        "p90_ms": percentile(took, 0.9) * 1000,
    }


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read())


async def _longest_pause(work: Any) -> float:
    """The longest time between two turns of the loop beyond what was asked for, while something else is done."""
    longest = 0.0
    task = asyncio.ensure_future(work)
    while not task.done():
        began = time.perf_counter()
        await asyncio.sleep(TICK_S)
        longest = max(longest, time.perf_counter() - began - TICK_S)
    await task
    return longest


# ------------------------------------------------------------------------------- the processes


async def _serve_worker(metrics: str) -> None:
    from fastchat_grpc.config import BackendConfig, ListenConfig, ModelConfig, WorkerConfig
    from fastchat_grpc.worker.app import WorkerApp

    config = WorkerConfig(
        backend=BackendConfig(name="echo", model=ModelConfig(path="echo")),
        listen=ListenConfig(port=0),
        controller_addresses=(),
        metrics=_metrics(metrics),
    )
    app = WorkerApp(config)
    await app.start()
    print(f"ready {app.address}", flush=True)
    await asyncio.Event().wait()


async def _serve_controller(metrics: str, worker: str) -> None:
    await serve_controller(worker, "echo", _metrics(metrics))


def _metrics(wanted: str) -> Any:
    from fastchat_grpc.config import MetricsConfig

    return MetricsConfig(port=0 if wanted == ON else None)


if __name__ == "__main__":
    _roles = {"worker": _serve_worker, "controller": _serve_controller}
    asyncio.run(_roles[sys.argv[1]](*sys.argv[2:]))
