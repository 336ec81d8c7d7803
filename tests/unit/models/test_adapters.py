"""LoRA adapters of every kind change the text of whoever asks for them, and of nobody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from fastchat_grpc.errors import ModelLoadError  # noqa: E402
from fastchat_grpc.models.adapters import load_adapters  # noqa: E402
from fastchat_grpc.models.cpu_linear import fast_linear, replace_linears  # noqa: E402
from tests.unit.engine.tiny import LLAMA  # noqa: E402

IDS = torch.arange(1, 20)[None]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "words": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "dora": {"target_modules": ["v_proj", "down_proj"], "use_dora": True},
}


def base_model() -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(**{**LLAMA, "hidden_size": 64, "attention_bias": True})
    return AutoModelForCausalLM.from_config(config).eval()


def save(folder: Path, **options: Any) -> Path:
    torch.manual_seed(len(str(options)))
    model = peft.get_peft_model(base_model(), peft.LoraConfig(r=4, lora_alpha=32, init_lora_weights=False, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_(std=0.4)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp(name), **options) for name, options in ADAPTERS.items()}


@torch.no_grad()
def logits(model: Any) -> Any:
    return model(input_ids=IDS).logits[0]


@pytest.mark.parametrize("fast", [False, True])
def test_each_adapter_computes_what_it_computes_alone_and_the_base_model_stays(
    folders: dict[str, Path], fast: bool
) -> None:
    """An output layer that came with one adapter answered the base model's requests, and those of other adapters."""
    expected = {n: logits(peft.PeftModel.from_pretrained(base_model(), f).eval()) for n, f in folders.items()}
    expected[""] = logits(base_model())
    model, adapters = load_adapters(base_model(), folders)
    if fast:
        replace_linears(model, fast_linear)
    for name in ("", *folders, "", *reversed(folders), "plain"):
        adapters.activate(name)
        assert torch.allclose(logits(model), expected[name], atol=1e-3), name
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: peft.LoraConfig(target_modules=["q_proj"], bias="all"), "biases of the base model"),
        (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "kind IA3"),
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "kind PROMPT_TUNING"),
        (
            lambda: peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5]),
            "aLoRA",
        ),
    ],
)
def test_what_would_change_nothing_or_everybody_is_refused_by_name(config: Any, said: str, tmp_path: Path) -> None:
    peft.get_peft_model(base_model(), config()).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=said):
        load_adapters(base_model(), {"a": tmp_path})
