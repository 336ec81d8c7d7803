"""`--quantization fastest`: 8 bits where they are faster here and suit the model, else the model as it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fastchat_grpc.config import ModelConfig
from fastchat_grpc.models import quantization_plan
from fastchat_grpc.models.quantization_plan import FASTEST, INT8, plan_quantization

PLAIN = SimpleNamespace()


def planned(device: str = "cpu", config: Any = PLAIN, **model: Any) -> tuple[str, bool]:
    torch = pytest.importorskip("torch")
    settings = ModelConfig(path="m", quantization=FASTEST, **model)
    plan = plan_quantization(settings, config, torch.device(device))
    return plan.method, plan.chosen


def test_eight_bits_are_taken_on_a_processor_that_is_fast_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization_plan, "int8_is_fastest", lambda: True)
    assert planned() == (INT8, True)
    assert planned("cuda") == ("", False)
    assert planned(dtype="float32") == ("", False)
    assert planned(lora_adapters={"a": "b"}) == ("", False)
    monkeypatch.setattr(quantization_plan, "int8_is_fastest", lambda: False)
    assert planned() == ("", False)


def test_a_checkpoint_that_is_quantized_stays_as_it_is() -> None:
    stored = SimpleNamespace(quantization_config={"quant_method": "hqq"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization_plan, "_installed", lambda package: True)
        assert planned(config=stored) == ("hqq", False)
