"""The gateway's module off Envoy: what it makes of one stream's events, under AddressSanitizer."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fastchat_grpc.native.library import find_compiler
from tools.fuzz_gateway import MODULE, build

Told = Callable[[str], list[str]]
HARNESS = Path(__file__).parent / "stub_envoy.c"
BROKEN = "begin heads 1 ack frame 1 Hello reset 1"
"""The caller has a part, and the controller is asked (callout 2)."""


@pytest.fixture(scope="module")
def envoy(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What the module does when it is told the words of `stub_envoy.c`, line by line."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("stub") / "stub_envoy"
    try:
        build(
            path,
            compiler,
            HARNESS,
            [part.name for part in MODULE.glob("*.c")],
            ("-Wl,--wrap=calloc", "-Wl,--wrap=realloc"),
        )
    except subprocess.CalledProcessError as error:
        if "sanitize" in error.stderr or "asan" in error.stderr:
            pytest.skip("the compiler has no AddressSanitizer")
        raise AssertionError(error.stderr) from None

    def told(words: str) -> list[str]:
        done = subprocess.run([path, *words.split()], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        return done.stdout.splitlines()

    return told


def said(lines: list[str]) -> str:
    """All the text that the caller got."""
    return "".join(line.removeprefix("caller gets ") for line in lines if line.startswith("caller gets "))


def test_another_worker_goes_on(envoy: Told) -> None:
    lines = envoy(f"{BROKEN} goes 2 second heads 3 ack frame 3 World trailers 3 0")
    assert said(lines) == "HelloWorld"
    assert [line for line in lines if "starts" in line or "asks" in line] == [
        "1 starts with 3 bytes at first",
        "2 asks controller_0",
        "3 starts with 8 bytes at second",
    ]
    assert lines[-1] == "trailers grpc-status=0"


def test_a_worker_that_does_not_know_of_state_is_left_before_its_text_is_passed_on(envoy: Told) -> None:
    """It ignores what it was sent to go on from, and begins anew."""
    lines = envoy(
        f"{BROKEN} goes 2 second heads 3 plain bare 3 Hello bare 3 World goes 4 third heads 5 ack frame 5 World"
    )
    assert said(lines) == "HelloWorld"
    assert lines[-4:-1] == ["3 is reset", "4 asks controller_0", "5 starts with 8 bytes at third"]


def test_a_reply_that_was_complete_ends_without_a_word_of_the_next_worker(envoy: Told) -> None:
    assert envoy(f"{BROKEN} goes 2 second heads 3 end")[-1].startswith("trailers")


def test_a_controller_that_has_nobody_yet_is_asked_in_turn_with_the_others(envoy: Told) -> None:
    lines = envoy(f"controllers 2 {BROKEN} again 2 again 3 silent 4 goes 5 second")
    asked = [line.partition(" asks ")[2] for line in lines if "asks" in line]
    assert asked == ["controller_0", "controller_1", "controller_0", "controller_1"]
    assert lines[-1].endswith("at second")


def test_questions_that_bring_nothing_end(envoy: Told) -> None:
    lines = envoy(f"controllers 2 {BROKEN} " + " ".join(f"again {2 + i}" for i in range(1002)))
    assert sum("asks" in line for line in lines) <= 1002
    assert lines[-1].startswith("trailers grpc-status=14")


def test_an_answer_to_an_earlier_question_is_none_to_this_one(envoy: Told) -> None:
    lines = envoy(f"{BROKEN} goes 1 elsewhere goes 2 second reset 3 goes 2 elsewhere goes 4 third")
    assert [line.rpartition(" ")[2] for line in lines if "starts" in line] == ["first", "second", "third"]


def test_headers_between_gateway_and_worker_do_not_reach_the_caller(envoy: Told) -> None:
    for words in ("begin heads 1 ack,end", "begin heads 1 ack frame 1 Hello"):
        line = next(line for line in envoy(words) if line.startswith(("only", "headers")))
        assert "content-type" in line
        assert "x-fastchat" not in line


@pytest.mark.parametrize("words", ["nomemory calloc 1 begin", "nomemory realloc 4 begin"])
def test_a_request_that_there_is_no_memory_for_goes_to_no_worker(envoy: Told, words: str) -> None:
    (line,) = envoy(words)
    assert "grpc-status=8 grpc-message=the gateway has no memory" in line


def test_no_part_of_a_message_that_there_is_no_memory_for_is_passed_on(envoy: Told) -> None:
    lines = envoy(f"begin heads 1 ack nomemory realloc 2 frame 1 {'x' * 99}")
    assert "grpc-status=8" in lines[-1]
    assert not [line for line in lines if line.startswith(("headers", "caller gets"))]


@pytest.mark.parametrize("order", ["silent 2 below", "below goes 2 elsewhere"])
def test_a_parked_stream_tells_its_controller_and_asks_when_its_caller_reads(envoy: Told, order: str) -> None:
    parks = "controllers 2 begin heads 1 ack frame 1 Hello above frame 1 World"
    lines = envoy(f"{parks} {order} goes 3 second heads 4 plain frame 4 x")
    assert [line for line in lines if not line.startswith(("caller", "headers"))] == [
        "1 starts with 3 bytes at first",
        "1 is reset",
        "2 asks controller_0 while parked",
        "3 asks controller_0 after parking",
        "4 starts with 13 bytes at second",
        "4 is reset",
        "5 asks controller_0",
    ]
    assert said(lines) == "HelloWorld"
