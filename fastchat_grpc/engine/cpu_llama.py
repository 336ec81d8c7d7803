"""A Llama-shaped model on the CPU, written for steps: embedding, layers, norm, head.

At a few rows per step, a layer of transformers costs as much in Python and small operations as in its products. The
families below are all the same computation, so here it is written once, over the packed rows of a step: fused
products, and the kernels of native/kernels.c between them. With 8-bit weights what stands around attention is two
calls, and a step that only decodes is one call for all layers.

It is built of a loaded transformers model and shares its weights. That model stays as it is, and computes whatever is
no step. Whoever uses this one has compared its outputs with the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastchat_grpc.engine.attention import Step
from fastchat_grpc.models.cpu_linear import OneDnnLinear, fused_layer, plain_linear, share
from fastchat_grpc.models.quantization import Int8Linear
from fastchat_grpc.native.kernels import DecodeKernel, Int8Layer, Int8Weights, Kernels, Qkv, Rotary

FAMILIES = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})

Linear = Callable[[torch.Tensor], torch.Tensor]


class Unsuitable(Exception):
    """The model is not Llama-shaped, or not one for this module."""


class CpuLlama:
    """The model. Owned by the thread that runs it."""

    def __init__(self, model: Any, kernels: Kernels) -> None:
        """Of a float32 model on the CPU. Raises Unsuitable."""
        decoder = _decoder(model)
        weights = _Weights()
        self.embed_tokens = model.get_input_embeddings()
        self.rotary_emb = decoder.rotary_emb
        self.layers = [DecoderLayer(layer, weights, kernels) for layer in decoder.layers]
        self.norm = RmsNorm(decoder.norm, kernels)
        self.lm_head = weights.of([model.get_output_embeddings()], model.set_output_embeddings)
        self.decode = _decode_kernel(self.layers, kernels)
        self._weights = weights
        self._check_rotary()

    def forward(self, step: Step, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """See StepModel."""
        return self.lm_head(self.norm(self._layers(step, input_ids, positions)[rows]))

    def hidden_states(self, step: Step, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See StepModel."""
        return self.norm(self._layers(step, input_ids, positions))

    def _layers(self, step: Step, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embed_tokens(input_ids)
        rotary = self._rotary(x, positions)
        if self.decode is not None and step.decode_kernels is not None:
            return self.decode(x, rotary, step.decode_kernels)
        for layer in self.layers:
            x = layer(x, rotary, step)
        return x

    def share_weights(self) -> None:
        """Let the transformers model compute with what this one has laid out anew, so that memory has it once."""
        self._weights.share()

    def _rotary(self, x: torch.Tensor, positions: torch.Tensor) -> Rotary:
        cosine, sine = self.rotary_emb(x, positions[None])
        return Rotary(cosine[0], sine[0])

    def _check_rotary(self) -> None:
        rotary = self._rotary(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
        if any(layer.attention.size != rotary.struct.size for layer in self.layers):
            raise Unsuitable("only a part of each head is rotated")


class DecoderLayer:
    """One layer over a step."""

    def __init__(self, layer: Any, weights: _Weights, kernels: Kernels) -> None:
        """Of a transformers layer of one of the families. Raises Unsuitable."""
        self.input_layernorm = RmsNorm(layer.input_layernorm, kernels)
        self.attention = Attention(layer.self_attn, weights, kernels)
        self.post_attention_layernorm = RmsNorm(layer.post_attention_layernorm, kernels)
        self.mlp = Mlp(layer.mlp, weights, kernels)
        int8 = self._in_8_bits()
        self.int8 = None if int8 is None else kernels.layer(int8)
        """All before attention in one call and all after it in another, where all weights have 8 bits."""

    def __call__(self, x: torch.Tensor, rotary: Rotary, step: Step) -> torch.Tensor:
        """(n, hidden) to (n, hidden)."""
        if self.int8 is not None:
            return self.int8.after_attention(x, self.attention.attend(self.int8.before_attention(x, rotary), step))
        x = x + self.attention(self.input_layernorm(x), rotary, step)
        x += self.mlp(self.post_attention_layernorm(x))
        return x

    @property
    def sliding_window(self) -> int | None:
        """Latest tokens that each one attends to, itself included; None: all."""
        return self.attention.sliding_window

    @sliding_window.setter
    def sliding_window(self, window: int | None) -> None:
        self.attention.sliding_window = window
        if self.int8 is not None:
            self.int8.struct.window = window or 0

    def _in_8_bits(self) -> Int8Layer | None:
        attention, norms = self.attention, (self.input_layernorm, self.post_attention_layernorm)
        products = map(_int8_weights, (attention.qkv_proj, attention.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj))
        weights = [product for product in products if product is not None]
        if len(weights) < 4 or {norm.epsilon for norm in norms} != {attention.heads.epsilon}:
            return None
        qkv, o, gate_up, down = weights
        return Int8Layer(
            size=attention.size,
            window=attention.sliding_window,
            epsilon=attention.heads.epsilon,
            scale=attention.scale,
            attention_norm=norms[0].weight,
            mlp_norm=norms[1].weight,
            heads=attention.heads,
            qkv=qkv,
            o=o,
            gate_up=gate_up,
            down=down,
        )


class Attention:
    """Self-attention of one layer: projections, norms and rotation of heads, and the step's attention."""

    def __init__(self, attention: Any, weights: _Weights, kernels: Kernels) -> None:
        config = attention.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if heads % kv_heads:
            raise Unsuitable("query heads share key heads unevenly")
        self.layer_idx: int = attention.layer_idx
        self.size: int = attention.head_dim
        self.scale: float = attention.scaling
        self.sliding_window: int | None = getattr(attention, "sliding_window", None)
        if type(attention).__name__ == "MistralAttention":  # it looks into its configuration at each call
            self.sliding_window = config.sliding_window
        self.heads = _heads(attention, heads, kv_heads)
        self.qkv_proj = weights.take(attention, "q_proj", "k_proj", "v_proj")
        self.o_proj = weights.take(attention, "o_proj")
        self._split = [heads, kv_heads, kv_heads]
        self._kernels = kernels

    def __call__(self, x: torch.Tensor, rotary: Rotary, step: Step) -> torch.Tensor:
        qkv = self.qkv_proj(x).contiguous()
        self._kernels.norm_and_rotate(qkv, self.heads, rotary)
        return self.o_proj(self.attend(qkv, step))

    def attend(self, qkv: torch.Tensor, step: Step) -> torch.Tensor:
        """(n, heads * size) of queries, keys and values side by side (n, (heads + 2 * kv_heads) * size)."""
        query, key, value = torch.split(qkv.view(len(qkv), -1, self.size), self._split, dim=1)
        out = step.attend(self.layer_idx, query, key, value, self.scale, self.sliding_window)
        return out.view(len(qkv), -1)


class Mlp:
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, mlp: Any, weights: _Weights, kernels: Kernels) -> None:
        if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            raise Unsuitable(f"its activation is {type(mlp.act_fn).__name__}")
        self.gate_up_proj = weights.take(mlp, "gate_proj", "up_proj")
        self.down_proj = weights.take(mlp, "down_proj")
        self._kernels = kernels

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self._kernels.silu_and_multiply(self.gate_up_proj(x).contiguous()))


class RmsNorm:
    """x / sqrt(mean(x^2) + epsilon) * weight"""

    def __init__(self, norm: Any, kernels: Kernels) -> None:
        self.weight, self.epsilon = _norm(norm)
        self._kernels = kernels

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.rms_norm(x, self.weight, self.epsilon)


class _Weights:
    """Takes a model's products, and remembers those that it has laid out anew."""

    def __init__(self) -> None:
        self._anew: list[Callable[[], None]] = []

    def take(self, owner: Any, *names: str) -> Linear:
        """Linear layers of one input as one: their outputs side by side."""
        return self.of([getattr(owner, name) for name in names], lambda layer: share(owner, names, layer))

    def of(self, linears: Sequence[Any], replace: Callable[[OneDnnLinear], None]) -> Linear:
        """The same of any layers. `replace`: how another layer takes their place."""
        plain = [weights for weights in map(plain_linear, linears) if weights is not None]
        if len(plain) == len(linears) and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            layer = OneDnnLinear(torch.cat([weight for weight, _ in plain]), _side_by_side(plain))
            self._anew.append(lambda: replace(layer))
            return layer
        fused: Linear | None = fused_layer(linears)
        if fused is not None:
            return fused
        return lambda x: torch.cat([linear(x) for linear in linears], dim=-1)

    def share(self) -> None:
        """See CpuLlama.share_weights."""
        for replace in self._anew:
            replace()
        self._anew.clear()


def _decoder(model: Any) -> Any:
    """The part of a model that has embedding, layers, norm and rotary embedding. Raises Unsuitable."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, torch.nn.ModuleList) and len(layers) and all(map(_is_of_a_family, layers)):
            return module
    raise Unsuitable("its layers are of no family that is written here")


def _is_of_a_family(layer: Any) -> bool:
    return type(layer).__name__ in FAMILIES and not hasattr(layer, "_hf_hook")


def _heads(attention: Any, heads: int, kv_heads: int) -> Qkv:
    norms = [norm for norm in (getattr(attention, name, None) for name in ("q_norm", "k_norm")) if norm is not None]
    if not norms:
        return Qkv(heads, kv_heads, epsilon=attention.config.rms_norm_eps)
    (query_norm, epsilon), (key_norm, other) = map(_norm, norms)
    if epsilon != other:
        raise Unsuitable("norms of queries and keys differ")
    return Qkv(heads, kv_heads, query_norm, key_norm, epsilon)


def _norm(norm: Any) -> tuple[torch.Tensor, float]:
    """Weight and epsilon. An adapter that brings a norm of its own wraps it, and the weight depends on the request."""
    if not type(norm).__name__.endswith("RMSNorm"):
        raise Unsuitable(f"a norm is {type(norm).__name__}")
    if norm.weight.dtype != torch.float32 or norm.weight.device.type != "cpu":
        raise Unsuitable("it is not in float32 on the CPU")
    return norm.weight, norm.variance_epsilon


def _int8_weights(product: object) -> Int8Weights | None:
    return product.exact if isinstance(product, Int8Linear) else None


def _decode_kernel(layers: Sequence[DecoderLayer], kernels: Kernels) -> DecodeKernel | None:
    """All layers in one call, for steps that only decode, where all are in 8 bits."""
    int8 = [layer.int8 for layer in layers if layer.int8 is not None]
    in_order = [layer.attention.layer_idx for layer in layers] == list(range(len(layers)))
    return kernels.decoder(int8) if len(int8) == len(layers) and in_order else None


def _side_by_side(layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor | None:
    """Their biases, zeros where one has none; None where none has any."""
    if all(bias is None for _, bias in layers):
        return None
    return torch.cat([torch.zeros(len(weight)) if bias is None else bias for weight, bias in layers])
