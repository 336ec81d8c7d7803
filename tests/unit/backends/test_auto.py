"""What `--backend auto` takes, by what is installed, the machine, and what is asked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from fastchat_grpc.backends import registry
from fastchat_grpc.backends.capabilities import Traits
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.models.quantization_plan import FASTEST, fast_instructions


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what is installed, and whether there is an NVIDIA GPU."""

    def set_up(*installed: str, gpu: bool = False) -> None:
        here = {name: name in installed for name in registry.TRAITS}
        names = {id(traits): name for name, traits in registry.TRAITS.items()}
        monkeypatch.setattr(Traits, "installed", property(lambda traits: here[names[id(traits)]]))
        monkeypatch.setattr(registry, "_has_nvidia_gpu", lambda: gpu)

    return set_up


def chosen(path: str = "owner/model", options: dict[str, str] | None = None, **model: Any) -> str:
    config = BackendConfig(name="auto", model=ModelConfig(path=path, **model), options=options or {})
    return registry.choose(config).name


def test_on_a_cpu_the_engine_that_refuses_nothing_comes_before_openvino(machine: Any) -> None:
    machine("transformers", "openvino")
    assert chosen() == "transformers"
    assert chosen("smollm2-135m-instruct") == "transformers"
    machine("openvino")
    assert chosen() == "openvino"
    machine()
    assert chosen() == "transformers"  # whose error says what to install


def test_a_folder_in_openvinos_own_format_is_openvinos(machine: Any, tmp_path: Path) -> None:
    machine("transformers", "openvino", "vllm", gpu=True)
    (tmp_path / "openvino_model.xml").write_text("<net/>")
    assert chosen(str(tmp_path)) == "openvino"


def test_on_an_nvidia_gpu_vllm_comes_first_and_then_sglang(machine: Any) -> None:
    machine("transformers", "openvino", "vllm", "sglang", gpu=True)
    assert chosen() == "vllm"
    assert chosen(device="cuda") == "vllm"
    assert chosen(device="cpu") == "transformers"
    machine("transformers", "sglang", gpu=True)
    assert chosen() == "sglang"
    machine("transformers", gpu=True)
    assert chosen() == "transformers"


@pytest.mark.parametrize(
    "asked",
    [
        {"path": "model.gguf"},
        {"load_8bit": True},
        {"cpu_offloading": True},
        {"max_gpu_memory": "8GiB"},
        {"quantization": "bnb-4bit"},
        {"options": {"prefix_cache": "off"}},
    ],
)
def test_what_a_gpu_engine_has_no_setting_for_stays_with_our_own(machine: Any, asked: dict[str, Any]) -> None:
    machine("transformers", "vllm", "sglang", gpu=True)
    assert chosen(**asked) == "transformers"


def test_the_choice_and_its_reason_are_one_line(
    machine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine("transformers", gpu=True)
    made: list[BackendConfig] = []

    class Module:
        @staticmethod
        def create(config: BackendConfig) -> None:
            made.append(config)

    monkeypatch.setattr(registry.importlib, "import_module", lambda name: Module)
    with caplog.at_level(logging.INFO, registry.__name__):
        registry.create(BackendConfig(name="auto", model=ModelConfig(path="owner/model")))
    (line,) = caplog.messages
    for words in ("backend transformers", "fastchat-grpc[vllm] would be faster", "--backend NAME"):
        assert words in line
    assert made[0].name == "transformers"
    assert made[0].model.quantization == FASTEST


@pytest.mark.parametrize("asked", [{"load_8bit": True}, {"quantization": "none"}, {"quantization": "int8"}])
def test_a_precision_that_was_asked_for_is_kept(asked: dict[str, Any]) -> None:
    config = BackendConfig(name="auto", model=ModelConfig(path="owner/model", **asked))
    applied = registry.Chosen("transformers", "").applied(config).model
    assert (applied.load_8bit, applied.quantization) == (asked.get("load_8bit", False), asked.get("quantization"))


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("fpu avx2 fma avx512f avx512bw avx512_vnni", "AVX-512 VNNI"),
        ("fpu avx2 fma avx512f avx512bw", "AVX2"),
        ("fpu avx2 fma", "AVX2"),
        ("fpu avx", ""),
    ],
)
def test_eight_bits_are_fast_where_the_processor_has_products_for_them(flags: str, found: str, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: avx512f avx512bw avx512_vnni\n")
    assert fast_instructions(cpuinfo) == found
    assert fast_instructions(tmp_path / "none") == ""  # as on macOS
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert fast_instructions(cpuinfo) == ""
