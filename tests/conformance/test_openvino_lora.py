"""LoRA adapters on the OpenVINO backend, of tiny models: every layer is hit, at its scale, or the start fails."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

pytest.importorskip("openvino_genai")
pytest.importorskip("peft")

import torch
from safetensors.torch import load_file, save_file

from fastchat_grpc.backends import registry
from fastchat_grpc.backends.openvino import backend as openvino
from fastchat_grpc.backends.openvino import graph as openvino_graph
from fastchat_grpc.backends.openvino import lora as openvino_lora
from fastchat_grpc.backends.openvino import model as openvino_model
from fastchat_grpc.backends.openvino.backend import OpenVinoBackend
from fastchat_grpc.backends.openvino.gguf import exact_file, facts, graph_folder
from fastchat_grpc.backends.openvino.gguf_graph import linear_layers
from fastchat_grpc.backends.openvino.graph import Place
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import Delta, PromptEcho
from fastchat_grpc.errors import AdapterNotFound, ModelLoadError
from tests.conformance.harness import request
from tests.conformance.lora import ATTENTION, MLP, Adapter, Reference, write_adapter
from tests.conformance.openvino_engine import kill_while
from tests.conformance.targets import CHOSEN_VARIABLE, TARGETS, chosen
from tests.e2e.tiny_models import write_gguf, write_llama

# With VNNI, OpenVINO rounds the inputs of 8-bit weights to 8 bits too, unless their groups have size 0.
EXACT = {
    "properties": json.dumps(
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
    )
}
PROMPT = [5, 9, 77, 120, 300, 41, 8, 222, 19, 64]
TOLERANCE = 0.1
"""Of log probabilities. What a backend might get wrong moves one by several times as much, which is checked."""

ADAPTERS = {
    "red": Adapter(seed=1, std=0.2, settings={"r": 4, "lora_alpha": 6, "target_modules": [*ATTENTION, *MLP]}),
    "blue": Adapter(
        seed=2,
        std=0.2,
        dtype=torch.bfloat16,
        settings={"r": 8, "lora_alpha": 12, "use_rslora": True, "target_modules": ["k_proj", "o_proj", "gate_proj"]},
    ),
    "green": Adapter(
        seed=3,
        std=0.2,
        settings={
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "down_proj", "lm_head"],
            "rank_pattern": {"lm_head": 2, r"layers\.1\.self_attn\.q_proj": 3},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Path]]]:
    """Writes a tiny model of a kind, once: its folder, with a GGUF file beside it, and adapters by name."""
    root = tmp_path_factory.mktemp("tiny")
    made: dict[str, tuple[Path, dict[str, Path]]] = {}

    def write(kind: str) -> tuple[Path, dict[str, Path]]:
        if kind not in made:
            # OpenVINO's attention takes heads of 64 or more.
            sizes = {"hidden_size": 256, "intermediate_size": 320, "head_dim": 64}
            folder = write_llama(root / kind, torch.float16, kind=kind, **sizes)
            write_gguf(folder.with_suffix(".gguf"), folder)
            adapters = {name: write_adapter(root / f"{kind}-{name}", folder, it) for name, it in ADAPTERS.items()}
            made[kind] = folder, adapters
        return made[kind]

    return write


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[None]:
    """What is made of these models goes with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("FASTCHAT_GRPC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def config(path: Path, adapters: Mapping[str, Path], options: dict[str, str] | None = None) -> BackendConfig:
    settings = ModelConfig(
        path=str(path), names=("tested",), lora_adapters={name: str(folder) for name, folder in adapters.items()}
    )
    return BackendConfig(name="openvino", model=settings, options={"cache_gb": "1", **EXACT, **(options or {})})


@asynccontextmanager
async def started(
    path: Path, adapters: Mapping[str, Path], options: dict[str, str] | None = None
) -> AsyncIterator[OpenVinoBackend]:
    backend = registry.create(config(path, adapters, options))
    assert isinstance(backend, OpenVinoBackend)
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()


async def ask(backend: OpenVinoBackend, adapter: str = "", **fields: Any) -> tuple[int, ...]:
    """The tokens of each choice, one after the other."""
    token_ids: dict[int, tuple[int, ...]] = {}
    fields = {"max_new_tokens": 16, "ignore_eos": True, "lora_adapter": adapter, **fields}
    async with asyncio.timeout(100), aclosing(backend.generate(request(PROMPT, **fields))) as events:
        async for event in events:
            if isinstance(event, Delta):
                token_ids[event.index] = token_ids.get(event.index, ()) + tuple(event.token_ids)
    return sum((token_ids[index] for index in sorted(token_ids)), ())


async def scores(backend: OpenVinoBackend, adapter: str) -> list[float]:
    """Log probabilities of the prompt's tokens."""
    asked = request(PROMPT, lora_adapter=adapter, prompt_logprobs=0, max_new_tokens=1)
    async with aclosing(backend.generate(asked)) as events:
        async for event in events:
            if isinstance(event, PromptEcho):
                return [float(entry.logprob or 0.0) for entry in event.logprobs[1:]]
    raise AssertionError("the prompt is shown")


def difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def round_weights(reference: Reference, rounded: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Round the model's matrices as those that are compared with it are; adapters stay as they are."""
    for name, parameter in reference.model.named_parameters():
        if parameter.ndim == 2 and "lora_" not in name:
            parameter.data = rounded(parameter.data)


def as_q8_0(matrix: torch.Tensor) -> torch.Tensor:
    """As a GGUF file of Q8_0."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    return torch.from_numpy(dequantize(quantize(matrix.numpy(), GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0))


def as_exported_int8(matrix: torch.Tensor) -> torch.Tensor:
    """As an export with weights=int8: 255 steps from the least to the largest of each row."""
    least, most = matrix.amin(1, keepdim=True), matrix.amax(1, keepdim=True)
    step = (most - least) / 255
    zero = (-least / step).round()
    return ((matrix / step + zero).round().clamp(0, 255) - zero) * step


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "weights"), [("llama", "int8"), ("qwen2", "fp16"), ("qwen3", "int8")])
async def test_adapters_of_a_gguf_file_are_applied_as_peft_does(tiny: Any, kind: str, weights: str) -> None:
    folder, adapters = tiny(kind)
    reference = Reference(folder, adapters)
    if weights == "int8":
        round_weights(reference, as_q8_0)
    await _check_scores(folder.with_suffix(".gguf"), adapters, {"weights": weights}, reference)


@pytest.mark.slow
@pytest.mark.skipif(
    CHOSEN_VARIABLE not in os.environ or TARGETS["openvino-exported"] not in chosen(),
    reason="exports for a minute: runs where openvino is named",
)
@pytest.mark.parametrize("weights", ["fp32", "int8"])
async def test_adapters_of_an_exported_model_are_applied_as_peft_does(tiny: Any, weights: str) -> None:
    folder, adapters = tiny("llama")
    if openvino_model._exporter(config(folder, adapters)) is None:
        pytest.skip("needs an environment of its own: tools/envs/openvino_export.sh")
    reference = Reference(folder, adapters)
    if weights == "int8":
        round_weights(reference, as_exported_int8)
    await _check_scores(folder, adapters, {"weights": weights}, reference)


async def _check_scores(
    path: Path, adapters: Mapping[str, Path], options: dict[str, str], reference: Reference
) -> None:
    async with started(path, adapters, {"prefix_cache": "off", **options}) as backend:
        found = {name: await scores(backend, name) for name in ("", *adapters)}
    for name, values in found.items():
        right = reference.scores(name, PROMPT)
        assert difference(values, right) < TOLERANCE
        for what, wrong in reference.wrong_scores(name, PROMPT) if name else ():
            assert difference(right, wrong) > 2 * TOLERANCE, f"the test would not see {what}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tiny: Any) -> AsyncIterator[OpenVinoBackend]:
    """A tiny model with two adapters, and prefix caches."""
    folder, adapters = tiny("llama")
    async with started(folder.with_suffix(".gguf"), {name: adapters[name] for name in ("red", "blue")}) as backend:
        yield backend


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
class TestOfTheRunningEngine:
    async def test_adapters_in_flight_do_not_mix(self, running: OpenVinoBackend) -> None:
        names = ("", "red", "blue")
        alone = {name: await ask(running, name) for name in names}
        assert len(set(alone.values())) == len(names)
        again = await asyncio.gather(*(ask(running, name) for name in names * 5))
        assert again == [alone[name] for name in names * 5]

    async def test_a_seed_gives_the_same_text_with_the_same_adapter_only(self, running: OpenVinoBackend) -> None:
        lively = {"temperature": 1.0, "seed": 7, "n": 2}
        first = {name: await ask(running, name, **lively) for name in ("", "red", "blue")}
        assert len(set(first.values())) == len(first)
        assert {name: await ask(running, name, **lively) for name in first} == first

    async def test_an_adapter_is_asked_for_as_a_model_too(self, running: OpenVinoBackend) -> None:
        asked = replace(request(PROMPT, max_new_tokens=16, ignore_eos=True), model="red")
        events = [event async for event in running.generate(asked)]
        token_ids = sum((tuple(event.token_ids) for event in events if isinstance(event, Delta)), ())
        assert token_ids == await ask(running, "red") != await ask(running)

    async def test_an_unknown_adapter_is_refused_by_name(self, running: OpenVinoBackend) -> None:
        with pytest.raises(AdapterNotFound, match="lora_adapter: no adapter 'green' is loaded; loaded: red, blue"):
            await ask(running, "green")

    async def test_a_cancelled_request_of_an_adapter_harms_no_other(self, running: OpenVinoBackend) -> None:
        alone = {name: await ask(running, name) for name in ("", "red")}
        async with aclosing(running.generate(request(PROMPT, max_new_tokens=200, lora_adapter="red"))) as events:
            async for _ in events:
                break
            others = [asyncio.create_task(ask(running, name)) for name in alone]
        assert [await other for other in others] == list(alone.values())
        assert not running._running._choices

    async def test_openvino_sends_no_usage_data(self, running: OpenVinoBackend) -> None:
        await ask(running)
        assert not list(Path.home().iterdir()), "OpenVINO keeps an identifier there when it sends"

    async def test_adapters_are_there_again_when_the_engine_was_killed(self, running: OpenVinoBackend) -> None:
        names = ("", "red", "blue")
        before = [await ask(running, name) for name in names]
        await kill_while(running, asyncio.create_task(ask(running, "red", max_new_tokens=230)))
        assert [await ask(running, name) for name in names] == before


@pytest.mark.slow
async def test_an_adapter_with_no_place_in_the_model_fails_the_start(tiny: Any, tmp_path: Path) -> None:
    folder, adapters = tiny("llama")
    foreign = _renamed(tmp_path / "foreign", adapters["red"], "self_attn.q_proj", "self_attn.query")
    message = r"LoRA adapter foreign: .* no linear layers model\.layers\.0\.self_attn\.query, .*1\.self_attn\.query$"
    with pytest.raises(ModelLoadError, match=message):
        async with started(folder.with_suffix(".gguf"), {"red": adapters["red"], "foreign": foreign}):
            pass


@pytest.mark.slow
def test_the_layers_of_a_gguf_file_are_named_as_their_weights_are(tiny: Any) -> None:
    """OpenVINO's graph of a file of F16 keeps names of weights; with Q8_0 it has none, so they are not relied on."""
    import openvino

    folder, _ = tiny("llama")
    file = folder.with_suffix(".gguf")
    graph = openvino.Core().read_model(graph_folder(exact_file(file, facts(file), None)) / openvino_graph.MODEL_FILE)
    found = linear_layers(graph)
    assert len(found) == 2 * 7 + 1
    for module, node in found.items():
        assert node.get_friendly_name() == f"__module.{module}/MatMul"
        weights = node.input_value(1).get_node()
        while weights.get_input_size():
            weights = weights.input_value(0).get_node()
        name = weights.get_friendly_name().replace("[", ".").replace("]", "")
        assert name.removesuffix(".weight") == module


def test_a_graph_of_another_shape_is_not_guessed_at() -> None:
    from fastchat_grpc.backends.openvino.grammar import smallest_model

    with pytest.raises(ValueError, match="1 attentions and 0 activations"):
        linear_layers(smallest_model(8))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("use_dora", True, "use_dora"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("alora_invocation_tokens", [1], "alora_invocation_tokens"),
        ("bias", "all", "bias all"),
        ("init_lora_weights", "pissa", "init_lora_weights pissa"),
        ("peft_type", "IA3", "peft_type IA3"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, setting: str, value: Any, message: str) -> None:
    (tmp_path / openvino_lora.WEIGHTS_FILE).touch()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, setting: value}))
    with pytest.raises(ModelLoadError, match=f"LoRA adapter red: the openvino backend cannot apply {message}"):
        openvino_lora.find("red", str(tmp_path))


def test_an_adapter_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"LoRA adapter red: no adapter_model\.safetensors"):
        openvino_lora.find("red", str(tmp_path))


PLACES = {"up": Place("__module.up/MatMul", 6, 5), "down": Place("__module.down/MatMul", 5, 6)}
WHOLE = {
    "base_model.model.up.lora_A.weight": torch.ones(2, 6),
    "base_model.model.up.lora_B.weight": torch.ones(5, 2),
}


def test_the_scale_is_in_the_weights_that_openvino_gets(tmp_path: Path) -> None:
    from safetensors.torch import load

    lora = _lora(tmp_path, WHOLE, lora_alpha=3)
    fitted = load(openvino_lora.fit(lora, PLACES).data.tobytes())
    assert torch.equal(fitted["base_model.model.__module.up/MatMul.lora_A.weight"], torch.ones(2, 6))
    assert torch.equal(fitted["base_model.model.__module.up/MatMul.lora_B.weight"], torch.full((5, 2), 1.5))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base_model.model.up.lora_A.weight": torch.ones(2, 7)}, "up goes from 6 to 5, not 7 to 2 and 2 to 5"),
        ({"base_model.model.up.lora_B.weight": torch.ones(5, 3)}, "up goes from 6 to 5, not 6 to 2 and 3 to 5"),
        ({"base_model.model.gate.lora_A.weight": torch.ones(2, 6)}, "cannot apply gate$"),
        ({"base_model.model.up.lora_A.weight": torch.ones(2, 6, dtype=torch.int8)}, "cannot apply .*up.lora_A.weight"),
        ({"base_model.model.embed.lora_embedding_A": torch.ones(2, 6)}, "cannot apply .*embed.lora_embedding_A$"),
        ({"base_model.model.lm_head.weight": torch.ones(5, 6)}, "lm_head.weight; .* save_embedding_layers=False"),
        (
            {f"base_model.model.{i}.lora_{x}.weight": torch.ones(1, 1) for i in range(5) for x in "AB"},
            "no linear layers 0, 1, 2 and 2 more",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path: Path, changed: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"LoRA adapter red: .*{message}"):
        openvino_lora.fit(_lora(tmp_path, WHOLE | changed), PLACES)


def test_a_file_that_is_no_adapter_is_one_line(tmp_path: Path) -> None:
    lora = _lora(tmp_path, {})
    with pytest.raises(ValueError, match="holds no weights"):
        openvino_lora.fit(lora, PLACES)
    Path(lora.file).write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match="cannot be read") as failed:
        openvino_lora.fit(lora, PLACES)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (["fastchat_grpc_nowhere"], None),
        ([], "does not tell whether it was applied"),
        (["fastchat_grpc_nowhere", "__module.up/MatMul"], "leaves out __module.up/MatMul"),
    ],
)
def test_what_openvino_says_it_left_out_is_believed(
    nodes: list[str], message: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    def load() -> None:
        with openvino_lora.wholly_applied("red"):
            os.write(2, b"[ WARNING ] There unused LoRA tensors.\nanother line\n")
            for node in nodes:
                os.write(2, f"    Unused LoRA tensor: base_model.model.{node}\n".encode())

    if message is None:
        load()
    else:
        with pytest.raises(ValueError, match=f"LoRA adapter red: OpenVINO GenAI {message}"):
            load()
    assert capfd.readouterr().err == "another line\n"


def test_all_pipelines_together_get_a_quarter_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "total_memory", lambda: 32 * 2**30)
    assert [openvino._default_cache_gb(pipelines) for pipelines in (1, 2, 4, 16)] == [8, 4, 2, 1]


def _lora(folder: Path, tensors: Mapping[str, torch.Tensor], **settings: Any) -> openvino_lora.LoraFile:
    save_file(dict(tensors), folder / openvino_lora.WEIGHTS_FILE)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, **settings}))
    return openvino_lora.find("red", str(folder))


def _renamed(folder: Path, adapter: Path, old: str, new: str) -> Path:
    """An adapter with other names of its layers."""
    shutil.copytree(adapter, folder)
    file = folder / openvino_lora.WEIGHTS_FILE
    save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)
    return folder
