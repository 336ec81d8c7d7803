"""The one entry to all benchmarks: `make bench WHAT=name ARGS="..."`, or `python -m tools.bench name ...`.

A benchmark is a module of this package with `NAME`, `HELP` and `run(args) -> dict`. It measures ours and
named baselines side by side in one run and prints a table; what it returns is written as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

RESULTS = Path("bench-results")


def benchmarks() -> dict[str, ModuleType]:
    """Every benchmark by name."""
    package = importlib.import_module("tools.bench")
    modules = (importlib.import_module(f"tools.bench.{info.name}") for info in pkgutil.iter_modules(package.__path__))
    return {module.NAME: module for module in modules if hasattr(module, "NAME")}


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu.partition(":")[2].strip() or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    found = benchmarks()
    if len(sys.argv) < 2 or sys.argv[1] not in found:
        lines = [f"  {name:16} {module.HELP}" for name, module in sorted(found.items())]
        print("usage: make bench WHAT=name ARGS='...'\n" + "\n".join(lines))
        sys.exit(0 if sys.argv[1:] in ([], ["list"]) else 2)
    name, args = sys.argv[1], sys.argv[2:]
    result = {"benchmark": name, "arguments": args, "machine": machine(), "result": found[name].run(args)}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
