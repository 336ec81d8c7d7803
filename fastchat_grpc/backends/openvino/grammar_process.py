"""Another process beside OpenVINO's, in which grammars are compiled first (`python -m` this module).

One that the compiler does not survive would end every stream of the engine's process, and one that takes too long
could not be stopped there. Here it ends alone. The process starts with the first grammar. Frames as in
`messages.py`: a GrammarLoad once, then grammars, each answered by a text or None.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from fastchat_grpc.backends.openvino.messages import read_frames, write_frame
from fastchat_grpc.backends.openvino.quiet import forbid_telemetry

MODULE = "fastchat_grpc.backends.openvino.grammar_process"
COMPILE_TIMEOUT_S = 10.0
START_TIMEOUT_S = 60.0
KNOWN_GRAMMARS = 256
Grammar = tuple[str, str]
"""Field of StructuredOutputConfig, and its value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLoad:
    """What the process needs of the model."""

    vocabulary: str
    model: str
    vocabulary_size: int


class _NotNow(Exception):
    """Why a grammar cannot be compiled this time; it says nothing of the next."""


class GrammarProcess:
    """Asks the process, and starts it anew where it died or took too long. Remembers the last answers.

    `check` belongs to the thread of the engine. What is known is answered there and then; the rest one after the
    other in a thread of this class, once `prepare` has made there what a grammar needs that compiles.
    """

    def __init__(
        self,
        load: GrammarLoad,
        prepare: Callable[[Grammar], str | None],
        command: tuple[str, ...] = (sys.executable, "-m", MODULE),
        timeout_s: float = COMPILE_TIMEOUT_S,
    ) -> None:
        self._load = load
        self._prepare = prepare
        self._timeout_s = timeout_s
        self._command = command
        self._known: OrderedDict[Grammar, str | None] = OrderedDict()
        self._lock = threading.Lock()
        """Held to look at what is known."""
        self._asked: queue.SimpleQueue[tuple[Grammar, Callable[[str | None], None]]] = queue.SimpleQueue()
        self._child: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def check(self, grammar: Grammar, answer: Callable[[str | None], None]) -> None:
        """Say by `answer`, perhaps later and elsewhere, why a grammar does not compile, or None."""
        if self._answered(grammar, answer):  # nobody waits behind another's grammar for his own, that is done
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="grammars", daemon=True)
            self._thread.start()
        self._asked.put((grammar, answer))

    def _work(self) -> None:
        while True:
            grammar, answer = self._asked.get()
            if self._answered(grammar, answer):
                continue
            try:
                made = self._ask(grammar) or self._prepare(grammar)
            except _NotNow as error:
                answer(str(error))
                continue
            with self._lock:
                self._known[grammar] = made
                if len(self._known) > KNOWN_GRAMMARS:
                    self._known.popitem(last=False)
            answer(made)

    def _answered(self, grammar: Grammar, answer: Callable[[str | None], None]) -> bool:
        with self._lock:
            if grammar not in self._known:
                return False
            self._known.move_to_end(grammar)
            known = self._known[grammar]
        answer(known)
        return True

    def _ask(self, grammar: Grammar) -> str | None:
        """Why the process cannot compile a grammar, or None. Raises _NotNow."""
        try:
            child = self._child or self._start()
        except (OSError, EOFError, pickle.UnpicklingError):
            raise _NotNow("its compiler does not start") from None
        assert child.stdin is not None
        assert child.stdout is not None
        too_slow = threading.Event()

        def end() -> None:
            too_slow.set()
            child.kill()

        alarm = threading.Timer(self._timeout_s, end)
        alarm.start()
        try:
            write_frame(child.stdin, grammar)
            answer: str | None = _next(child.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            self._child = None
            child.wait()
            if too_slow.is_set():
                raise _NotNow(f"it takes longer than {self._timeout_s:g} s to compile") from None
            return f"its compiler ended with status {child.returncode}"
        finally:
            alarm.cancel()
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdin is not None
        assert child.stdout is not None
        alarm = threading.Timer(START_TIMEOUT_S, child.kill)
        alarm.start()
        try:
            write_frame(child.stdin, self._load)
            _next(child.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            child.kill()
            child.wait()
            raise
        finally:
            alarm.cancel()
        self._child = child
        return child


def _next(stream: IO[bytes]) -> Any:
    """The next message. Raises EOFError where the other side has ended."""
    for message in read_frames(stream):
        return message
    raise EOFError


def main() -> None:
    """Answer until the input ends, as it does with the engine's process."""
    forbid_telemetry()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with suppress(BrokenPipeError):
        frames = read_frames(sys.stdin.buffer)
        load = next(frames, None)
        if load is None:
            return
        import openvino_genai

        from fastchat_grpc.backends.openvino.grammar import GrammarCheck

        check = GrammarCheck(openvino_genai.Tokenizer(load.vocabulary), load.model, load.vocabulary_size)
        check.problem(("regex", "a"))  # makes what every check needs
        write_frame(out, "ready")
        answer_all(frames, out, check.problem)


def answer_all(
    frames: Iterable[Grammar],
    out: IO[bytes],
    problem: Callable[[Grammar], str | None],
    timeout_s: int = int(COMPILE_TIMEOUT_S) + 2,
) -> None:
    """Answer each grammar. Ends the process at one that takes too long: whoever would have ended it may be gone."""
    for grammar in frames:
        signal.alarm(timeout_s)  # whose default, unlike a handler of ours, needs no interpreter
        answer = problem(grammar)
        signal.alarm(0)
        write_frame(out, answer)


if __name__ == "__main__":
    main()
