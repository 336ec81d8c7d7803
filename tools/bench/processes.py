"""Processes of benchmarks: started, told by a line that they are ready, measured, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass
class Child:
    """A process that has said "ready <answer>"."""

    process: subprocess.Popen[str]
    answer: str

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU that it has used, all threads together."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    @property
    def memory_mb(self) -> float:
        """Resident memory in MB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def child(
    command: Sequence[str], ready: str = "ready ", cwd: str | None = None, *, quiet: bool = False
) -> Iterator[Child]:
    """Run a command that prints a line beginning with `ready`; end it on exit. `quiet` drops its standard error."""
    stderr = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=cwd, start_new_session=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(ready):
                yield Child(process, line.removeprefix(ready).strip())
                return
        raise RuntimeError(f"{command} ended with status {process.wait()} before it was ready")
    finally:
        end(process, 10)
        if process.stdout is not None:
            process.stdout.close()


def end(process: subprocess.Popen[Any], patience_s: float) -> None:
    """End a process that leads a session, and what it leaves behind: a server that is ended while it starts may."""
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def role(module: str, *arguments: str) -> list[str]:
    """The command that runs a part of a benchmark as a process."""
    return [sys.executable, "-m", module, *arguments]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: first column to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for n, row in enumerate(cells):
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))
        if n == 0:
            print("  ".join("-" * width for width in widths))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
