"""A short run of what `make fuzz-gateway` does at length."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fastchat_grpc.native.library import find_compiler
from tools.fuzz_gateway import build


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("fuzz") / "fuzz_frames"
    try:
        build(path, compiler)
    except subprocess.CalledProcessError as error:
        if "sanitize" in error.stderr or "asan" in error.stderr:
            pytest.skip("the compiler has no AddressSanitizer")
        raise AssertionError(error.stderr) from None
    return path


def test_no_answer_of_a_worker_or_controller_breaks_what_reads_it(harness: Path) -> None:
    done = subprocess.run([harness, "20000", "7"], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout == "20000 inputs\n"


def test_an_answer_beyond_what_32_bits_count_leaves_nothing_but_its_state(harness: Path) -> None:
    done = subprocess.run([harness, "long"], capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout == "a long answer\n", done.stdout + done.stderr[-4000:]
