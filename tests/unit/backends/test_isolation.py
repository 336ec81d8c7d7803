"""What one request holds fails that request alone: limits before the engine, and errors of one sequence."""

from __future__ import annotations

import io
import queue
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastchat_grpc.backends.echo import EchoTokenizer
from fastchat_grpc.backends.llama_cpp import backend as llama_cpp
from fastchat_grpc.backends.llama_cpp import engine as llama_cpp_engine
from fastchat_grpc.backends.llama_cpp.engine import EngineLimits, LlamaEngine
from fastchat_grpc.backends.openvino import process as openvino_process
from fastchat_grpc.backends.openvino.messages import Add, Step
from fastchat_grpc.backends.served import Served, ServedBackend
from fastchat_grpc.backends.vllm.requests import piece, sampling_parameters
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import Grammar, GrammarKind, ResumedChoice
from fastchat_grpc.errors import BackendFailed, InvalidArgument
from fastchat_grpc.text.batch import Output, Running
from fastchat_grpc.text.job import Job
from tests.unit.backends.asking import request
from tests.unit.backends.test_llama_cpp import LlamaMemory


def job(prompt_tokens: int, context_length: int, **fields: Any) -> Job:
    return Job(
        request("x", **fields), [1] * prompt_tokens, EchoTokenizer(), context_length=context_length, stream_interval=1
    )


def test_an_engine_is_never_asked_for_more_tokens_at_least_than_at_most() -> None:
    asked = job(10, 64, max_new_tokens=64, min_new_tokens=64)
    assert (asked.min_tokens(0), asked.max_tokens(0)) == (54, 54)
    resumed = (ResumedChoice(index=0, output_token_ids=(1,) * 50),)
    asked = job(10, 64, max_new_tokens=64, min_new_tokens=64, resume=resumed)
    assert (asked.min_tokens(0), asked.max_tokens(0)) == (4, 4)


class Handle:
    """A generation that ends in the first step."""

    def __init__(self) -> None:
        self.unread = True

    def can_read(self) -> bool:
        return self.unread

    def read(self) -> dict[int, Any]:
        self.unread = False
        return {0: SimpleNamespace(generated_ids=[7], generated_log_probs=[0.0], finish_reason=FINISHED)}

    def get_status(self) -> Any:
        return SimpleNamespace(name="FINISHED")


FINISHED = SimpleNamespace(name="STOP")


class Pipeline:
    """A pipeline that does not take the second of three requests, as GenAI says it."""

    def add_request(self, key: int, token_ids: Any, config: Any) -> Handle:
        if key == 2:
            raise RuntimeError("Check 'ok' failed at src/generation_config.cpp:1:\ntop_p must be in (0, 1]\n")
        return Handle()

    def has_non_finished_requests(self) -> bool:
        return False

    def step(self) -> None: ...

    def get_metrics(self) -> Any:
        return SimpleNamespace(cache_usage=0.0)


def test_a_request_that_openvino_does_not_take_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_process, "_tensor", tuple)
    engine = openvino_process.Engine.__new__(openvino_process.Engine)
    engine._lanes = {"": openvino_process.Lane(Pipeline())}
    engine._grammars, engine._processed_tokens, engine._checking = None, 0, set()
    monkeypatch.setattr(engine, "_config", lambda message: None)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    inbox.put([Add(key=key, token_ids=(1,), config={}) for key in (1, 2, 3)])
    inbox.put([Add(key=4, token_ids=(1,), config={}, adapter="no such lane")])
    reports: list[Step] = []

    def end_after_the_first(stream: Any, report: Step) -> None:
        reports.append(report)
        inbox.put(None)

    monkeypatch.setattr(openvino_process, "write_frame", end_after_the_first)
    engine.serve(inbox, io.BytesIO())
    (report,) = reports
    assert set(report.failed) == {2, 4}
    assert report.failed[2] == "top_p must be in (0, 1]"
    assert [output.key for output in report.outputs] == [1, 3]


class FailingSampler:
    """Takes the same letter, and fails where the prompt says so."""

    def __init__(self, llama: Any, model: Any, context: Any, tokenizer: Any, running: Running) -> None:
        self._fails = bytes(running.token_ids[:3]) == b"bad"

    def sample(self, row: int) -> int:
        if self._fails:
            raise BackendFailed("the grammar allows nothing that the model could say next")
        return ord("x")

    def free(self) -> None: ...


def test_a_llama_sequence_that_cannot_go_on_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp_engine, "Sampler", FailingSampler)
    limits = EngineLimits(slots=4, kv_cache_tokens=64, prefill_tokens=64, prefix_cache=False)
    engine = LlamaEngine(LlamaMemory(64), None, None, EchoTokenizer(), limits, on_close=lambda: None)
    sequences = {}
    for prompt in ("good", "bad!", "fine"):
        ids = list(prompt.encode())
        asked = Job(request(prompt), ids, EchoTokenizer(), context_length=64, stream_interval=1)
        sequences[prompt] = Running(job=asked, index=0, token_ids=ids, max_tokens=9, min_tokens=0, seed=0)
        engine.add(sequences[prompt])
    outputs: list[Output] = [*engine.step(), *engine.step()]
    failed = [output for output in outputs if output.error is not None]
    assert [output.sequence for output in failed] == [sequences["bad!"]]
    for prompt in ("good", "fine"):
        assert [o.token_ids for o in outputs if o.sequence is sequences[prompt] and o.token_ids] == [(120,), (120,)]
    engine.remove(sequences["bad!"])  # as the thread does with what has ended


@pytest.mark.parametrize(
    ("grammar", "message", "field"),
    [
        (None, "top_p must be in (0, 1]", ""),
        (Grammar(GrammarKind.REGEX, "("), "Failed to transform regex into a grammar", "structured_output.regex"),
    ],
)
def test_what_vllm_does_not_take_is_the_callers_error(
    monkeypatch: pytest.MonkeyPatch, grammar: Grammar | None, message: str, field: str
) -> None:
    def refuse(*args: Any, **fields: Any) -> None:
        raise ValueError(message)

    vllm, parameters = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.SamplingParams = refuse  # type: ignore[attr-defined]
    parameters.RequestOutputKind = SimpleNamespace(DELTA=1)  # type: ignore[attr-defined]
    parameters.StructuredOutputsParams = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)
    with pytest.raises(InvalidArgument) as refused:
        sampling_parameters(job(3, 64, grammar=grammar), 0, seed=None, stop_token_ids=(), prompt_logprobs=None)
    assert refused.value.field == field
    assert message in str(refused.value)


def test_a_grammar_at_which_vllm_gives_up_is_the_callers_error() -> None:
    """It ends a request without a reason, where its engine cannot compile what its check has passed."""
    output = SimpleNamespace(token_ids=[], finish_reason="error")
    with pytest.raises(InvalidArgument) as refused:
        piece(EchoTokenizer(), request("a", grammar=Grammar(GrammarKind.REGEX, r"[^\s\S]")), output)
    assert refused.value.field == "structured_output.regex"
    with pytest.raises(BackendFailed):
        piece(EchoTokenizer(), request("a"), output)


class Tokens(EchoTokenizer):
    """Remembers where it decoded."""

    threads: list[threading.Thread]

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        self.threads.append(threading.current_thread())
        return super().decode(token_ids, keep_special_tokens=keep_special_tokens)


async def test_many_tokens_become_text_off_the_event_loop() -> None:
    tokenizer = Tokens()
    tokenizer.threads = []
    backend = ServedBackend(BackendConfig(name="mlx", model=ModelConfig(path="m")))
    backend._served_model = Served(
        backend="mlx", names=("m",), tokenizer=tokenizer, context_length=9, capabilities=frozenset()
    )
    assert await backend.detokenize("m", [97] * 100_000) == "a" * 100_000
    assert await backend.detokenize("m", [97, 98]) == "ab"
    assert [thread is threading.main_thread() for thread in tokenizer.threads] == [False, True]


def test_llama_cpp_is_made_where_processes_have_no_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on macOS."""
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    backend = llama_cpp.create(BackendConfig(name="llama_cpp", model=ModelConfig(path=str(tmp_path / "m.gguf"))))
    assert backend._loader._threads == 3
