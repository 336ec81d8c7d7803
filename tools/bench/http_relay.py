"""What it costs to pass a token on over HTTP: our gateway, plain Envoy, and the relays of our peers.

Every relay stands before a worker without a model that says a token each 50 ms, or as fast as it can, to
many streams at once. Measured: CPU time of the relay's processes per token, the time to the first token
when nothing else runs, and how late tokens come (against the most timely token of their stream).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
from typing import Any

from tools.bench import relay_client as client
from tools.bench.relay_targets import TARGETS, Target

NAME = "http-relay"
HELP = "CPU per relayed token, time to first token and lag over HTTP; SMG and FastChat beside ours"
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def run(args: list[str]) -> dict[str, Any]:
    """Measure the targets one after the other and print a table."""
    parser = argparse.ArgumentParser(prog="http-relay", description=HELP)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--idle-requests", type=int, default=50)
    parser.add_argument("--only", default="", help=f"comma separated, of: {', '.join(TARGETS)}")
    options = parser.parse_args(args)
    names = [name.strip() for name in options.only.split(",")] if options.only else list(TARGETS)
    rows: dict[str, Any] = {}
    for name in names:
        try:
            with TARGETS[name]() as target:  # type: ignore[attr-defined]
                rows[name] = asyncio.run(measure(target, options))
        except Exception as error:  # a peer that does not run here must not hide the others
            rows[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(_row(name, rows[name]), flush=True)
    print("\n" + table(rows))
    return rows


async def measure(target: Target, options: argparse.Namespace) -> dict[str, float]:
    """All figures of one target. Times are milliseconds, CPU is microseconds per token."""
    await client.crowd(target.port, 4, 20, True)  # connections, caches
    first_s = await client.idle(target.port, options.idle_requests)
    result = {"idle_ttft_ms": first_s * 1e3}
    for name, flat_out in (("paced", False), ("flat", True)):
        before = cpu_s(target.pids)
        timings = await client.crowd(target.port, options.streams, options.tokens, flat_out)
        spent = cpu_s(target.pids) - before
        result[f"{name}_us_per_token"] = spent / (options.streams * options.tokens) * 1e6
        if not flat_out:
            lags = [lag for timing in timings for lag in timing.lags()]
            result["lag_p50_ms"] = statistics.median(lags) * 1e3
            result["lag_p99_ms"] = client.percentile(lags, 0.99) * 1e3
    return result


def cpu_s(pids: tuple[int, ...]) -> float:
    """CPU seconds that processes have used, their threads included."""
    total = 0.0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as status:
            fields = status.read().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) * _TICK_S
    return total


_COLUMNS = {
    "paced_us_per_token": "paced us/token",
    "flat_us_per_token": "flat us/token",
    "idle_ttft_ms": "idle TTFT ms",
    "lag_p50_ms": "lag p50 ms",
    "lag_p99_ms": "lag p99 ms",
}


def table(rows: dict[str, Any]) -> str:
    """A Markdown table."""
    lines = ["| relay | " + " | ".join(_COLUMNS.values()) + " |", "|---|" + "---|" * len(_COLUMNS)]
    lines += [_row(name, row) for name, row in rows.items()]
    return "\n".join(lines)


def _row(name: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {name} | did not run: {row['failed']} |" + " |" * (len(_COLUMNS) - 1)
    cells = (f"{row[key]:.0f}" if key.endswith("token") else f"{row[key]:.1f}" for key in _COLUMNS)
    return f"| {name} | " + " | ".join(cells) + " |"
