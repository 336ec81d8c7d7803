"""The same logits give the same distribution on every backend: what each sampling field does, and in which order.

The reference is a few lines of numpy over logits that transformers computes by itself. Order, as in the OpenAI API,
vLLM and Hugging Face: penalties, temperature, then what top-k, top-p and min-p leave.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest

from fastchat_grpc.backends.capabilities import Feature
from tests.conformance.harness import Harness
from tests.conformance.targets import embedded_folder

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPT = "ha ha ha ha ha ha"
ROUNDS, CHOICES = 2, 128
TOLERANCE = 0.12
"""Of total variation: 256 draws over a dozen tokens lie within about 0.09, and rounding moves a little too."""
FEATURES = {
    "top_k": Feature.TOP_K,
    "top_p": Feature.TOP_P,
    "min_p": Feature.MIN_P,
    "repetition_penalty": Feature.REPETITION_PENALTY,
    "presence_penalty": Feature.PRESENCE_PENALTY,
    "frequency_penalty": Feature.FREQUENCY_PENALTY,
}
CASES: tuple[dict[str, float], ...] = (
    {"temperature": 1.0, "top_k": 12},
    {"temperature": 0.6, "top_k": 12},
    {"temperature": 1.5, "top_k": 4},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 12, "repetition_penalty": 1.2},
    {"temperature": 1.0, "top_k": 12, "repetition_penalty": 0.9},
    {"temperature": 0.4, "top_k": 12, "presence_penalty": 2.0},
    {"temperature": 0.4, "top_k": 12, "frequency_penalty": 2.0},
    {"temperature": 4.0, "top_k": 12, "presence_penalty": -2.0},
)


@cache
def logits_after(token_ids: tuple[int, ...]) -> np.ndarray:
    """Logits of the next token, by transformers alone."""
    torch = pytest.importorskip("torch")
    with torch.inference_mode():
        result: np.ndarray = _model()(torch.tensor([token_ids])).logits[0, -1].double().numpy()
    return result


@cache
def _model() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype="float32")


def distribution(prompt: tuple[int, ...], output: tuple[int, ...], fields: Mapping[str, float]) -> np.ndarray:
    """Probabilities of the token after `output`, by the definition of each field."""
    logits = logits_after(prompt + output).copy()
    penalty = fields.get("repetition_penalty", 1.0)
    for token_id in {*prompt, *output}:
        logits[token_id] = logits[token_id] / penalty if logits[token_id] > 0 else logits[token_id] * penalty
    for token_id, count in Counter(output).items():
        logits[token_id] -= fields.get("presence_penalty", 0.0) + fields.get("frequency_penalty", 0.0) * count
    logits /= fields["temperature"]
    order = np.argsort(-logits, kind="stable")
    ranked = np.exp(logits[order] - logits[order[0]])
    ranked /= ranked.sum()
    keep = np.ones(len(ranked), dtype=bool)
    keep[int(fields.get("top_k", len(ranked))) :] = False
    keep &= (np.cumsum(ranked) - ranked) < fields.get("top_p", 1.0)
    keep &= ranked >= fields.get("min_p", 0.0) * ranked[0]
    probabilities = np.zeros(len(ranked))
    probabilities[order] = np.where(keep, ranked, 0)
    return np.asarray(probabilities / probabilities.sum())


@pytest.mark.parametrize("fields", CASES, ids=lambda fields: "-".join(f"{k}={v:g}" for k, v in fields.items()))
async def test_draws_follow_the_distribution_that_the_fields_define(harness: Harness, fields: dict[str, float]) -> None:
    wanted = [FEATURES[name] for name in fields if name in FEATURES]
    if not harness.target.real or not harness.supports(Feature.TOKEN_IDS, Feature.SEED, Feature.N, *wanted):
        pytest.skip("no language model, or it refuses a field")
    if fields["temperature"] > harness.target.max_temperature:
        pytest.skip("hotter than the backend takes")
    prompt = tuple(await harness.tokens_of(PROMPT))
    penalized = any(name.endswith("_penalty") for name in fields)
    expected = _expected(prompt, fields, length=2 if penalized else 1)  # skips where there is no oracle
    draws: Counter[tuple[int, ...]] = Counter()
    for seed in range(ROUNDS):
        # The output's penalties show on its second token.
        result = await harness.ask(
            list(prompt), n=CHOICES, seed=seed, max_new_tokens=2 if penalized else 1, ignore_eos=True, **fields
        )
        draws.update(tuple(choice.token_ids) for choice in result.choices.values())
    total = sum(draws.values())
    distance = 0.5 * sum(abs(draws[tokens] / total - p) for tokens, p in expected.items())
    distance += 0.5 * sum(count / total for tokens, count in draws.items() if tokens not in expected)
    rare = sum(1 for p in expected.values() if p * total < 1)
    noise = sum(math.sqrt(p * (1 - p) / (2 * math.pi * total)) for p in expected.values())
    assert distance < max(TOLERANCE, 2 * noise), f"{len(draws)} outcomes, {rare} rare, noise {noise:.3f}"


def _expected(prompt: tuple[int, ...], fields: Mapping[str, float], length: int) -> dict[tuple[int, ...], float]:
    """The probability of each output of one or two tokens."""
    first = distribution(prompt, (), fields)
    outcomes = {(int(i),): float(first[i]) for i in np.flatnonzero(first > 1e-4)}
    if length == 1:
        return outcomes
    pairs = {}
    for (token_id,), p in outcomes.items():
        second = distribution(prompt, (token_id,), fields)
        pairs |= {(token_id, int(i)): p * float(second[i]) for i in np.flatnonzero(second > 1e-4)}
    return pairs


async def test_the_order_of_penalties_and_temperature_would_show() -> None:
    """The cases tell the right order from the other, in which penalties are weaker by the temperature."""
    logits = np.array([3.0, 2.0, 1.0])
    for fields in CASES:
        if {"presence_penalty", "frequency_penalty"} & set(fields):
            penalty = np.array([fields.get("presence_penalty", 0) + fields.get("frequency_penalty", 0), 0, 0])
            right, wrong = (logits - penalty) / fields["temperature"], logits / fields["temperature"] - penalty
            right, wrong = np.exp(right) / np.exp(right).sum(), np.exp(wrong) / np.exp(wrong).sum()
            assert 0.5 * np.abs(right - wrong).sum() > 2 * TOLERANCE
