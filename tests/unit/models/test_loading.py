"""Loading on a CPU: number formats that go together, and memory by the files that are read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from fastchat_grpc.backends import registry  # noqa: E402
from fastchat_grpc.config import BackendConfig, ModelConfig  # noqa: E402
from fastchat_grpc.errors import ModelLoadError  # noqa: E402
from fastchat_grpc.models import devices, quantization_plan  # noqa: E402
from fastchat_grpc.models.loading import load_model  # noqa: E402
from fastchat_grpc.native.kernels import kernels  # noqa: E402
from tests.unit.engine.tiny import LLAMA, save_tiny  # noqa: E402

needs_kernels = pytest.mark.skipif(kernels() is None, reason="no C compiler on this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16."""
    made = tmp_path_factory.mktemp("bf16")
    torch.manual_seed(1)
    config = LlamaConfig(**{**LLAMA, "vocab_size": 258, "hidden_size": 64})
    save_tiny(made, AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    return made


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes with bfloat16, and fast with 8 bits."""
    monkeypatch.setattr(devices, "_cpu_has_bf16", lambda: True)
    monkeypatch.setattr(quantization_plan, "int8_is_fastest", lambda: True)


@needs_kernels
@pytest.mark.parametrize("asked", [{"load_8bit": True}, {"quantization": "int8"}, {"quantization": "fastest"}])
def test_a_checkpoint_of_16_bits_loads_in_8_whatever_else_the_processor_can(
    folder: Path, asked: dict[str, Any]
) -> None:
    """It was refused, with the advice to leave out a --dtype that nobody had given, where bfloat16 is fast."""
    assert load_model(ModelConfig(path=str(folder))).dtype == torch.bfloat16
    loaded = load_model(ModelConfig(path=str(folder), **asked))
    assert (loaded.quantization, loaded.dtype) == ("int8", torch.float32)


@needs_kernels
async def test_what_auto_loaded_is_part_of_the_fingerprint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers of one command took 8 bits and float32, each by its machine, and had equal fingerprints."""

    async def fingerprint(fast: bool, **asked: Any) -> str:
        monkeypatch.setattr(quantization_plan, "int8_is_fastest", lambda: fast)
        model = ModelConfig(path=str(folder), context_length=64, **asked)
        config = BackendConfig(name="auto", model=model, options={"threads": "1"})
        backend = registry.create(config)
        try:
            (info,) = await registry.start(backend, config)
        finally:
            await backend.close()
        return info.fingerprint

    eight, own = await fingerprint(True), await fingerprint(False)
    assert eight != own
    assert await fingerprint(False, load_8bit=True) == eight
    assert await fingerprint(True, quantization="none") == own
    monkeypatch.setattr(devices, "_cpu_has_bf16", lambda: False)
    assert await fingerprint(False) not in (eight, own)


@needs_kernels
def test_a_model_whose_8_bits_there_is_no_memory_to_make_runs_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 bits are made of float32, which takes twice the memory of the checkpoint."""
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(devices, "available_memory", lambda: int(1.5 * size))
    assert load_model(ModelConfig(path=str(folder), quantization="fastest")).dtype == torch.bfloat16
    with pytest.raises(ModelLoadError, match="as float32"):
        load_model(ModelConfig(path=str(folder), load_8bit=True))


def test_weights_that_a_folder_holds_twice_are_counted_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some repositories bring the makers' own file beside the one that is read."""
    twice = tmp_path / "twice"
    shutil.copytree(folder, twice)
    shutil.copy(twice / "model.safetensors", twice / "consolidated.safetensors")
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(devices, "available_memory", lambda: int(1.5 * size))
    assert load_model(ModelConfig(path=str(twice))).dtype == torch.bfloat16
