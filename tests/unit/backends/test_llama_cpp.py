"""Scheduling of the llama.cpp engine over a stand-in of llama.h's memory, and its pure parts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastchat_grpc.backends.echo import EchoTokenizer
from fastchat_grpc.backends.llama_cpp import backend as llama_cpp
from fastchat_grpc.backends.llama_cpp import engine as llama_cpp_engine
from fastchat_grpc.backends.llama_cpp.engine import EngineLimits, LlamaEngine
from fastchat_grpc.backends.llama_cpp.tokenizer import GgufTemplates
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import ChatMessage, ChatPrompt
from fastchat_grpc.errors import ConfigError, ModelLoadError, OutOfMemory
from fastchat_grpc.models.chat_template import ChatTemplate
from fastchat_grpc.text.batch import Running
from fastchat_grpc.text.job import Job
from tests.unit.backends.asking import request


class LlamaMemory:
    """A unified KV cache as llama.h describes it: sequences may share cells, and a full one refuses a batch."""

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self.sequences: dict[int, list[object]] = {}
        self.decoded = 0
        self.largest_batch = 0

    def llama_get_memory(self, context: object) -> LlamaMemory:
        return self

    def llama_batch_init(self, tokens: int, embedding: int, sequences: int) -> SimpleNamespace:
        rows = range(tokens)
        return SimpleNamespace(
            n_tokens=0, token=[0] * tokens, pos=[0] * tokens, n_seq_id=[0] * tokens,
            seq_id=[[0] for _ in rows], logits=[False] * tokens,
        )  # fmt: skip

    def llama_memory_seq_rm(self, memory: LlamaMemory, seq_id: int, start: int, end: int) -> bool:
        del self.sequences.setdefault(seq_id, [])[max(start, 0) :]
        return True

    def llama_memory_seq_cp(self, memory: LlamaMemory, source: int, target: int, start: int, end: int) -> None:
        self.sequences[target] = list(self.sequences[source][start:end])

    def llama_memory_clear(self, memory: LlamaMemory, data: bool) -> None:
        self.sequences.clear()

    def llama_decode(self, context: object, batch: SimpleNamespace) -> int:
        used = len({id(cell) for cells in self.sequences.values() for cell in cells})
        if used + batch.n_tokens > self.cells:
            return llama_cpp_engine.NO_ROOM
        for row in range(batch.n_tokens):
            cells = self.sequences.setdefault(batch.seq_id[row][0], [])
            assert batch.pos[row] == len(cells), "positions follow one another"
            cells.append(object())
        self.decoded += batch.n_tokens
        self.largest_batch = max(self.largest_batch, batch.n_tokens)
        return 0

    def llama_batch_free(self, batch: object) -> None: ...
    def llama_free(self, context: object) -> None: ...
    def llama_model_free(self, model: object) -> None: ...


class AlwaysX:
    """A sampler that takes the same letter."""

    def __init__(self, *args: object) -> None: ...
    def sample(self, row: int) -> int:
        return ord("x")

    def free(self) -> None: ...


@pytest.fixture
def memory() -> LlamaMemory:
    return LlamaMemory(cells=40)


@pytest.fixture
def engine(memory: LlamaMemory, monkeypatch: pytest.MonkeyPatch) -> LlamaEngine:
    monkeypatch.setattr(llama_cpp_engine, "Sampler", AlwaysX)
    limits = EngineLimits(slots=4, kv_cache_tokens=memory.cells, prefill_tokens=16, prefix_cache=True)
    return LlamaEngine(memory, None, None, EchoTokenizer(), limits, on_close=lambda: None)


def running(prompt: str, **fields: Any) -> Running:
    ids = list(prompt.encode())
    asked = Job(request(prompt, **fields), ids, EchoTokenizer(), context_length=40, stream_interval=1)
    return Running(job=asked, index=0, token_ids=ids, max_tokens=99, min_tokens=0, seed=0)


def advance(engine: LlamaEngine, steps: int) -> dict[Running, int]:
    """Tokens that each sequence got."""
    made: dict[Running, int] = {}
    for _ in range(steps):
        for output in engine.step():
            made[output.sequence] = made.get(output.sequence, 0) + len(output.token_ids)
    return made


def test_a_long_prompt_is_read_in_pieces_beside_a_running_sequence(engine: LlamaEngine, memory: LlamaMemory) -> None:
    short, long = running("ab"), running("p" * 30)
    engine.add(short)
    advance(engine, 1)
    engine.add(long)
    made = advance(engine, 2)
    assert made == {short: 2, long: 0} or made == {short: 2, long: 1}
    assert memory.largest_batch <= 16
    assert advance(engine, 1)[long] == 1


def test_a_prompt_that_begins_like_an_earlier_one_is_read_from_there(engine: LlamaEngine, memory: LlamaMemory) -> None:
    first, second = running("the same beginning: A"), running("the same beginning: B")
    engine.add(first)
    advance(engine, 2)
    engine.remove(first)
    before = memory.decoded
    engine.add(second)
    outputs = list(engine.step())
    assert memory.decoded - before == 1
    assert max(output.cached_tokens for output in outputs) == 20


def test_a_further_choice_shares_the_prompt_of_one_that_runs(engine: LlamaEngine, memory: LlamaMemory) -> None:
    first, second = running("a prompt for two.."), running("a prompt for two..")
    engine.add(first)
    advance(engine, 2)
    before = memory.decoded
    engine.add(second)
    advance(engine, 1)
    assert memory.decoded - before == 2


def test_a_full_cache_drops_kept_tokens_first(engine: LlamaEngine, memory: LlamaMemory) -> None:
    kept, fresh = running("k" * 16), running("f" * 28)
    engine.add(kept)
    advance(engine, 1)
    engine.remove(kept)
    engine.add(fresh)
    assert advance(engine, 3)[fresh] >= 1


def test_the_youngest_sequence_begins_again_where_the_cache_is_full(engine: LlamaEngine, memory: LlamaMemory) -> None:
    old, young = running("o" * 14), running("y" * 14)
    engine.add(old)
    engine.add(young)
    made = advance(engine, 12)
    assert made[old] > made[young] > 0
    engine.remove(old)
    assert advance(engine, 3)[young] > 0


def test_a_request_that_fills_the_cache_alone_fails(engine: LlamaEngine) -> None:
    engine.add(running("z" * 38))
    with pytest.raises(OutOfMemory, match="kv_cache_tokens"):
        advance(engine, 12)


def test_usage_and_progress_are_told(engine: LlamaEngine) -> None:
    assert engine.kv_cache_usage == 0
    engine.add(running("u" * 10))
    advance(engine, 1)
    assert engine.kv_cache_usage == pytest.approx(10 / 40)
    assert engine.processed_tokens == 10
    engine.reset()
    assert engine.kv_cache_usage == 0
    assert not engine.busy


def create(options: dict[str, str] | None = None, **model: Any) -> None:
    settings = ModelConfig(**{"path": "model.gguf", **model})
    llama_cpp.create(BackendConfig(name="llama_cpp", model=settings, options=options or {}))


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({"no_such": "1"}, {}, "no option 'no_such'"),
        ({}, {"quantization": "int8"}, "Q4_K_M"),
        ({}, {"max_running": 1000}, "at most 256"),
    ],
)
def test_wrong_settings_are_refused_by_name(options: dict[str, str], model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create(options, **model)


def test_a_folder_with_one_gguf_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert llama_cpp.find_gguf(ModelConfig(path=str(tmp_path))) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match="name one of them"):
        llama_cpp.find_gguf(ModelConfig(path=str(tmp_path)))


def test_a_final_message_is_continued_where_it_ends() -> None:
    pytest.importorskip("jinja2")
    template = ChatTemplate(
        GgufTemplates("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}", {"eos_token": "</s>"})
    )
    messages = (ChatMessage(role="user", content="hi"), ChatMessage(role="assistant", content="well, "))
    continued = ChatPrompt(messages=messages, continue_final_message=True)
    assert template.render(continued) == "<user>hi</s><assistant>well, "
    assert template.render(ChatPrompt(messages=messages)).endswith("well, </s>")
