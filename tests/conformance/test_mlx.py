"""mlx's own: what a sequence draws does not depend on the sequences beside it. On a tiny model of random weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

# Not importorskip: MLX must not be imported before the backend has chosen its BLAS library.
if importlib.util.find_spec("mlx_lm") is None:
    pytest.skip("mlx-lm is not installed", allow_module_level=True)

from fastchat_grpc.backends.mlx.engine import MlxEngine, MlxLimits, use_fast_blas
from fastchat_grpc.backends.mlx.sampler import StepSampler
from fastchat_grpc.text.batch import Running
from tests.conformance.harness import request

TOKENIZER: Any = SimpleNamespace(eos_token_ids=frozenset({0}), token_bytes=lambda token_id: b"%d" % token_id)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 1.7, "top_k": 9},
    {"logprobs": 2},
    {"temperature": 0.8, "top_p": 0.7, "logprobs": 2},
    {"temperature": 1.2, "repetition_penalty": 1.3, "min_p": 0.05},
    {"temperature": 1.0, "presence_penalty": 1.0},
    {"temperature": 2.0, "logit_bias": {4: 3.0}},
)


@pytest.fixture(scope="module")
def model() -> Any:
    use_fast_blas("auto")
    import mlx.core as mx
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97}
    model = Model(ModelArgs("llama", num_attention_heads=4, rms_norm_eps=1e-5, **sizes))
    model.set_dtype(mx.float32)
    return model


def sequences() -> list[Running]:
    """One for each of SAMPLINGS, of unlike prompts and lengths."""
    made = []
    for n, fields in enumerate(SAMPLINGS):
        prompt = [5 + n, 9, *range(n % 3)]
        job: Any = SimpleNamespace(request=request(prompt, ignore_eos=True, **fields), prompt_ids=prompt)
        made.append(Running(job=job, index=0, token_ids=prompt, max_tokens=6 + n, min_tokens=0, seed=77 * n))
    return made


def run(model: Any, groups: Sequence[Sequence[Running]], remove: Running | None = None) -> dict[int, list[int]]:
    """Tokens by seed. One group joins before each step; `remove` leaves after the third."""
    engine = MlxEngine(model, TOKENIZER, MlxLimits(max_running=32, prefill_tokens=512, prefill_batch=3))
    waiting, tokens, steps = list(groups), {}, 0
    while waiting or engine.busy:
        for sequence in waiting.pop(0) if waiting else ():
            engine.add(sequence)
        for output in engine.step():
            tokens.setdefault(output.sequence.seed, []).extend(output.token_ids)
        steps += 1
        if steps == 3 and remove is not None:
            engine.remove(remove)
    return tokens


def test_tokens_are_the_same_alone_in_a_crowd_and_among_late_comers(model: Any) -> None:
    alone: dict[int, list[int]] = {}
    for sequence in sequences():
        alone |= run(model, [[sequence]])
    assert [len(tokens) for tokens in alone.values()] == [6 + n for n in range(len(SAMPLINGS))]
    assert run(model, [sequences()]) == alone
    assert run(model, [[sequence] for sequence in sequences()]) == alone
    drawn = [sequence for sequence in sequences() if not sequence.job.request.sampling.greedy]
    assert run(model, [drawn]) == {sequence.seed: alone[sequence.seed] for sequence in drawn}
    crowd = sequences()
    rest = run(model, [crowd], remove=crowd[2])
    assert all(rest[sequence.seed] == alone[sequence.seed] for sequence in crowd if sequence is not crowd[2])


def test_draws_follow_the_probabilities() -> None:
    import mlx.core as mx

    probabilities, count = [0.5, 0.25, 0.15, 0.08, 0.02], 20_000
    sampler = StepSampler()
    for n in range(count):
        key = (n * 0x9E3779B9 & 0xFFFFFFFF, n)
        sampler.expect(SimpleNamespace(filters=False, draw_key=lambda key=key: key))  # type: ignore[arg-type]
    drawn = sampler(mx.broadcast_to(mx.log(mx.array(probabilities)), (count, len(probabilities))))
    for token_id, probability in enumerate(probabilities):
        assert float((drawn == token_id).mean()) == pytest.approx(probability, abs=0.015)
