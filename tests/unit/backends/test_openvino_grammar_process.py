"""Grammars are compiled beside the engine: one that is heavy, or that the compiler does not survive, ends alone."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fastchat_grpc.backends.openvino import process as openvino_process
from fastchat_grpc.backends.openvino.grammar_process import MODULE, Grammar, GrammarLoad, GrammarProcess
from fastchat_grpc.backends.openvino.messages import Add, Step

STAND_IN = """
import os, sys, time
from fastchat_grpc.backends.openvino.messages import read_frames, write_frame
out = os.fdopen(os.dup(1), "wb")
frames = read_frames(sys.stdin.buffer)
next(frames)
write_frame(out, "ready")
for _, value in frames:
    if value == "crash":
        os.abort()
    if value.startswith("/"):  # slow the first time
        try:
            os.mkdir(value)
            time.sleep(60)
        except FileExistsError:
            pass
    write_frame(out, "wrong" if value == "(" else None)
"""
LOAD = GrammarLoad(vocabulary="v", model="m", vocabulary_size=9)


@pytest.fixture
def process() -> GrammarProcess:
    return GrammarProcess(LOAD, prepared, (sys.executable, "-c", STAND_IN), timeout_s=5)


def prepared(grammar: Grammar) -> str | None:
    return "not here" if grammar[1] == "b" else None


def answer(process: GrammarProcess, value: str) -> str | None:
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    process.check(("regex", value), answers.put)
    return answers.get(timeout=60)


def test_the_compilers_answer_comes_back_and_is_remembered(process: GrammarProcess) -> None:
    assert answer(process, "a") is None
    assert answer(process, "(") == "wrong"
    assert process._child is not None
    process._child.kill()
    assert answer(process, "(") == "wrong"


def test_what_compiles_is_prepared_before_the_answer(process: GrammarProcess) -> None:
    assert answer(process, "b") == "not here"


def test_a_compiler_whose_engine_is_gone_ends_in_the_middle_of_a_grammar() -> None:
    """Else it would take a processor for hours. It may be in a library that holds Python's lock."""
    work = "lambda grammar: ctypes.PyDLL(None).sleep(60)"
    code = f"import ctypes, io\nfrom {MODULE} import answer_all\nanswer_all([1], io.BytesIO(), {work}, 1)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == -signal.SIGALRM


def test_a_grammar_that_ends_the_compiler_is_refused_and_the_next_is_compiled(process: GrammarProcess) -> None:
    assert answer(process, "crash") == "its compiler ended with status -6"
    assert answer(process, "a") is None


def test_a_grammar_that_takes_too_long_is_refused_and_tried_again_when_it_comes_again(
    process: GrammarProcess, tmp_path: Path
) -> None:
    """The machine may have been busy."""
    assert answer(process, str(tmp_path / "tried")) == "it takes longer than 5 s to compile"
    assert answer(process, "a") is None
    assert answer(process, str(tmp_path / "tried")) is None


def test_a_known_grammar_does_not_wait_behind_one_that_compiles() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def prepare(grammar: Grammar) -> str | None:
        if grammar[1] == "long":
            begun.set()
            go_on.wait(60)
        return None

    process = GrammarProcess(LOAD, prepare, (sys.executable, "-c", STAND_IN))
    assert answer(process, "a") is None
    later: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    process.check(("regex", "long"), later.put)
    assert begun.wait(60)
    assert answer(process, "a") is None
    assert later.empty()
    go_on.set()
    assert later.get(timeout=60) is None


def test_a_compiler_that_does_not_start_refuses_grammars_alone() -> None:
    broken = GrammarProcess(LOAD, prepared, (sys.executable, "-c", "raise SystemExit(1)"))
    assert answer(broken, "a") == "its compiler does not start"


def test_choices_join_when_their_grammar_is_compiled_unless_they_were_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = openvino_process.Engine.__new__(openvino_process.Engine)
    engine._checking = set()
    asked: list[Any] = []

    class Grammars:
        def check(self, grammar: Any, answer: Any) -> None:
            asked.append(answer)

    engine._grammars = Grammars()  # type: ignore[assignment]
    engine._lanes = {}
    added: list[int] = []
    monkeypatch.setattr(engine, "_add", lambda message, report: added.append(message.key))
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    report = Step()
    choices = [Add(key=key, token_ids=(1,), config={}, grammar=("regex", "a")) for key in (1, 2, 3)]
    inbox.put(choices)
    inbox.put([Add(key=9, token_ids=(1,), config={})])
    inbox.put(2)
    assert engine._take(inbox, report, wait=False)
    assert added == [9], "others do not wait for the compiler"
    asked[0](None)
    assert engine._take(inbox, report, wait=False)
    assert added == [9, 1, 3]
    inbox.put(choices)
    engine._take(inbox, report, wait=False)
    asked[1]("wrong")
    engine._take(inbox, report, wait=False)
    assert report.refused == {1: "wrong", 2: "wrong", 3: "wrong"}
