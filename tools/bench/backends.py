"""Each backend over gRPC beside the engine it is made of, taking turns in one run.

Ours: a worker in the backend's environment, asked over gRPC by a client in another process. Raw: the engine's
own interface without a server (openvino, llama_cpp, mlx), or its own server asked over HTTP (vllm).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tools.bench.engine import Measured, ask_ours, ask_peer
from tools.bench.engine_peers import ENVIRONMENTS, PEERS
from tools.bench.processes import child, table

NAME = "backends"
HELP = "tokens/s and TTFT of each backend at 1, 8 and 32 streams, the raw engine beside ours over gRPC"
ROLES = "tools.bench.backend_roles"
KINDS = {
    "openvino": ("fp32", "int8"),
    "vllm": ("fp32",),
    "llama_cpp": ("Q4_1",),
    "mlx": ("fp32",),
}
"""What each backend is measured with, by its kind of weights."""
ONE_STREAM = ("llama_cpp",)
"""Engines whose own interface answers one request at a time."""

Runner = Callable[[], Measured]


def run(args: list[str]) -> dict[str, object]:
    """Measure one backend, print the table and return it."""
    parser = argparse.ArgumentParser(prog="bench backends", description=HELP)
    parser.add_argument("--backend", default="openvino", choices=KINDS)
    parser.add_argument("--kinds", default="", help="of the backend's kinds of weights, comma separated; empty: all")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many is shown")
    parser.add_argument("--peers", default="", help=f"further servers beside it, of {', '.join(PEERS)}")
    options = parser.parse_args(args)
    python = ENVIRONMENTS / options.backend / "bin/python"
    if not python.exists():
        parser.error(f"there is no {python}; `make test-backend NAME={options.backend}` makes it")
    return measure(_runners(options, python.absolute()), options)


def measure(runners: dict[str, Runner], options: argparse.Namespace) -> dict[str, object]:
    """Every round runs every runner once. The best of each is shown, all rounds are returned."""
    counts = [int(n) for n in options.streams.split(",")]
    rounds: dict[str, list[Measured]] = {name: [] for name in runners}
    for n in range(options.rounds):
        # Every second round goes backwards, so that a machine that grows slower favours nobody.
        for name in list(runners)[:: 1 if n % 2 == 0 else -1]:
            rounds[name].append(runners[name]())
            print(f"  {name}: {_line(rounds[name][-1])}", flush=True)
    best = {name: _best(measured) for name, measured in rounds.items()}
    head = ["tokens/s", *(f"{n} streams" for n in counts), *(f"TTFT s at {n}" for n in counts)]
    rows = [
        [name, *(_cell(row, n, "tokens_per_s", 1) for n in counts), *(_cell(row, n, "ttft_s", 3) for n in counts)]
        for name, row in best.items()
    ]
    table(head, rows)
    return {"best": best, "rounds": rounds}


def _best(rounds: list[Measured]) -> Measured:
    counts = rounds[0].keys()
    return {n: max((measured[n] for measured in rounds), key=lambda one: one["tokens_per_s"]) for n in counts}


def _cell(row: Measured, count: int, value: str, digits: int) -> str:
    return f"{row[count][value]:.{digits}f}" if count in row else "-"


def _line(measured: Measured) -> str:
    return ", ".join(
        f"{n}: {one['tokens_per_s']:.1f} tokens/s, TTFT {one['ttft_s']:.3f} s" for n, one in measured.items()
    )


def _runners(options: argparse.Namespace, python: Path) -> dict[str, Runner]:
    counts = [int(n) for n in options.streams.split(",")]
    runners: dict[str, Runner] = {}
    for kind in options.kinds.split(",") if options.kinds else KINDS[options.backend]:
        if options.backend == "vllm":
            runners["vllm serve"] = partial(ask_peer, "vllm", counts, options)
        else:
            raw_counts = [1] if options.backend in ONE_STREAM else counts
            runners[f"raw {options.backend} {kind}"] = partial(
                _raw, python, options.backend, kind, raw_counts, options.tokens
            )
        runners[f"fastchat_grpc {options.backend} {kind}"] = partial(
            _ours, python, options.backend, kind, counts, options.tokens
        )
    for peer in options.peers.split(",") if options.peers else ():
        runners[peer] = partial(ask_peer, peer, counts, options)
    return runners


def _role(python: Path, *arguments: str) -> list[str]:
    return [str(python), "-m", ROLES, *arguments]


def _raw(python: Path, backend: str, kind: str, counts: list[int], tokens: int) -> Measured:
    command = _role(python, "raw", backend, kind, ",".join(map(str, counts)), str(tokens))
    with child(command, quiet=True) as process:
        return {int(n): measured for n, measured in json.loads(process.answer).items()}


def _ours(python: Path, backend: str, kind: str, counts: list[int], tokens: int) -> Measured:
    with child(_role(python, "worker", backend, kind), quiet=True) as worker:
        return asyncio.run(ask_ours(worker.answer, counts, tokens))


if __name__ == "__main__":
    run(sys.argv[1:])
