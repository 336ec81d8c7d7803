"""Real LoRA adapters, written by peft, and what a model with them says by transformers and peft in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter of random weights: `settings` are LoraConfig's."""

    seed: int
    std: float
    dtype: torch.dtype = torch.float32
    settings: Mapping[str, Any]


PROMPT = "My favourite animal is the"
# By these seeds the embedded model says something of its own with each after this prompt, and the likeliest token of
# each step is likelier than the next by an eighth or more, which rounding in float32 does not turn.
ADAPTERS = {
    "red": Adapter(seed=4, std=0.05, settings={"r": 8, "lora_alpha": 24, "target_modules": [*ATTENTION, *MLP]}),
    "blue": Adapter(
        seed=3,
        std=0.05,
        settings={
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
        },
    ),
}


def write_adapter(folder: Path, base: Path, adapter: Adapter) -> Path:
    """Write an adapter of the model in `base` as peft saves one."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **adapter.settings))
    torch.manual_seed(adapter.seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=adapter.std)
            parameter.data = parameter.data.to(adapter.dtype)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


class Reference:
    """The model in a folder with adapters, in transformers and peft. An empty name is the model without one."""

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        (first, *others) = adapters
        self.model = PeftModel.from_pretrained(model, str(adapters[first]), adapter_name=first)
        for name in others:
            self.model.load_adapter(str(adapters[name]), name)
        self.model.eval()
        self._tokenizer = AutoTokenizer.from_pretrained(base)

    def text(self, name: str, prompt: str, count: int) -> str:
        """The greedy continuation of `count` tokens."""
        ids = self._tokenizer(prompt, return_tensors="pt").input_ids
        lengths = {"max_new_tokens": count, "min_new_tokens": count}
        with self._active(name):
            out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
        return str(self._tokenizer.decode(out[0, ids.shape[1] :]))

    def scores(self, name: str, token_ids: Sequence[int]) -> list[float]:
        """The log probability of each token but the first."""
        ids = torch.tensor([token_ids])
        with torch.no_grad(), self._active(name):
            logprobs = self.model(ids).logits[0, :-1].log_softmax(-1)
        return [float(value) for value in logprobs.gather(-1, ids[0, 1:, None])[:, 0]]

    def wrong_scores(self, name: str, token_ids: Sequence[int]) -> Iterator[tuple[str, list[float]]]:
        """The same with what a backend might get wrong: the scale of all layers, or one layer left out."""
        layers = {path: layer for path, layer in self.model.named_modules() if isinstance(layer, LoraLayer)}
        layers = {path: layer for path, layer in layers.items() if name in layer.scaling}
        ranks = {path: layer.r[name] for path, layer in layers.items()}
        for what, factor in (("a tenth more", lambda _: 1.1), ("no division", float), ("a root", lambda r: r**0.5)):
            with self._scaled(name, {layer: factor(ranks[path]) for path, layer in layers.items()}):
                yield what, self.scores(name, token_ids)
        for path, layer in layers.items():
            with self._scaled(name, {layer: 0.0}):
                yield path, self.scores(name, token_ids)

    @contextmanager
    def _active(self, name: str) -> Iterator[None]:
        if not name:
            with self.model.disable_adapter():
                yield
            return
        self.model.set_adapter(name)
        yield

    @contextmanager
    def _scaled(self, name: str, factors: Mapping[Any, float]) -> Iterator[None]:
        own = {layer: layer.scaling[name] for layer in factors}
        try:
            for layer, factor in factors.items():
                layer.scaling[name] *= factor
            yield
        finally:
            for layer, scale in own.items():
                layer.scaling[name] = scale
