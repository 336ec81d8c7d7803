"""The fast path for CPUs computes what transformers computes; kernels do what torch does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from fastchat_grpc.engine import model_runner
from fastchat_grpc.engine.attention import PagedStep, WholeStep, attend_chunk, attend_decode, running
from fastchat_grpc.engine.fast_cpu import FastLayer, fuse, speed_up
from fastchat_grpc.engine.model_runner import make_packed_runner
from fastchat_grpc.models.cpu_linear import OneDnnLinear, padded_rows
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


@needs_kernels
@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen3"])
def test_layers_of_known_families_are_sped_up_and_outputs_stay(name):
    model = tiny(name)
    ids = torch.tensor([prompt(30)])
    before = model(input_ids=ids).logits
    runner_of(model)
    assert all(isinstance(layer.forward, FastLayer) for layer in model.model.layers)
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-4)
    with Harness(model) as harness:
        assert harness.run(ask(prompt(40)))[0].tokens() == greedy_by_generate(tiny(name), prompt(40), 12)


def test_other_families_keep_their_layers():
    model = tiny("gpt2")
    assert runner_of(model) is not None
    assert speed_up(model, None) is None


def test_without_kernels_the_engine_says_the_same(monkeypatch):
    monkeypatch.setattr(model_runner, "kernels", lambda: None)
    model = tiny("llama")
    with Harness(model) as harness:
        sinks = harness.run(*(ask(prompt(n)) for n in (3, 50)))
    assert not isinstance(model.model.layers[0].forward, FastLayer)
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
def test_a_fast_path_that_is_wrong_is_noticed_and_undone(monkeypatch):
    model = tiny("llama")
    expected = greedy_by_generate(model, prompt(20), 12)
    attend = FastLayer._attend
    monkeypatch.setattr(FastLayer, "_attend", lambda self, step, qkv: attend(self, step, qkv) + 1)
    runner_of(model)
    assert not isinstance(model.model.layers[0].forward, FastLayer)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    with Harness(model) as harness:
        assert harness.run(ask(prompt(20)))[0].tokens() == expected


@needs_kernels
def test_a_wrong_step_through_all_layers_is_noticed_and_undone(monkeypatch):
    decode = DecodeKernel.__call__
    monkeypatch.setattr(DecodeKernel, "__call__", lambda self, x, *rest: -decode(self, x, *rest))
    model = in_8_bits("llama")
    runner_of(model)
    assert not isinstance(model.model.layers[0].forward, FastLayer)


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
    model = in_8_bits(name)
    runner_of(model)
    layers = [layer.forward for layer in model.model.layers]
    assert all(isinstance(layer, FastLayer) and layer._whole is not None for layer in layers)

    def logits():
        step = WholeStep([rows])
        with torch.inference_mode(), running(step):
            return model(input_ids=torch.arange(rows)[None], use_cache=False).logits

    together = logits()
    for layer in layers:
        layer._whole = None
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
        with Harness(in_8_bits(name)) as harness:
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
    runner_of(model)
    assert all(isinstance(layer.forward, FastLayer) and layer.forward._whole is None for layer in model.model.layers)
    with Harness(model) as harness:
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


def test_fused_layers_are_their_parts_side_by_side():
    torch.manual_seed(0)
    linears = [torch.nn.Linear(40, n, bias=bias) for n, bias in ((24, True), (8, False), (16, True))]
    x = torch.randn(5, 40)
    whole = fuse(linears)
    assert isinstance(whole, OneDnnLinear)  # random weights need all 32 bits
    assert torch.allclose(whole(x), torch.cat([linear(x) for linear in linears], dim=-1), atol=1e-5)
    mixed = fuse([linears[0], torch.nn.Sequential(linears[1])])
    assert torch.allclose(mixed(x), torch.cat([linear(x) for linear in linears[:2]], dim=-1), atol=1e-6)


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
