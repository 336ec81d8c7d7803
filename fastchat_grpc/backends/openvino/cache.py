"""What is made once of a model's files for OpenVINO: exports, rewritten GGUF files and their graphs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fastchat_grpc.models.embedded import cache_root


def once(name: str, make: Callable[[Path], None]) -> Path:
    """A file or folder of the cache: made where it is not there, once, however many processes ask.

    `make` writes to the path that it is given; what it leaves there when it fails is removed. Raises OSError, and
    what `make` raises.
    """
    target = cache_root() / "openvino" / name
    if target.exists():
        return target
    import filelock

    part = target.with_name(name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.with_name(name + ".lock")):
        if not target.exists():
            _remove(part)  # of a process that was killed
            try:
                make(part)
                part.rename(target)  # renamed when whole
            finally:
                _remove(part)
    return target


def run(command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None) -> None:
    """Run a program that makes something, silently. Raises ValueError with what it said when it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env={**os.environ, **(environment or {})},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"it took over {timeout_s:g} s") from error
    if done.returncode != 0:
        raise ValueError(_reason(done.stderr))


def _reason(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (said or lines or ["its process ended without a message"])[-1]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
