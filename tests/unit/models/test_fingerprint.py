"""Identity of models by their files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import ModelInfo
from fastchat_grpc.models.fingerprint import UNKNOWN, identify, identify_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that look like a model's, with 3 MiB of weights."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "x", "torch_dtype": "bfloat16"}')
    (model / "tokenizer.json").write_text('{"vocab": {"a": 1}}')
    (model / "README.md").write_text("first")
    (model / "model.safetensors").write_bytes(bytes(range(256)) * (3 * 4096))
    return model


def fingerprint(path: Path, **settings: object) -> str:
    found = identify(ModelConfig(path=str(path), **settings)).fingerprint  # type: ignore[arg-type]
    assert found
    return found


def test_equal_files_have_equal_fingerprints_in_any_folder_and_process(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("second")
    (copy / "pytorch_model.bin").write_bytes(b"the same weights, as another library keeps them")
    program = (
        "import sys; from fastchat_grpc.config import ModelConfig;"
        "from fastchat_grpc.models.fingerprint import identify;"
        "print(identify(ModelConfig(path=sys.argv[1])).fingerprint);"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    other = subprocess.run(
        [sys.executable, "-c", program, str(copy)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert other.stdout.strip() == fingerprint(folder)


def test_another_revision_differs_though_names_headers_and_sizes_are_the_same(folder: Path) -> None:
    before = fingerprint(folder)
    weights = folder / "model.safetensors"
    trained = bytearray(weights.read_bytes())
    trained[1_000_000:2_000_000] = bytes(1_000_000)
    weights.write_bytes(trained)
    assert fingerprint(folder) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_every_file_that_changes_the_output_counts(folder: Path, name: str) -> None:
    before = identify(ModelConfig(path=str(folder)))
    (folder / name).write_text('{"other": 1}')
    after = identify(ModelConfig(path=str(folder)))
    assert after.fingerprint != before.fingerprint
    assert (after.tokenizer != before.tokenizer) == (name == "tokenizer.json")


def test_number_format_and_template_count_and_are_told(folder: Path) -> None:
    plain = identify(ModelConfig(path=str(folder)))
    eight = identify(ModelConfig(path=str(folder), load_8bit=True))
    other = identify(ModelConfig(path=str(folder), chat_template="{{ messages }}"))
    assert len({plain.fingerprint, eight.fingerprint, other.fingerprint}) == 3
    assert (plain.quantization, eight.quantization) == ("bfloat16", "int8")
    assert plain.tokenizer == eight.tokenizer


def test_a_gguf_file_and_an_adapter_have_fingerprints(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + bytes(2_000_000))
    before = fingerprint(file)
    file.write_bytes(b"GGUF" + bytes(1_999_999) + b"x")
    assert fingerprint(file) != before
    base = identify(ModelConfig(path=str(folder)))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    found = identify_adapter(str(adapter), base)
    assert found.fingerprint not in ("", base.fingerprint)
    assert found.tokenizer == base.tokenizer


def test_what_is_not_here_is_unknown() -> None:
    assert identify(ModelConfig(path="/no/such/folder")) == UNKNOWN


async def test_models_of_any_backend_get_their_fingerprints(folder: Path) -> None:
    from fastchat_grpc.backends.identity import identified

    models = [ModelInfo(name="m", context_length=8), ModelInfo(name="a", context_length=8, base_model="m")]
    config = ModelConfig(path=str(folder), lora_adapters={"a": str(folder)})
    base, adapter = await identified(models, BackendConfig(name="transformers", model=config), lambda name: "")
    assert base.fingerprint == fingerprint(folder)
    assert adapter.fingerprint not in ("", base.fingerprint)
    assert list(await identified(models, BackendConfig(name="upstream", model=config), lambda name: "")) == models


def loaded_as(quantization: str, precision: str, backend: str = "transformers") -> ModelInfo:
    return ModelInfo(name="m", context_length=8, backend=backend, quantization=quantization, precision=precision)


async def test_workers_of_one_command_that_loaded_other_numbers_differ(folder: Path) -> None:
    """What `auto` takes goes by the processor, and by the memory that was free."""

    async def found(*loaded: str) -> ModelInfo:
        from fastchat_grpc.backends.identity import identified

        config = BackendConfig(name="auto", model=ModelConfig(path=str(folder)))
        (model,) = await identified([loaded_as(*loaded)], config, lambda name: "")
        return model

    ways = [
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "bfloat16", "openvino"),
        ("int8", "float32, weights of 8 bits"),
        ("int8", "float32, weights of 6 bits"),
        ("int8", "float32", "openvino"),
        ("gptq", "float16"),
        ("gptq", "bfloat16"),
        ("Q4_1", "", "llama_cpp"),
        ("", "float32", "openvino"),
    ]
    models = [await found(*way) for way in ways]
    assert len({model.fingerprint for model in models}) == len(ways)
    assert [model.quantization for model in models[:5]] == ["float32", "bfloat16", "float16", "int8", "int8"]
    assert models[-1].quantization == "bfloat16"  # as the files say, since their engine does not
    assert [await found(*way) for way in ways] == models
    assert (await found("float32", "float32", "vllm")).fingerprint == models[0].fingerprint  # plain numbers are alike


async def test_an_adapter_on_other_numbers_differs(folder: Path) -> None:
    async def found(quantization: str) -> str:
        from fastchat_grpc.backends.identity import identified

        base = loaded_as(quantization, "float32")
        config = ModelConfig(path=str(folder), lora_adapters={"a": str(folder)})
        models = [base, replace(base, name="a", base_model="m")]
        _, adapter = await identified(models, BackendConfig(name="transformers", model=config), lambda name: "")
        return adapter.fingerprint

    assert await found("int8") != await found("float32")


@pytest.mark.parametrize("files", [True, False])
async def test_workers_that_part_reasoning_from_text_otherwise_differ(folder: Path, files: bool) -> None:
    template = "{% if enable_thinking %}<think>{% endif %}"

    async def found(parser: str) -> str:
        from fastchat_grpc.backends.identity import identified

        config = ModelConfig(path=str(folder), reasoning_parser=parser)
        # The files tell it, or the backend knows its own.
        models = [ModelInfo(name="m", context_length=8, fingerprint="" if files else "own")]
        backend = BackendConfig(name="transformers" if files else "echo", model=config)
        (model,) = await identified(models, backend, lambda name: template)
        return model.fingerprint

    by_itself = await found("auto")
    assert by_itself == (fingerprint(folder) if files else "own")
    assert await found("qwen3") == by_itself  # the same marks, said aloud
    others = [await found(name) for name in ("none", "deepseek_r1", "mistral")]
    assert len({by_itself, *others}) == 4
    assert others == [await found(name) for name in ("none", "deepseek_r1", "mistral")]
