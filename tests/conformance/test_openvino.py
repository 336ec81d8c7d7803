"""What is particular to the OpenVINO backend: its process, its model files, its grammars."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import pytest_asyncio

pytest.importorskip("openvino_genai")

from fastchat_grpc.backends import registry
from fastchat_grpc.backends.echo import EchoTokenizer
from fastchat_grpc.backends.openvino import model as openvino_model
from fastchat_grpc.backends.openvino.backend import OpenVinoBackend
from fastchat_grpc.backends.openvino.gguf import facts
from fastchat_grpc.backends.openvino.grammar import GrammarCheck
from fastchat_grpc.backends.openvino.sampling import generation_config
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import Delta, Grammar, GrammarKind, PromptEcho
from fastchat_grpc.errors import ConfigError, InvalidArgument, ModelLoadError, UnsupportedField
from fastchat_grpc.models.embedded import EMBEDDED_MODEL
from fastchat_grpc.text.job import Job
from tests.conformance.harness import chat, request
from tests.conformance.openvino_engine import kill_while


def config(path: str, options: dict[str, str] | None = None, **model: Any) -> BackendConfig:
    settings = ModelConfig(path=path, names=("tested",), context_length=512, **model)
    return BackendConfig(name="openvino", model=settings, options={"cache_gb": "1", **(options or {})})


@asynccontextmanager
async def started(path: str, options: dict[str, str] | None = None) -> AsyncIterator[OpenVinoBackend]:
    backend = registry.create(config(path, options))
    assert isinstance(backend, OpenVinoBackend)
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gguf() -> AsyncIterator[OpenVinoBackend]:
    """The embedded model from its GGUF file, which needs no export, without a prefix cache."""
    async with started("smollm2-135m-instruct", {"prefix_cache": "off"}) as backend:
        yield backend


async def ask(backend: OpenVinoBackend, *args: Any, **fields: Any) -> tuple[str, list[int], PromptEcho | None]:
    text, token_ids, echo = "", [], None
    async with asyncio.timeout(100), aclosing(backend.generate(request(*args, **fields))) as events:
        async for event in events:
            if isinstance(event, PromptEcho):
                echo = event
            elif isinstance(event, Delta):
                text += event.text
                token_ids += event.token_ids
    return text, token_ids, echo


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
class TestOfTheRunningEngine:
    async def test_the_embedded_model_answers_without_an_export(self, gguf: OpenVinoBackend) -> None:
        text, _, _ = await ask(gguf, chat("What is 2 + 2? Answer with one number."), max_new_tokens=12)
        assert "4" in text

    async def test_prompt_logprobs_are_whole_without_a_prefix_cache(self, gguf: OpenVinoBackend) -> None:
        for _ in range(2):
            _, _, echo = await ask(gguf, max_new_tokens=2, n=2, prompt_logprobs=0)
            assert echo is not None
            assert [entry.token_id for entry in echo.logprobs] == list(echo.token_ids)
            assert echo.logprobs[0].logprob is None
            assert all(entry.logprob is not None and entry.logprob <= 0 for entry in echo.logprobs[1:])

    async def test_alternatives_of_prompt_tokens_are_refused(self, gguf: OpenVinoBackend) -> None:
        with pytest.raises(UnsupportedField, match=r"output\.prompt_logprobs"):
            await ask(gguf, prompt_logprobs=2)

    async def test_a_grammar_that_does_not_compile_harms_no_other_request(self, gguf: OpenVinoBackend) -> None:
        alone, _, _ = await ask(gguf, max_new_tokens=16)
        good = asyncio.create_task(ask(gguf, max_new_tokens=16))
        for _ in range(2):
            with pytest.raises(InvalidArgument, match=r"structured_output\.json_schema: cannot be compiled"):
                await ask(gguf, grammar=Grammar(GrammarKind.JSON_SCHEMA, '{"type": "no such type"}'))
        assert (await good)[0] == alone
        text, _, _ = await ask(gguf, grammar=Grammar(GrammarKind.REGEX, "yes|no"))
        assert text in ("yes", "no")

    async def test_json_has_white_space_that_ends(self, gguf: OpenVinoBackend) -> None:
        for seed in range(4):
            grammar = Grammar(GrammarKind.JSON_OBJECT)
            text, _, _ = await ask(
                gguf, chat("Tell me a story."), grammar=grammar, temperature=1.0, seed=seed, max_new_tokens=60
            )
            outside = re.sub(r'"(\\.|[^"\\])*("|$)', "s", text)
            assert max(map(len, re.findall(r"\s+", outside)), default=0) <= 2 * 34

    async def test_the_event_loop_runs_while_the_engine_computes(self, gguf: OpenVinoBackend) -> None:
        running = asyncio.create_task(ask(gguf, "word " * 450, max_new_tokens=2))
        ticks = 0
        while not running.done():
            await asyncio.sleep(0.005)
            ticks += 1
        await running
        assert ticks >= 5  # reading this prompt is two steps, each of which would hold the loop up

    async def test_an_engine_that_is_killed_fails_its_requests_and_comes_back(self, gguf: OpenVinoBackend) -> None:
        before, _, _ = await ask(gguf, max_new_tokens=8)
        await kill_while(gguf, asyncio.create_task(ask(gguf, max_new_tokens=400, ignore_eos=True)))
        assert (await ask(gguf, max_new_tokens=8))[0] == before


@pytest.mark.slow
@pytest.mark.slow
def test_a_grammar_is_compiled_beside_the_engine_for_the_engine() -> None:
    """What a small pipeline has compiled the large one finds done; and Python runs meanwhile."""
    import openvino_genai

    found = openvino_model.find(config(EMBEDDED_MODEL))
    tokenizer = openvino_genai.Tokenizer(str(found.vocabulary))
    beside, engine = (GrammarCheck(tokenizer, str(found.model), 49152) for _ in range(2))
    assert beside.problem(("regex", "a")) is engine.problem(("regex", "b")) is None
    properties = {f"p{i}": {"type": "string", "maxLength": 20 + i} for i in range(4)}
    heavy = ("json_schema", json.dumps({"type": "object", "properties": properties}))
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    began = monotonic()
    assert beside.problem(heavy) is None
    first = monotonic() - began
    done.set()
    ticker.join()
    began = monotonic()
    assert engine.problem(heavy) is None
    assert monotonic() - began < first / 4
    assert ticks > 20


async def test_a_file_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "openvino_model.xml").write_text("<net/>")
    (tmp_path / "openvino_model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError) as failed:
        async with started(str(tmp_path)):
            pass
    assert "\n" not in str(failed.value)


def test_all_bits_of_a_seed_count_and_the_engine_gets_32() -> None:
    def seed_of(seed: int) -> int:
        job = Job(request(temperature=1.0), [1], EchoTokenizer(), context_length=64, stream_interval=1)
        return int(generation_config(job, 0, seed, EchoTokenizer())["rng_seed"])

    seeds = {seed_of(seed) for seed in (7, 7 + 2**32, 7 + 2**33, 2**62)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({"cache_gb": "0"}, {}, "cache_gb"),
        ({"threads": "many"}, {}, "threads"),
        ({"weights": "int3"}, {}, "weights must be one of"),
        ({"weights": "int4"}, {"load_8bit": True}, "contradict"),
        ({"properties": "[]"}, {}, "properties"),
        ({}, {"device": "cuda"}, "--device"),
        ({}, {"max_gpu_memory": "1GiB"}, "--max-gpu-memory"),
    ],
)
def test_wrong_settings_are_one_line(options: dict[str, str], model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.create(config("m", options, **model))


def test_a_folder_is_not_exported_without_an_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCHAT_GRPC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(openvino_model, "_exporter", lambda config: None)
    model = _tiny_folder(tmp_path)
    with pytest.raises(ModelLoadError, match="openvino-export"):
        openvino_model.find(config(str(model)))


def test_an_export_that_fails_leaves_nothing_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCHAT_GRPC_CACHE", str(tmp_path / "cache"))
    exporter = _fake_exporter(tmp_path, 'mkdir -p "$3"; echo "error: RuntimeError: no such layer" >&2; exit 1')
    with pytest.raises(ModelLoadError, match="RuntimeError: no such layer"):
        openvino_model.find(config(str(_tiny_folder(tmp_path)), {"export_python": exporter}))
    assert not list((tmp_path / "cache" / "openvino").glob("*.part"))


def test_a_model_is_exported_once_per_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCHAT_GRPC_CACHE", str(tmp_path / "cache"))
    calls = tmp_path / "calls"
    exporter = _fake_exporter(tmp_path, f'echo "$4" >> {calls}; mkdir -p "$3"; touch "$3/openvino_model.xml"')
    model = str(_tiny_folder(tmp_path))
    for weights in ("int8", "int8", "fp32", "int8"):
        found = openvino_model.find(config(model, {"export_python": exporter, "weights": weights}))
        assert (found.model / "openvino_model.xml").is_file()
    assert calls.read_text().split() == ["int8", "fp32"]


def test_a_gguf_file_is_rewritten_once_unless_it_is_read_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _tiny_gguf(tmp_path)
    monkeypatch.setenv("FASTCHAT_GRPC_CACHE", str(tmp_path / "cache"))
    found = openvino_model.find(config(str(file)))
    assert (found.folder, found.context_length, found.grammars) == (file, 64, True)
    assert facts(found.model).kinds == {"Q8_0"}
    written = found.model.stat().st_mtime_ns
    assert openvino_model.find(config(str(file))).model.stat().st_mtime_ns == written
    assert openvino_model.find(config(str(found.model))).model == found.model
    assert openvino_model.find(config(str(file), {"weights": "int4"})).model == file
    with pytest.raises(ConfigError, match="not in fp32"):
        openvino_model.find(config(str(file), {"weights": "fp32"}))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("kind", "options", "rewritten"),
    [
        ("F32", {}, "F16"),
        ("BF16", {}, "F16"),
        ("F32", {"weights": "int8"}, "Q8_0"),
        ("F16", {}, None),
        ("Q8_0", {"weights": "fp16"}, "F16"),
    ],
)
def test_what_openvino_does_not_read_is_rewritten_as_the_nearest_that_it_does(
    kind: str, options: dict[str, str], rewritten: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _tiny_gguf(tmp_path, kind)
    monkeypatch.setenv("FASTCHAT_GRPC_CACHE", str(tmp_path / "cache"))
    found = openvino_model.find(config(str(file), options))
    assert (found.model == file) is (rewritten is None)
    assert facts(found.model).kinds == {rewritten or kind}


@pytest.mark.parametrize(("weights", "error"), [("fp16", 1e-3), ("int8", 1e-2)])
def test_a_rewritten_file_has_the_same_weights_and_settings(
    weights: str, error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize

    file = _tiny_gguf(tmp_path)
    monkeypatch.setenv("FASTCHAT_GRPC_CACHE", str(tmp_path / "cache"))
    before, after = GGUFReader(file), GGUFReader(openvino_model.find(config(str(file), {"weights": weights})).model)
    for name in ("llama.rope.freq_base", "tokenizer.ggml.tokens", "tokenizer.chat_template"):
        assert before.fields[name].contents() == after.fields[name].contents()
    tensors = {tensor.name: tensor for tensor in after.tensors}
    assert set(tensors) == {tensor.name for tensor in before.tensors}
    for tensor in before.tensors:
        other = tensors[tensor.name]
        expected, found = dequantize(tensor.data, tensor.tensor_type), dequantize(other.data, other.tensor_type)
        assert np.abs(found - expected).max() <= error * np.abs(expected).max()


def _tiny_folder(parent: Path) -> Path:
    """Files that look like a model to the checks before an export."""
    import numpy as np
    from safetensors.numpy import save_file

    folder = parent / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return folder


def _tiny_gguf(parent: Path, kind_name: str = "Q4_1") -> Path:
    """A file with a vector and a matrix: of Q4_1, which OpenVINO does not read exactly, unless said."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    file = parent / "tiny.gguf"
    random = np.random.default_rng(0)
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_rope_freq_base(10_000.0)
    writer.add_token_list(["<s>", "a", "b"])
    writer.add_chat_template("{{ messages }}")
    kind = GGMLQuantizationType[kind_name]
    matrix = quantize(random.standard_normal((64, 96), dtype=np.float32), kind)
    writer.add_tensor("token_embd.weight", matrix, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", random.standard_normal(96, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _fake_exporter(parent: Path, script: str) -> str:
    """A program that is called as the exporting Python is: SCRIPT SOURCE TARGET WEIGHTS."""
    file = parent / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)
