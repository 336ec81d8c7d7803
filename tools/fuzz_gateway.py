"""Random answers for the gateway's module, off Envoy and under AddressSanitizer: tools/fuzz_gateway.py [COUNT] [SEED]

The part that reads what workers and controllers send is compiled with `tests/unit/gateway/fuzz_frames.c`, and runs once
for each core. Ends with an error where it reads or writes out of bounds, leaks, or breaks an invariant.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "fastchat_grpc" / "gateway" / "resume"
HARNESS = ROOT / "tests" / "unit" / "gateway" / "fuzz_frames.c"
PARTS = ("frames.c", "wire.c", "buffer.c", "ask.c", "settings.c")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
COUNT = 10_000_000


def build(
    path: Path,
    compiler: str = os.environ.get("CC", "cc"),
    harness: Path = HARNESS,
    parts: Sequence[str] = PARTS,
    flags: Sequence[str] = (),
) -> None:
    """Compile a harness, and parts of the module, to `path`. Raises CalledProcessError, with what the compiler says."""
    sources = [str(harness), *(str(MODULE / part) for part in parts)]
    command = [compiler, "-std=c11", "-O1", "-g", *SANITIZERS, "-Wall", "-Wextra", "-Werror", f"-I{MODULE}", *flags]
    subprocess.run([*command, *sources, "-o", str(path)], check=True, capture_output=True, text=True)


def main(count: int = COUNT, seed: int = 1) -> int:
    """Run `count` inputs; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        harness = Path(folder) / "fuzz_frames"
        build(harness)
        cores = os.cpu_count() or 1
        share = -(-count // cores)
        runs = [subprocess.Popen([str(harness), str(share), str(seed + i * share)]) for i in range(cores)]
        return max(run.wait() for run in runs)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])))
