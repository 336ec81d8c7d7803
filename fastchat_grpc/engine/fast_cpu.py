"""Llama-shaped decoder layers on the CPU with few, large operations.

At a few rows per step, a layer of transformers costs as much in Python and small operations as in its
products. Layers of the families below are all the same computation, so here it is written once, over the
packed row of a step: fused products with weights laid out for the machine (oneDNN), and the kernels of
native/kernels.c between them; with 8-bit weights, what stands around attention is two calls (native/int8.c), and
a step of single tokens is one call for all layers (native/decode.c).
Outside a packed step a layer runs as transformers wrote it. Whoever speeds a model up checks its outputs
against those from before, and can undo it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastchat_grpc.engine.attention import current_step
from fastchat_grpc.models.cpu_linear import OneDnnLinear
from fastchat_grpc.models.quantization import Int8Linear
from fastchat_grpc.native.kernels import DecodeKernel, Int8Layer, Kernels, LayerKernels, Qkv, Rotary

log = logging.getLogger(__name__)

FAMILIES = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}

Linear = Callable[[torch.Tensor], torch.Tensor]
Undo = Callable[[], None]


class Slice(torch.nn.Module):
    """Some outputs of a fused layer, for code that wants one of its parts."""

    def __init__(self, whole: Linear, begin: int, end: int) -> None:
        super().__init__()
        self._whole = [whole]  # in a list: not a submodule once more
        self._begin, self._end = begin, end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._whole[0](x)[..., self._begin : self._end]


def speed_up(model: Any, kernels: Kernels) -> Undo | None:
    """Speed up the layers of a float32 model on the CPU. Returns how to undo it, or None where nothing was done."""
    layers = [m for m in model.modules() if type(m).__name__ in FAMILIES and _suits(m)]
    if not layers or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    done: list[Undo] = []
    for layer in layers:
        done.append(_speed_up_layer(layer, kernels))
    if len(layers) == model.config.get_text_config().num_hidden_layers:
        _decode_together([layer.forward for layer in layers], kernels)
    head = model.get_output_embeddings()
    if _weights(head) is not None:
        model.set_output_embeddings(fuse([head]))
        done.append(lambda: model.set_output_embeddings(head))

    def undo() -> None:
        for step in reversed(done):
            step()

    log.info("%d layers run on the fast path for CPUs", len(layers))
    return undo


class FastLayer:
    """The forward of one decoder layer."""

    def __init__(self, layer: Any, kernels: Kernels) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._kernels = kernels
        self._ordinary = layer.forward
        self._index: int = attention.layer_idx
        self._size: int = attention.head_dim
        self._scale: float = attention.scaling
        window: int | None = getattr(attention, "sliding_window", None)
        if type(attention).__name__ == "MistralAttention":
            window = attention.config.sliding_window
        self._window = window
        self._heads: int = attention.config.num_attention_heads
        self._kv_heads: int = attention.config.num_key_value_heads
        self._norms = [(n.weight, n.variance_epsilon) for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        head_norms = [n for n in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)) if n]
        query_norm, key_norm = (norm.weight for norm in head_norms) if head_norms else (None, None)
        epsilon = head_norms[0].variance_epsilon if head_norms else self._norms[0][1]
        self._shape = Qkv(self._heads, self._kv_heads, query_norm, key_norm, epsilon)
        self._qkv = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        self._o = fuse([attention.o_proj])
        self._gate_up = fuse([mlp.gate_proj, mlp.up_proj])
        self._down = fuse([mlp.down_proj])
        self._whole = self._in_8_bits()
        self.decoder: DecodeKernel | None = None
        """All layers of the model, for steps of single tokens."""

    @property
    def sliding_window(self) -> int | None:
        """Latest tokens that each one attends to, itself included; None: all."""
        return self._window

    @sliding_window.setter
    def sliding_window(self, window: int | None) -> None:
        self._window = window
        if self._whole is not None:
            self._whole.struct.window = window or 0

    def _in_8_bits(self) -> LayerKernels | None:
        """What stands around attention as two calls, where all weights have 8 bits."""
        parts = [self._qkv, self._o, self._gate_up, self._down]
        weights = [part.exact for part in parts if isinstance(part, Int8Linear)]
        known = [w for w in weights if w is not None]
        epsilons = {epsilon for _, epsilon in self._norms} | {self._shape.epsilon}
        if len(known) < len(parts) or len(epsilons) > 1:
            return None
        qkv, o, gate_up, down = known
        layer = Int8Layer(
            size=self._size,
            window=self._window,
            epsilon=epsilons.pop(),
            scale=self._scale,
            attention_norm=self._norms[0][0],
            mlp_norm=self._norms[1][0],
            heads=self._shape,
            qkv=qkv,
            o=o,
            gate_up=gate_up,
            down=down,
        )
        return self._kernels.layer(layer)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = current_step()
        if step is None:
            out: torch.Tensor = self._ordinary(hidden_states, *args, **kwargs)
            return out
        kernels, x = self._kernels, hidden_states[0]
        rotary = Rotary(*(part[0] for part in kwargs["position_embeddings"]))
        if self.decoder is not None and step.decode_kernels is not None:
            # The first layer computes all of them, and the others hand it on.
            return hidden_states if self._index > 0 else self.decoder(x, rotary, step.decode_kernels)[None]
        if self._whole is not None:
            qkv = self._whole.before_attention(x, rotary)
            return self._whole.after_attention(x, self._attend(step, qkv))[None]
        weight, epsilon = self._norms[0]
        qkv = self._qkv(kernels.rms_norm(x, weight, epsilon)).contiguous()
        kernels.norm_and_rotate(qkv, self._shape, rotary)
        x = x + self._o(self._attend(step, qkv))
        weight, epsilon = self._norms[1]
        gate_up = self._gate_up(kernels.rms_norm(x, weight, epsilon)).contiguous()
        x += self._down(kernels.silu_and_multiply(gate_up))
        return x[None]

    def _attend(self, step: Any, qkv: torch.Tensor) -> torch.Tensor:
        """Attention's output (n, heads * size)."""
        heads, kv_heads = self._heads, self._kv_heads
        qkv = qkv.view(len(qkv), heads + 2 * kv_heads, self._size)
        query, key, value = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        out: torch.Tensor = step.attend(self._index, query, key, value, self._scale, self._window)
        return out.view(len(out), -1)


def fuse(linears: Sequence[Any]) -> Linear:
    """Linear layers of one input as one: their outputs side by side."""
    known = [weights for weights in map(_weights, linears) if weights is not None]
    if len(known) == len(linears):
        return OneDnnLinear(torch.cat([weight.detach() for weight, _ in known]), _join(*zip(*known, strict=True)))
    whole: Linear | None = _whole(linears)
    if whole is not None:
        return whole
    return lambda x: torch.cat([linear(x) for linear in linears], dim=-1)


def _whole(linears: Sequence[Any]) -> Any:
    """The one layer that computes all of them, where the loader (models.cpu_linear) has made one, else None."""
    if len(linears) == 1 and not hasattr(linears[0], "fused"):
        return linears[0]
    fused = [getattr(linear, "fused", None) for linear in linears]
    return fused[0].layer if fused[0] is not None and all(f is fused[0] for f in fused) else None


def _join(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    if all(bias is None for bias in biases):
        return None
    return torch.cat([torch.zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)])


def _weights(linear: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight (out, in) and bias of a layer that keeps them in float32, else None."""
    plain = type(linear) is torch.nn.Linear and linear.weight.dtype == torch.float32
    return (linear.weight, linear.bias) if plain else None


def _suits(layer: Any) -> bool:
    """Whether a layer is computed as FastLayer does. (That it is a known family says the rest.)"""
    attention, mlp = layer.self_attn, layer.mlp
    weight = layer.input_layernorm.weight
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and not hasattr(layer, "_hf_hook")
        and attention.config.num_attention_heads % attention.config.num_key_value_heads == 0
    )


def _decode_together(layers: Sequence[FastLayer], kernels: Kernels) -> None:
    """Let steps of single tokens run through all layers, given in order, in one call, where all are in 8 bits."""
    wholes = [layer._whole for layer in layers if layer._whole is not None]
    if len(wholes) == len(layers) and [layer._index for layer in layers] == list(range(len(layers))):
        decoder = kernels.decoder(wholes)
        for layer in layers:
            layer.decoder = decoder


def _speed_up_layer(layer: Any, kernels: Kernels) -> Undo:
    """Give a layer its fast forward; fused weights replace the originals, which share their storage no more."""
    fast = FastLayer(layer, kernels)
    kept: list[tuple[Any, str, Any]] = []
    for owner, names, whole in (
        (layer.self_attn, ("q_proj", "k_proj", "v_proj"), fast._qkv),
        (layer.self_attn, ("o_proj",), fast._o),
        (layer.mlp, ("gate_proj", "up_proj"), fast._gate_up),
        (layer.mlp, ("down_proj",), fast._down),
    ):
        if any(_weights(getattr(owner, name)) is None for name in names):
            continue  # the loader's layers stay: they compute as well outside a step
        begin = 0
        for name in names:
            linear = getattr(owner, name)
            kept.append((owner, name, linear))
            setattr(owner, name, Slice(whole, begin, begin + linear.out_features))
            begin += linear.out_features
    layer.forward = fast

    def undo() -> None:
        del layer.forward
        for owner, name, linear in kept:
            setattr(owner, name, linear)

    return undo
