"""The fast path for CPUs computes what transformers computes; kernels do what torch does."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from fastchat_grpc.engine import model_runner
from fastchat_grpc.engine.attention import PagedStep, WholeStep, attend_chunk, attend_decode
from fastchat_grpc.engine.cpu_llama import Attention, CpuLlama, DecoderLayer, Unsuitable
from fastchat_grpc.engine.model_runner import make_packed_runner
from fastchat_grpc.engine.step_model import TransformersModel
from fastchat_grpc.models.adapters import load_adapters
from fastchat_grpc.models.cpu_linear import OneDnnLinear, fast_linear, fused_layer, padded_rows, replace_linears
from fastchat_grpc.models.quantization import quantize_int8
from fastchat_grpc.native.kernels import SWITCH, DecodeKernel, Pools, Qkv, Rotary, kernels
from tests.unit.engine.test_engine import ask, prompt
from tests.unit.engine.tiny import LLAMA, VOCABULARY_SIZE, Harness, greedy_by_generate, tiny

needs_kernels = pytest.mark.skipif(kernels() is None, reason="no C compiler on this machine")


def step_over(keys, values, contexts, lengths):
    """A step over one layer's pool."""
    return kernels().step(Pools([keys], [values]), torch.zeros(0, dtype=torch.int64), contexts, lengths)


def runner_of(model, **options):
    with torch.inference_mode():
        return make_packed_runner(model, lambda name: None, **options)


VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
FAMILIES = {
    "llama": lambda: LlamaConfig(**LLAMA),
    "llama with biases": lambda: LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "llama with a tied head": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama with heads of an odd size": lambda: LlamaConfig(**LLAMA, head_dim=12),
    "llama with one key head": lambda: LlamaConfig(**{**LLAMA, "num_key_value_heads": 1}),
    "llama with yarn": lambda: LlamaConfig(**LLAMA, rope_parameters=dict(YARN)),
    "mistral": lambda: MistralConfig(**LLAMA, sliding_window=None),
    "mistral with a window": lambda: MistralConfig(**LLAMA, sliding_window=12),
    "qwen2": lambda: Qwen2Config(**LLAMA),
    "qwen2 with windows": lambda: Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=12, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**LLAMA, head_dim=16),
    "qwen3 with biases": lambda: Qwen3Config(**LLAMA, head_dim=16, attention_bias=True),
    "llava": lambda: LlavaConfig(
        text_config=LlamaConfig(**LLAMA),
        vision_config=CLIPVisionConfig(**VISION, patch_size=8),
        image_token_index=255,
    ),
}


def family(name):
    """A small model with biases that are no zeros and norms that are no ones; the same at every call."""
    torch.manual_seed(1)
    auto = AutoModelForImageTextToText if name == "llava" else AutoModelForCausalLM
    model = auto.from_config(FAMILIES[name]()).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.normal_(std=0.5)
    return model


@needs_kernels
@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_known_families_are_run_as_written_for_cpus_and_say_the_same(name):
    expected = [greedy_by_generate(family(name), prompt(n), 12) for n in (5, 40)]
    model = family(name)
    before = model(input_ids=torch.tensor([prompt(30)])).logits
    with Harness(model) as harness:
        assert isinstance(harness.runner.model, CpuLlama)
        assert [sink.tokens() for sink in harness.run(ask(prompt(5)), ask(prompt(40)))] == expected
    assert torch.allclose(model(input_ids=torch.tensor([prompt(30)])).logits, before, atol=1e-3, rtol=1e-4)


@needs_kernels
def test_memory_has_weights_once():
    """The fast path's products are those that transformers' model computes with."""
    model = tiny("llama")
    llama = runner_of(model).model
    assert isinstance(llama, CpuLlama)
    for layer, theirs in zip(llama.layers, model.model.layers, strict=True):
        parts = theirs.self_attn.q_proj, theirs.self_attn.k_proj, theirs.self_attn.v_proj
        assert fused_layer(parts) is layer.attention.qkv_proj
        assert theirs.mlp.down_proj is layer.mlp.down_proj
    assert model.lm_head is llama.lm_head
    assert not any(type(module) is torch.nn.Linear for module in model.modules())


def test_other_families_keep_their_layers():
    for name in ("gpt2", "opt"):
        model = tiny(name)
        assert isinstance(runner_of(model).model, TransformersModel)
        with pytest.raises(Unsuitable, match="of no family"):
            CpuLlama(model, None)


@needs_kernels
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda layer: setattr(layer.mlp, "act_fn", torch.nn.GELU()), "activation"),
        (lambda layer: setattr(layer, "input_layernorm", torch.nn.Identity()), "a norm is Identity"),
        (lambda layer: setattr(layer, "_hf_hook", object()), "of no family"),
        (lambda layer: layer.post_attention_layernorm.bfloat16(), "not in float32"),
    ],
)
def test_what_is_not_as_its_name_says_is_left_to_transformers(spoil, said):
    model = tiny("llama")
    spoil(model.model.layers[1])
    with pytest.raises(Unsuitable, match=said):
        CpuLlama(model, kernels())


@needs_kernels
def test_a_model_whose_code_is_another_than_its_names_say_loads_all_the_same(monkeypatch, caplog):
    """Code that comes with a checkpoint may call its layers as it likes."""
    monkeypatch.setattr(DecoderLayer, "__init__", lambda self, layer, *rest: layer.no_such_thing)
    assert isinstance(runner_of(tiny("llama")).model, TransformersModel)
    assert "no_such_thing" in caplog.text


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head", "embed_tokens"]}, {"use_dora": True}])
def test_adapters_change_the_text_of_whoever_asks_for_them(options, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=32, init_lora_weights=False, target_modules=["q_proj", "up_proj"], **options
    )
    adapted = peft.get_peft_model(tiny("llama"), config)
    adapted.save_pretrained(tmp_path)
    ids = torch.tensor([prompt(20)])
    expected = {"a": adapted.eval()(input_ids=ids).logits[0], "": tiny("llama")(input_ids=ids).logits[0]}
    model, adapters = load_adapters(tiny("llama"), {"a": tmp_path})
    with torch.inference_mode():
        runner = make_packed_runner(model.get_base_model(), adapters.activate)
        assert isinstance(runner.model, CpuLlama)
        for name in ("a", "", "a"):
            adapters.activate(name)
            logits = runner.model.forward(WholeStep([20]), ids[0], torch.arange(20), torch.arange(20))
            assert torch.allclose(logits, expected[name], atol=1e-3), name


@needs_kernels
def test_an_adapter_with_norms_of_its_own_is_left_to_transformers(tmp_path):
    """The fast path would compute with the base model's."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    model, adapters = load_adapters(tiny("llama"), {"a": tmp_path})
    with torch.inference_mode():
        runner = make_packed_runner(model.get_base_model(), adapters.activate)
    assert isinstance(runner.model, TransformersModel)


@needs_kernels
@pytest.mark.parametrize("make", [lambda: tiny("llama"), lambda: in_8_bits("llama"), lambda: in_16_bits()])
def test_a_step_that_wants_no_logits_gets_none(make):
    llama = CpuLlama(make(), kernels())
    with torch.inference_mode():
        rows = torch.zeros(0, dtype=torch.int64)
        assert llama.forward(WholeStep([3]), torch.arange(3), torch.arange(3), rows).shape == (0, VOCABULARY_SIZE)


def in_16_bits():
    """Weights that float16 holds."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, "hidden_size": 64})).eval().requires_grad_(False)
    model = model.half().float()
    replace_linears(model, fast_linear)
    return model


def test_without_kernels_the_engine_says_the_same(monkeypatch):
    monkeypatch.setattr(model_runner, "kernels", lambda: None)
    with Harness(tiny("llama")) as harness:
        sinks = harness.run(*(ask(prompt(n)) for n in (3, 50)))
    assert isinstance(harness.runner.model, TransformersModel)
    assert [s.tokens() for s in sinks] == [greedy_by_generate(tiny("llama"), prompt(n), 12) for n in (3, 50)]


def test_a_switch_leaves_the_kernels_out(monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    kernels.cache_clear()
    try:
        assert kernels() is None
    finally:
        monkeypatch.delenv(SWITCH)
        kernels.cache_clear()


@needs_kernels
def test_a_fast_path_that_is_wrong_is_noticed_and_dropped(monkeypatch, caplog):
    model = tiny("llama")
    expected = greedy_by_generate(model, prompt(20), 12)
    attend = Attention.attend
    monkeypatch.setattr(Attention, "attend", lambda self, qkv, step: attend(self, qkv, step) + 1)
    with Harness(model) as harness:
        assert isinstance(harness.runner.model, TransformersModel)
        assert harness.run(ask(prompt(20)))[0].tokens() == expected
    assert "does not suit this model" in caplog.text
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


@needs_kernels
def test_a_wrong_step_through_all_layers_is_noticed_and_dropped(monkeypatch):
    decode = DecodeKernel.__call__
    monkeypatch.setattr(DecodeKernel, "__call__", lambda self, x, *rest: -decode(self, x, *rest))
    assert isinstance(runner_of(in_8_bits("llama"), rounds_inputs=True).model, TransformersModel)


def in_8_bits(name):
    """A small model whose layers need no padding."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 128, "vocab_size": VOCABULARY_SIZE, "head_dim": 32, "initializer_range": 0.4}
    config = {
        "llama": lambda: LlamaConfig(**sizes),
        "llama_biased": lambda: LlamaConfig(**sizes, attention_bias=True, mlp_bias=True),
        "mistral_window": lambda: MistralConfig(**sizes, sliding_window=7),
        "qwen2": lambda: Qwen2Config(**sizes),
        "qwen3": lambda: Qwen3Config(**sizes),
    }[name]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases start as zeros, and norms as ones
            parameter.normal_(std=0.5)
    quantize_int8(model, kernels())
    return model


@needs_kernels
@pytest.mark.parametrize("name", ["llama", "llama_biased", "qwen2", "qwen3"])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_layer_in_8_bits_is_two_calls_that_give_what_its_parts_give(name, rows):
    llama = runner_of(in_8_bits(name), rounds_inputs=True).model
    assert all(layer.int8 is not None for layer in llama.layers)

    def logits():
        everything = torch.arange(rows)
        with torch.inference_mode():
            return llama.forward(WholeStep([rows]), everything, everything, everything)

    together = logits()
    for layer in llama.layers:
        layer.int8 = None
    apart = logits()
    # Not closer: where sums end in another last bit, an input may be rounded to another of its 8-bit levels.
    assert (together - apart).norm() < 0.005 * apart.norm()


@needs_kernels
@pytest.mark.parametrize("name", ["llama", "llama_biased", "mistral_window", "qwen3"])
def test_single_tokens_run_through_all_layers_in_one_call_and_say_the_same(name, monkeypatch):
    rows = []
    decode = DecodeKernel.__call__

    def counted(self, x, *rest):
        rows.append(len(x))
        return decode(self, x, *rest)

    def say():
        with Harness(in_8_bits(name), rounds_inputs=True) as harness:
            return [sink.tokens() for sink in harness.run(*(ask(prompt(n)) for n in (3, 20, 50)))]

    monkeypatch.setattr(DecodeKernel, "__call__", counted)
    together = say()
    assert max(rows) == 3
    assert len({tuple(tokens) for tokens in together}) == 3
    rows.clear()
    monkeypatch.setattr(PagedStep, "decode_kernels", None)
    assert say() == together
    assert not rows


@needs_kernels
def test_8_bit_layers_of_odd_sizes_are_computed_by_their_parts():
    """32 inputs fill half a group, and 120 or 200 outputs no whole number of panels."""
    sizes = {"num_key_value_heads": 1, "head_dim": 20, "intermediate_size": 100}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, **sizes})).eval().requires_grad_(False)
    quantize_int8(model, kernels())
    with Harness(model, rounds_inputs=True) as harness:
        assert isinstance(harness.runner.model, CpuLlama)
        assert all(layer.int8 is None for layer in harness.runner.model.layers)
        assert len(harness.run(ask(prompt(20)))[0].tokens()) == 12


def test_products_of_oneDNN_have_few_sizes_and_give_what_each_row_gives():
    """It keeps half a megabyte for each layer and number of rows that it has met; steps have any number."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 24)
    layer = OneDnnLinear(linear.weight.detach(), linear.bias)
    sizes = set()

    def multiply(x, *arguments):
        sizes.add(len(x))
        return torch.ops.mkldnn._linear_pointwise.default(x, *arguments)

    layer._multiply = multiply
    for rows in (*range(1, 70), 100, 255, 256, 257, 319):
        x = torch.randn(rows, 40)
        assert torch.allclose(layer(x), linear(x), atol=1e-5)
    assert layer(torch.randn(2, 5, 40)).shape == (2, 5, 24)
    assert len(sizes) < 24
    assert len({padded_rows(rows) for rows in range(1, 1025)}) == 27
    assert all(rows <= padded_rows(rows) < rows + max(8, rows / 2) for rows in range(1, 1025))


@needs_kernels
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (8, 8, 128), (4, 2, 24), (4, 1, 20)])
@pytest.mark.parametrize("window", [None, 7])
def test_native_attention_equals_torchs(heads, kv_heads, size, window):
    torch.manual_seed(0)
    keys, values = torch.randn(300, kv_heads, size), torch.randn(300, kv_heads, size)
    query = torch.randn(6, heads + 2, size)[:, :heads]
    contexts = torch.randint(300, (6, 90))
    lengths = torch.tensor([1, 90, 33, 7, 64, 8])
    step = step_over(keys, values, contexts, lengths)
    expected = attend_decode(query, keys, values, contexts, lengths, size**-0.5, window)
    assert torch.allclose(step.attend_decode(0, query, kv_heads, size**-0.5, window), expected, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 128), (6, 2, 20)])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("count", "total"), [(1, 1), (3, 3), (4, 90), (21, 21), (22, 133)])
def test_native_attention_of_a_chunk_equals_torchs(heads, kv_heads, size, window, count, total):
    torch.manual_seed(0)
    keys, values = torch.randn(300, kv_heads, size), torch.randn(300, kv_heads, size)
    query = torch.randn(count, heads + 2, size)[:, :heads]
    context = torch.randperm(300)[:total]
    out = torch.full((count, heads, size), float("nan"))
    step = step_over(keys, values, torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    step.attend_chunk(out, 0, query, context, kv_heads, size**-0.5, window)
    expected = attend_chunk(query, keys[context], values[context], size**-0.5, window)
    assert torch.allclose(out, expected, atol=1e-5)


@needs_kernels
def test_a_kernel_without_memory_says_so():
    contexts = torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**57)
    x = torch.zeros(1, 1, 8)
    with pytest.raises(MemoryError, match="no memory for attention scores"):
        step_over(x, x, contexts, torch.tensor([1])).attend_decode(0, x, 1, 1.0, None)


@needs_kernels
def test_native_attention_survives_huge_scores():
    keys = torch.full((4, 1, 8), 1e3)
    keys[2] = -1e3
    values = torch.arange(32.0).view(4, 1, 8)
    query = torch.full((1, 1, 8), 1e3)
    step = step_over(keys, values, torch.tensor([[0, 1, 2, 3]]), torch.tensor([3]))
    assert torch.allclose(step.attend_decode(0, query, 1, 1.0, None)[0, 0], values[:2].mean(0)[0])


@needs_kernels
def test_new_keys_and_values_go_to_their_slots():
    torch.manual_seed(0)
    keys, values = torch.zeros(9, 2, 8), torch.zeros(9, 2, 6)
    key, value = torch.randn(3, 5, 8)[:, 2:4], torch.randn(3, 2, 6)
    slots = torch.tensor([7, 0, 4])
    kernels().step(Pools([keys], [values]), slots, slots[None], slots[:1]).store(0, key, value)
    assert torch.equal(keys[slots], key)
    assert torch.equal(values[slots], value)
    assert keys.count_nonzero() == key.numel()


@needs_kernels
@pytest.mark.parametrize("normed", [False, True])
def test_native_norm_activation_and_rotation_equal_torchs(normed):
    torch.manual_seed(0)
    k = kernels()
    x, weight = torch.randn(7, 33) * 5, torch.randn(33)
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
    assert torch.allclose(k.rms_norm(x, weight, 1e-5), expected, atol=1e-5)
    gate_up = torch.randn(7, 66) * 30
    expected = torch.nn.functional.silu(gate_up[:, :33]) * gate_up[:, 33:]
    assert torch.allclose(k.silu_and_multiply(gate_up), expected, atol=1e-4, rtol=1e-5)
    qkv, angles = torch.randn(7, 3 + 2 * 2, 16), torch.randn(7, 8)  # three query heads, two of keys, two of values
    cosine, sine = (torch.cat((f(angles), f(angles)), dim=-1) for f in (torch.cos, torch.sin))
    norms = [torch.randn(16), torch.randn(16)] if normed else [None, None]
    expected = qkv.clone()
    for part, norm in ((slice(0, 3), norms[0]), (slice(3, 5), norms[1])):
        heads = expected[:, part]
        if norm is not None:
            heads = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + 1e-6) * norm
        turned = torch.cat((-heads[..., 8:], heads[..., :8]), dim=-1)
        expected[:, part] = heads * cosine[:, None] + turned * sine[:, None]
    k.norm_and_rotate(qkv, Qkv(3, 2, *norms, 1e-6), Rotary(cosine, sine))
    assert torch.allclose(qkv, expected, atol=1e-5)
