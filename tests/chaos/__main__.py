"""The whole storm: `python -m tests.chaos`. Exits with 1 if a request was lost or a text differs."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.chaos.fleet import ChaosFleet
from tests.chaos.storm import Plan, Report, Storm

ECHO_PROMPTS = tuple(f"{i}: The quick brown fox j\u00fcmps over \U0001f98a dogs. " * 2 for i in range(8))
MODEL_PROMPTS = tuple(f"Write a sentence about {word}." for word in ("the sea", "bread", "rain", "a clock"))


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--controllers", type=int, default=3)
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--pause", type=float, default=2.0, help="mean seconds between two faults")
    parser.add_argument("--delay-ms", type=float, default=200.0, help="time per token of an echo worker")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--model-path", help="use this model instead of echo workers")
    parser.add_argument("--log", type=Path, help="folder for the logs of the processes")
    return parser.parse_args()


def backend_arguments(model_path: str | None, delay_ms: float) -> list[str]:
    """The flags of a worker that choose what it runs."""
    if model_path is not None:
        # Several workers share this machine: each takes a part of its cores and of its memory.
        shares = ["--backend-option", "threads=1", "--backend-option", "kv_cache_tokens=8192"]
        return ["--backend", "transformers", "--model-path", model_path, *shares]
    return ["--backend", "echo", "--model-path", "echo", "--backend-option", f"delay_ms={delay_ms:g}"]


async def run(options: argparse.Namespace, log: Path) -> Report:
    """Start a fleet, let the storm blow over it, stop it."""
    backend = backend_arguments(options.model_path, options.delay_ms)
    fleet = ChaosFleet(options.controllers, options.workers, backend, log)
    plan = Plan(
        seed=options.seed,
        streams=options.streams,
        seconds=options.seconds,
        pause_s=options.pause,
        prompts=MODEL_PROMPTS if options.model_path else ECHO_PROMPTS,
        max_new_tokens=options.tokens,
    )
    try:
        await fleet.start()
        return await Storm(fleet, plan).run()
    finally:
        await fleet.stop()


def main() -> None:
    """Run and print."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(run(options, options.log or Path(folder)))
    print(
        f"seed {options.seed}: {options.workers} workers, {options.controllers} controllers, "
        f"{options.streams} streams, {options.seconds:g} s"
    )
    print("\n".join(report.lines()))
    for line in [*report.lost, *report.differing][:20]:
        print("  " + line)
    sys.exit(1 if report.lost or report.differing or report.left else 0)


if __name__ == "__main__":
    main()
