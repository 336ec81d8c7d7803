"""Shared libraries of C files, such as those in this folder: compiled once for a machine, kept in the user's cache.

What is loaded runs in this process, so it is loaded only from a folder, and a file, that belong to this user and that
nobody else may write to.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from fastchat_grpc.models.embedded import cache_root

log = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c11", "-shared", "-fPIC")
COMPILE_TIMEOUT_S = 60
FOLDER = Path(__file__).parent
_QUOTED = 600
"""Characters of a compiler's message that are shown."""

T = TypeVar("T")


class CannotCompile(Exception):
    """No compiler here makes the library; the text says why, in the compiler's words."""


def load_library(load: Callable[[Path], T]) -> T:
    """What `load` makes of the library, which is compiled first where there is none that can be trusted and loaded.

    Raises:
        CannotCompile: it can be neither loaded nor made.
    """
    try:
        return _load_library(load)
    except OSError as error:  # no room, or a folder that is ours and cannot be written to
        raise CannotCompile(f"there is no place for it: {error}") from error


def _load_library(load: Callable[[Path], T]) -> T:
    path = _folder() / f"{_name()}.so"
    if _is_ours(path):
        try:
            return load(path)
        except (OSError, AttributeError) as error:
            log.warning("the compiled kernels in %s are broken and are made again: %s", path, error)
    compiler = find_compiler()
    if compiler is None:
        raise CannotCompile("there is no C compiler")
    compile_library(compiler, path)
    # Under another name: a broken library of this one stays loaded, and would be found instead.
    fresh = path.with_name(f"{path.stem}-{os.getpid()}.so")
    shutil.copy2(path, fresh)
    try:
        return load(fresh)
    except (OSError, AttributeError) as error:
        path.unlink(missing_ok=True)
        raise CannotCompile(f"what {compiler} made cannot be loaded: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)


def made_library(folder: Path, cache: str, flags: Sequence[str]) -> Path:
    """The library of the C files of a folder, for another process to load; compiled where there is none to be trusted.

    Args:
        cache: name of the folder in the user's cache that it is kept in.

    Raises:
        CannotCompile: there is no compiler, no room, or none of its ways to make it works.
    """
    try:
        path = _folder(cache) / f"{_name(folder, flags)}.so"
        if not _is_ours(path):
            compiler = find_compiler()
            if compiler is None:
                raise CannotCompile("there is no C compiler")
            compile_library(compiler, path, flags, folder)
        return path
    except OSError as error:
        raise CannotCompile(f"there is no place for it: {error}") from error


def find_compiler() -> str | None:
    """A C compiler of this machine: $CC, or a usual name."""
    return next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)


def compile_library(compiler: str, path: Path, flags: Sequence[str] = FLAGS, folder: Path = FOLDER) -> None:
    """Compile the C files of a folder into a shared library at `path`, with what the compiler understands of the flags.

    Raises:
        CannotCompile: with no choice of flags.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sources = list(map(str, sorted(folder.glob("*.c"))))
    reasons: list[str] = []
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        made = Path(work) / path.name
        for chosen in _choices(flags):
            command = [compiler, *chosen, *sources, "-o", str(made), "-lm"]
            try:
                done = subprocess.run(
                    command, timeout=COMPILE_TIMEOUT_S, capture_output=True, text=True, errors="replace", check=False
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise CannotCompile(f"{compiler}: {error}") from error
            if done.returncode == 0:
                # Renamed when whole, so that two starting workers do not meet half a file.
                made.chmod(0o700)
                made.replace(path)
                return
            reasons.append(done.stderr.strip() or f"exit status {done.returncode}")
    raise CannotCompile(f"{compiler}: {reasons[0][-_QUOTED:]}")


def _choices(flags: Sequence[str]) -> Iterator[list[str]]:
    """The flags, then without what some compilers lack: clang's -march for ARM, Apple's OpenMP."""
    tuned = [flag.replace("-march=", "-mcpu=") for flag in flags]
    plain = [flag for flag in flags if flag != "-fopenmp"]
    seen: list[list[str]] = []
    for choice in (list(flags), tuned, plain, [flag for flag in tuned if flag != "-fopenmp"]):
        if choice not in seen:
            seen.append(choice)
            yield choice


def _folder(cache: str = "kernels") -> Path:
    """The folder of compiled libraries: ours alone, or one for this process where that cannot be."""
    folder = cache_root() / cache
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and _owned(found):
            if stat.S_IMODE(found.st_mode) & 0o077:
                folder.chmod(0o700)
            return folder
        log.warning("%s belongs to somebody else: %s are compiled for this process alone", folder, cache)
    except OSError as error:
        log.warning("%s cannot be used (%s): %s are compiled for this process alone", folder, error, cache)
    own = Path(tempfile.mkdtemp(prefix=f"fastchat-grpc-{cache}-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def _is_ours(path: Path) -> bool:
    """Whether a file is there that only this user can have written. One of anybody else is removed."""
    try:
        found = path.lstat()
    except OSError:
        return False
    if stat.S_ISREG(found.st_mode) and _owned(found) and not found.st_mode & 0o022:
        return True
    log.warning("%s may have been written by somebody else and is made again", path)
    path.unlink()
    return False


def _owned(found: os.stat_result) -> bool:
    return sys.platform == "win32" or found.st_uid == os.getuid()


def _name(folder: Path = FOLDER, flags: Sequence[str] = FLAGS) -> str:
    """By everything that the library depends on. A home folder may be shared by machines."""
    source = b"".join(path.read_bytes() for path in sorted(folder.glob("*.[ch]")))
    machine = platform.system() + platform.machine() + _cpu_flags()
    return hashlib.sha256(source + " ".join(flags).encode() + machine.encode()).hexdigest()[:16]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
