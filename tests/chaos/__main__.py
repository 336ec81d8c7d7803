"""The whole storm: `python -m tests.chaos`. Exits with 1 if a request was lost, a text differs, or something leaks."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.chaos.fleet import ChaosFleet, Group
from tests.chaos.storm import Plan, Report, Storm
from tests.chaos.workload import dice_workload, text_workload

MAIN, SOLO, SEEDLESS = "dice", "solo", "seedless"


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--last-seed", type=int, help="one storm for each seed up to this one")
    parser.add_argument("--workers", type=int, default=5, help="of the main model; there are 3 more, of two others")
    parser.add_argument("--controllers", type=int, default=3)
    parser.add_argument("--relay", "--streams", type=int, default=150, help="callers that know the controllers")
    parser.add_argument("--client", type=int, default=30, help="callers that know the workers of the main model only")
    parser.add_argument("--http", type=int, default=60, help="callers of a gateway in direct mode")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--pause", type=float, default=2.0, help="mean seconds between two faults")
    parser.add_argument("--delay-ms", type=float, default=200.0, help="time per token of a worker without a model")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--model-path", help="use this model on all workers; its callers know the controllers")
    parser.add_argument("--log", type=Path, help="folder for the logs of the processes")
    return parser.parse_args()


def dice(*options: str, delay_ms: float) -> list[str]:
    """The flags of a worker of dice."""
    pairs = [f"delay_ms={delay_ms:g}", *options]
    flags = [flag for pair in pairs for flag in ("--backend-option", pair)]
    return ["--backend", "tests.chaos.dice:Dice", "--model-path", "dice", *flags]


def dice_groups(workers: int, delay_ms: float) -> list[Group]:
    """A model of several workers, one of a single worker, and one whose engine takes no seeds and little at once."""
    small = ["--limit-worker-concurrency", "4", "--max-queue", "4"]
    return [
        Group(model=MAIN, workers=workers, backend=dice(delay_ms=delay_ms)),
        Group(model=SOLO, workers=1, backend=dice(delay_ms=delay_ms), live=0),
        Group(model=SEEDLESS, workers=2, backend=[*dice("seeds=none", delay_ms=delay_ms), *small]),
    ]


def model_group(path: str, workers: int) -> Group:
    """Workers of a real model, several on one machine: each takes a part of its cores and of its memory."""
    shares = ["--backend-option", "threads=1", "--backend-option", "kv_cache_tokens=8192"]
    return Group(model=MAIN, workers=workers, backend=["--backend", "transformers", "--model-path", path, *shares])


async def run(options: argparse.Namespace, seed: int, log: Path) -> Report:
    """Start a fleet, let the storm blow over it, stop it."""
    if options.model_path:
        groups = [model_group(options.model_path, options.workers)]
        workload = text_workload(MAIN, options.tokens)
        callers = {"relay": options.relay}
    else:
        groups = dice_groups(options.workers, options.delay_ms)
        workload = dice_workload(MAIN, SOLO, SEEDLESS, options.tokens)
        callers = {"relay": options.relay, "client": options.client, "http": options.http}
    plan = Plan(seed=seed, seconds=options.seconds, pause_s=options.pause, **callers)
    fleet = ChaosFleet(options.controllers, groups, log, gateway=plan.http > 0)
    try:
        await fleet.start()
        return await Storm(fleet, plan, workload, MAIN).run()
    finally:
        await fleet.stop()


def main() -> None:
    """Run and print."""
    options = parse()
    good = True
    for seed in range(options.seed, (options.last_seed or options.seed) + 1):
        with tempfile.TemporaryDirectory() as folder:
            report = asyncio.run(run(options, seed, options.log or Path(folder)))
        print(f"seed {seed}: {options.controllers} controllers, {options.seconds:g} s of faults")
        print("\n".join(report.lines()))
        journal = [] if report.good else ["what was done:", *report.journal]
        for line in [*report.lost[:20], *report.differing[:20], *journal]:
            print("  " + line)
        sys.stdout.flush()
        good = good and report.good
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
