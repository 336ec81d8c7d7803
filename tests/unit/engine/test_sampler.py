"""The sampler against transformers' own processors, on random logits.

What the sampler draws must be the token at which the cumulative probability, by token id, of the
distribution that transformers' processors leave passes the row's random number. So each draw checks the
whole distribution before it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from fastchat_grpc.core import GenerateRequest, SamplingParams, StopConditions, TokenPrompt
from fastchat_grpc.engine.request import Request, Sequence
from fastchat_grpc.engine.rng import uniforms
from fastchat_grpc.engine.sampler import Sampler, draw_any, truncate

VOCABULARY = 700
EOS = frozenset({VOCABULARY - 1})
ROWS = 24
MARGIN = 1e-5
"""Draws closer than this to the edge between two tokens are left out: floating point decides those."""


def sequence(sampling: SamplingParams, prompt: list[int], output: list[int], **stopping) -> Sequence:
    spec = GenerateRequest(
        prompt=TokenPrompt(tuple(prompt)),
        sampling=sampling,
        stopping=StopConditions(**{"max_new_tokens": 9, **stopping}),
    )
    request = Request(spec=spec, prompt=prompt)
    return Sequence(request=request, index=0, tokens=[*prompt, *output], seed=sampling.seed or 0)


def reference(logits: torch.Tensor, s: Sequence) -> torch.Tensor:
    """Probabilities of one row by transformers' processors, in the documented order."""
    sampling, stopping = s.request.spec.sampling, s.request.spec.stopping
    ids = torch.tensor([s.tokens])
    output = s.tokens[s.prompt_length :]
    scores = logits[None].clone()
    if sampling.logit_bias:
        bias = [[[token], value] for token, value in sampling.logit_bias.items()]
        scores = hf.SequenceBiasLogitsProcessor(bias)(ids, scores)
    if stopping.min_new_tokens:
        ends = sorted({*EOS, *stopping.stop_token_ids})
        scores = hf.MinNewTokensLengthLogitsProcessor(s.prompt_length, stopping.min_new_tokens, ends, device="cpu")(
            ids, scores
        )
    if sampling.repetition_penalty != 1:
        scores = hf.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))(ids, scores)
    for token in set(output):
        scores[0, token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
    if sampling.temperature >= 1e-5:
        scores = hf.TemperatureLogitsWarper(float(sampling.temperature))(ids, scores)
    if sampling.greedy:
        return torch.nn.functional.one_hot(scores.argmax(-1), VOCABULARY)[0].double()
    if sampling.top_p < 1:
        scores = hf.TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.top_k > 0:
        scores = hf.TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.min_p > 0:
        scores = hf.MinPLogitsWarper(sampling.min_p)(ids, scores)
    return scores[0].double().softmax(-1)


def check(logits: torch.Tensor, sequences: list[Sequence]) -> int:
    """Compare one call of the sampler; returns how many rows were not at an edge."""
    drawn = Sampler(EOS).sample(logits.clone(), sequences)
    compared = 0
    for row, (token, s) in enumerate(zip(drawn, sequences, strict=True)):
        probabilities = reference(logits[row], s)
        assert probabilities[token] > 0
        key = np.array([[s.seed], [0], [s.output_length]], dtype=np.uint64)
        draw = float(uniforms(*key)[0])
        totals = probabilities.cumsum(-1)
        if (totals - draw).abs().min() > MARGIN or s.request.spec.sampling.greedy:
            compared += 1
            assert token == int(torch.searchsorted(totals, torch.tensor(draw, dtype=totals.dtype), right=True))
    return compared


params = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.one_of(st.just(0.0), st.floats(0.05, 3)),
        "top_p": st.one_of(st.just(0.0), st.floats(0.01, 1)),
        "top_k": st.integers(-1, VOCABULARY + 10),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.5, 3),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-50, 50).filter(bool), max_size=4),
    },
)
texts = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(params, texts, texts, st.integers(0, 5)), min_size=1, max_size=6),
    st.floats(0.1, 8),
    st.integers(0, 2**32),
)
def test_any_mix_of_parameters_draws_what_transformers_processors_leave(rows, spread, seed):
    torch.manual_seed(seed)
    sequences = [
        sequence(SamplingParams(**p, seed=seed + i), [1, *prompt], output, min_new_tokens=minimum, stop_token_ids=(5,))
        for i, (p, prompt, output, minimum) in enumerate(rows)
    ]
    check(torch.randn(len(rows), VOCABULARY) * spread, sequences)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.0},
        {"temperature": 1e-6},
        {"top_p": 1e-9},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"top_k": 1},
        {"top_k": 40},
        {"min_p": 0.05},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -1.5},
        {"logit_bias": {3: 8.0, 4: -100.0}},
        {"top_p": 0.9, "top_k": 20, "min_p": 0.1, "temperature": 0.7},
    ],
    ids=str,
)
def test_each_processor_draws_what_transformers_has(sampling):
    torch.manual_seed(0)
    output = [3, 3, 8, 9, 650]
    sequences = [sequence(SamplingParams(**sampling, seed=seed), [1, 2, 3, 699], output) for seed in range(ROWS)]
    assert check(torch.randn(1, VOCABULARY).expand(ROWS, -1) * 3, sequences) > ROWS // 2


def test_penalties_mean_the_same_at_any_temperature():
    """vLLM's order: logits 0, 2, 1.5, 0 less a presence penalty of 1 for token 1, over 0.2, leave that token 7.6 %."""
    sampling = [SamplingParams(temperature=0.2, presence_penalty=1.0, seed=seed) for seed in range(4000)]
    sequences = [sequence(params, [3], [1]) for params in sampling]
    drawn = Sampler(frozenset()).sample(torch.tensor([[0.0, 2.0, 1.5, 0.0]]).repeat(4000, 1), sequences)
    assert drawn.count(1) / 4000 == pytest.approx(0.0758, abs=0.02)


def test_flat_logits_need_more_candidates_than_the_first_look_gives():
    torch.manual_seed(0)
    sequences = [sequence(SamplingParams(top_p=0.97, seed=seed), [1], []) for seed in range(ROWS)]
    assert check(torch.randn(ROWS, VOCABULARY) * 0.1, sequences) > ROWS // 2
    candidates = truncate(
        torch.randn(2, VOCABULARY) * 0.1, torch.tensor([0.97] * 2), torch.tensor([999] * 2), torch.zeros(2)
    )
    assert candidates.ids.shape[1] == VOCABULARY


@pytest.mark.parametrize("vocabulary", [10, 256, 257, 1000, 4096])
def test_drawing_from_everything_finds_every_place(vocabulary):
    torch.manual_seed(0)
    probabilities = torch.rand(vocabulary, dtype=torch.double)
    probabilities[torch.rand(vocabulary) < 0.3] = 0
    probabilities /= probabilities.sum()
    totals = probabilities.cumsum(-1)
    draws = torch.cat([torch.linspace(0, 0.999999, 300, dtype=torch.double), torch.tensor([1 - 2.0**-53])])
    tokens = draw_any(probabilities.log().float().expand(len(draws), -1).clone(), draws)
    assert (probabilities[tokens] > 0).all()
    expected = torch.searchsorted(totals, draws, right=True).clamp(max=vocabulary - 1)
    clear = (totals[:, None] - draws).abs().min(dim=0).values > 1e-6
    assert torch.equal(tokens[clear], expected[clear])


def test_drawn_tokens_have_the_frequencies_of_their_probabilities():
    torch.manual_seed(0)
    logits = torch.randn(1, 50)
    expected = logits.softmax(-1)[0] * 20_000
    sequences = [sequence(SamplingParams(seed=seed), [1], []) for seed in range(20_000)]
    drawn = torch.tensor(Sampler(frozenset()).sample(logits.repeat(20_000, 1), sequences))
    counts = torch.bincount(drawn, minlength=50)
    # Chi-squared with 49 degrees of freedom: 85.4 at p = 0.001.
    assert float(((counts - expected) ** 2 / expected).sum()) < 85.4


def test_equal_logits_are_drawn_alike_wherever_they_stand_in_the_batch():
    """Ties are common in 16 bits; which of two equal tokens is drawn must not depend on the other rows."""
    torch.manual_seed(0)
    logits = (torch.randn(ROWS, VOCABULARY) * 4).round() / 2
    sequences = [sequence(SamplingParams(top_k=20, seed=seed), [1], []) for seed in range(ROWS)]
    together = Sampler(EOS).sample(logits.clone(), sequences)
    alone = [Sampler(EOS).sample(logits[i : i + 1].clone(), [s])[0] for i, s in enumerate(sequences)]
    assert together == alone


def test_a_changed_batch_is_noticed():
    torch.manual_seed(0)
    logits = torch.randn(2, VOCABULARY)
    greedy, hot = (
        sequence(SamplingParams(temperature=0), [1], []),
        sequence(SamplingParams(temperature=50, seed=4), [1], []),
    )
    sampler = Sampler(EOS)
    first = sampler.sample(logits.clone(), [greedy, hot])
    assert sampler.sample(logits.flip(0).clone(), [hot, greedy]) == first[::-1]
    assert sampler.sample(logits[:1].clone(), [greedy]) == first[:1]


def test_penalties_follow_a_growing_output():
    sampler = Sampler(EOS)
    s = sequence(SamplingParams(temperature=0, frequency_penalty=0.6), [1, 2], [])
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 7], logits[0, 9] = 1.0, 0.5
    drawn = []
    for _ in range(5):
        token = sampler.sample(logits.clone(), [s])[0]
        s.tokens.append(token)
        drawn.append(token)
    assert drawn == [7, 9, 7, 0, 1]
