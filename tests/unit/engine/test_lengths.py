"""What depends on a sequence's length is seen by the check at load, or the model is run one sequence at a time."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as hf

from fastchat_grpc.core import GenerateRequest, SamplingParams, StopConditions, TokenPrompt
from fastchat_grpc.engine.cpu_llama import DecoderLayer
from fastchat_grpc.engine.embedder import Embedder
from fastchat_grpc.engine.lengths import limits_sight, short_windows, turns_by_length
from fastchat_grpc.engine.model_runner import make_packed_runner
from fastchat_grpc.models.quantization import quantize_int8
from fastchat_grpc.native.kernels import kernels
from tests.unit.engine.tiny import LLAMA, Harness, greedy_by_generate

GEMMA = {name: value for name, value in LLAMA.items() if name != "initializer_range"}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
}
WINDOW = 16
PACKED = {
    "mistral": lambda: hf.MistralConfig(**LLAMA, sliding_window=WINDOW),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen2 without": lambda: hf.Qwen2Config(**LLAMA, use_sliding_window=False, sliding_window=WINDOW),
    "gemma3": lambda: hf.Gemma3TextConfig(**GEMMA, head_dim=8, sliding_window=WINDOW),
}
ALONE = {
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **LLAMA,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=0,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "llama4": lambda: hf.Llama4TextConfig(
        **LLAMA, attention_chunk_size=WINDOW, num_local_experts=2, intermediate_size_mlp=64, head_dim=8
    ),
    "longrope": lambda: hf.Phi3Config(**LLAMA, original_max_position_embeddings=32, rope_parameters=dict(LONGROPE)),
    "dynamic": lambda: hf.LlamaConfig(
        **{**LLAMA, "max_position_embeddings": 32},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
}


def model_of(config):
    torch.manual_seed(1)
    return hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def prompt(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(1, 256) for _ in range(length)]


def ask(tokens, count=12) -> GenerateRequest:
    return GenerateRequest(
        prompt=TokenPrompt(tuple(tokens)),
        sampling=SamplingParams(temperature=0),
        stopping=StopConditions(max_new_tokens=count, ignore_eos=True),
    )


@pytest.mark.parametrize("name", [*PACKED, *ALONE])
def test_text_past_every_window_and_switching_point_is_that_of_generate(name):
    """Short beside long, so that what one sequence needs would show in the other."""
    model = model_of({**PACKED, **ALONE}[name]())
    prompts = [prompt(n) for n in (6, 60, 26)]
    expected = [greedy_by_generate(model, tokens, 12) for tokens in prompts]
    with Harness(model, packed=name in PACKED) as harness:
        assert [sink.tokens() for sink in harness.run(*map(ask, prompts))] == expected


@pytest.mark.parametrize("name", ALONE)
def test_a_model_that_only_seems_to_pack_is_run_one_at_a_time(name):
    model = model_of(ALONE[name]())
    implementation = model.config._attn_implementation
    with torch.inference_mode():
        assert make_packed_runner(model, lambda name: None) is None
    assert model.config._attn_implementation == implementation


def test_an_embedding_does_not_depend_on_what_was_embedded_before():
    """A dynamic rotary embedding remembers the longest text of all."""
    model = model_of(ALONE["dynamic"]())
    embedder = Embedder(model, "mean", lambda name: None)

    def embed(length):
        return embedder.embed([prompt(length)], True, "")[0]

    alone = embed(40)
    embed(120)
    assert embed(40) == pytest.approx(alone, abs=1e-6)


def test_a_model_that_makes_all_logits_whichever_are_wanted_is_run_one_at_a_time():
    """Their rows would be taken for others."""
    model = model_of(PACKED["mistral"]())
    forward, tokens = model.forward, prompt(20)
    model.forward = lambda *args, logits_to_keep=0, **kwargs: forward(*args, **kwargs)
    expected = greedy_by_generate(model, tokens, 12)
    with Harness(model, packed=None) as harness:
        assert harness.run(ask(tokens))[0].tokens() == expected


def test_a_rotary_embedding_that_never_switches_in_the_context_is_packed():
    model = model_of(ALONE["longrope"]())
    with torch.inference_mode():
        assert make_packed_runner(model, lambda name: None, context_length=33) is None
        assert make_packed_runner(model, lambda name: None, context_length=32) is not None


def test_frequencies_that_are_fixed_do_not_turn_by_length():
    for kind in ("default", "linear", "yarn", "llama3"):
        rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        config = hf.LlamaConfig(**LLAMA, rope_parameters={**rope, "original_max_position_embeddings": 32})
        assert not turns_by_length(config, None)


def test_windows_are_as_they_were_after_the_check():
    model = model_of(PACKED["gemma3"]())
    with short_windows(model) as found:
        assert found
        assert model.config.sliding_window == 3
        assert {m.sliding_window for m in model.modules() if hasattr(m, "sliding_window")} == {3}
    assert model.config.sliding_window == WINDOW
    assert {m.sliding_window for m in model.modules() if hasattr(m, "sliding_window")} == {WINDOW}


@pytest.mark.skipif(kernels() is None, reason="no C compiler")
@pytest.mark.parametrize("int8", [False, True])
def test_a_wrong_window_of_the_fast_path_is_noticed(int8, monkeypatch, caplog):
    """A fast layer that forgets its window computes the same up to a window's length."""
    config = hf.MistralConfig(**{**LLAMA, "hidden_size": 64}, sliding_window=WINDOW)
    model = model_of(config)
    if int8:
        quantize_int8(model, kernels())
    monkeypatch.setattr(DecoderLayer, "sliding_window", property(lambda self: None))
    with torch.inference_mode():
        assert make_packed_runner(model, lambda name: None, rounds_inputs=int8) is not None
    assert "does not suit this model" in caplog.text


def test_a_mask_that_hides_earlier_tokens_is_told_from_a_causal_one():
    def causal(batch, head, q, k):
        return k <= q

    assert not limits_sight(causal, 4096)
    assert limits_sight(lambda b, h, q, k: causal(b, h, q, k) & (k > q - 1024), 4096)
    assert not limits_sight(lambda b, h, q, k: causal(b, h, q, k) & (k > q - 4096), 4096)
    assert limits_sight(lambda b, h, q, k: causal(b, h, q, k) & (k // 2048 == q // 2048), 4096)
