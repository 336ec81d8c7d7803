"""The C kernels of this folder, compiled on first use. Where that is not possible torch does the same, slower.

Tensors are float32 on the CPU with a contiguous last dimension. What is the same for a whole step or for a whole
model is told C once, as a struct; whoever holds the struct holds the tensors that it points into.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastchat_grpc.native import structs
from fastchat_grpc.native.library import CannotCompile, find_compiler, load_library

log = logging.getLogger(__name__)

SWITCH = "FASTCHAT_GRPC_NATIVE"
"""Environment variable; 0 leaves the kernels out."""

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "store": [_POINTER] * 3,
    "attend_decode": [_POINTER] * 5,
    "attend_chunk": [_POINTER] * 5,
    "rms_norm": [*[_POINTER] * 3, *[_INT] * 2, _FLOAT],
    "silu_and_multiply": [*[_POINTER] * 2, *[_INT] * 2],
    "norm_and_rotate": [_POINTER] * 3,
    "int8_bytes": [_INT] * 2,
    "pack_int8": [*[_POINTER] * 2, *[_INT] * 2],
    "multiply_int8": [*[_POINTER] * 2, *[_INT] * 2, _POINTER],
    "before_attention": [_POINTER] * 4,
    "after_attention": [*[_POINTER] * 4, _INT],
    "decode_layers": [_POINTER] * 4,
    "layout": [_POINTER],
    "is_parallel": [],
    "weight_bits": [],
}
_MEMORY_FOR = dict.fromkeys(("attend_decode", "attend_chunk"), "attention scores") | dict.fromkeys(
    ("multiply_int8", "before_attention", "after_attention", "decode_layers"), "a layer's rows"
)
"""What each kernel that allocates needs memory for; it returns 1 where there is none."""
INT8_INPUTS, INT8_OUTPUTS = 64, 32
"""An 8-bit layer has a multiple of these."""


class Rotary:
    """What all layers rotate a step's queries and keys by: cosine and sine (n, size), in Hugging Face's layout."""

    def __init__(self, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        self._kept = cosine, sine = cosine.contiguous(), sine.contiguous()
        self.count = len(cosine)
        self.struct = structs.Rotary(cosine.data_ptr(), sine.data_ptr(), *cosine.shape)
        self.reference = ctypes.byref(self.struct)


@dataclass(frozen=True, slots=True)
class Qkv:
    """The heads in a row of queries, keys and values, and the norms of queries and keys, where there are any."""

    heads: int
    kv_heads: int
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    epsilon: float = 0.0
    struct: structs.Qkv = field(init=False)

    def __post_init__(self) -> None:
        norms = _pointer(self.query_norm), _pointer(self.key_norm)
        object.__setattr__(self, "struct", structs.Qkv(self.heads, self.kv_heads, *norms, self.epsilon))


@dataclass(frozen=True, slots=True)
class Int8Weights:
    """A linear layer in 8 bits: weights as `Kernels.pack_int8` makes them, bias (outputs,)."""

    packed: torch.Tensor
    outputs: int
    inputs: int
    bias: torch.Tensor | None = None
    struct: structs.Product = field(init=False)

    def __post_init__(self) -> None:
        product = structs.Product(self.packed.data_ptr(), _pointer(self.bias), self.outputs, self.inputs)
        object.__setattr__(self, "struct", product)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Layer:
    """A Llama-shaped decoder layer with 8-bit weights. Norms are float32 vectors, scale and window are attention's."""

    size: int
    window: int | None
    epsilon: float
    scale: float
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    heads: Qkv
    qkv: Int8Weights
    o: Int8Weights
    gate_up: Int8Weights
    down: Int8Weights


class LayerKernels:
    """What stands around attention in one layer, each part in one call with one team of threads."""

    def __init__(self, library: ctypes.CDLL, layer: Int8Layer) -> None:
        self._before, self._after = library.before_attention, library.after_attention
        self._kept = layer
        self._width = layer.qkv.outputs
        products = {name: getattr(layer, name).struct for name in ("qkv", "o", "gate_up", "down")}
        self.struct = structs.Layer(
            hidden=len(layer.attention_norm),
            inner=layer.down.inputs,
            size=layer.size,
            window=layer.window or 0,
            epsilon=layer.epsilon,
            scale=layer.scale,
            attention_norm=layer.attention_norm.data_ptr(),
            mlp_norm=layer.mlp_norm.data_ptr(),
            heads=layer.heads.struct,
            **products,
        )
        self._layer = ctypes.byref(self.struct)

    def before_attention(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """Queries, keys and values (n, (heads + 2 * kv_heads) * size), rotated, of x (n, hidden), contiguous."""
        out = torch.empty(len(x), self._width)
        self._before(self._layer, out.data_ptr(), x.data_ptr(), rotary.reference)
        return out

    def after_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output (n, hidden), of its input x and attention's output (n, heads * size), both contiguous."""
        out = torch.empty_like(x)
        self._after(self._layer, out.data_ptr(), x.data_ptr(), attended.data_ptr(), len(x))
        return out


class Pools:
    """The pools of all layers, as lists of (slots, kv_heads, size)."""

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        self._kept = keys, values
        pools = [structs.Pool(k.data_ptr(), v.data_ptr()) for k, v in zip(keys, values, strict=True)]
        self.array = (structs.Pool * len(pools))(*pools)
        self.value_sizes = [v.shape[2] for v in values]
        self.references = [ctypes.byref(self.array[i]) for i in range(len(pools))]


class StepKernels:
    """The kernels over one step: its pools, and the slots of its tokens."""

    def __init__(
        self,
        library: ctypes.CDLL,
        pools: Pools,
        slot_mapping: torch.Tensor,
        contexts: torch.Tensor,
        lengths: torch.Tensor,
    ) -> None:
        """See `Kernels.step`."""
        self._library = library
        self._kept = slot_mapping, contexts, lengths
        self.pools = pools
        self._slots = slot_mapping.data_ptr()
        pointers = self._slots, contexts.data_ptr(), lengths.data_ptr()
        self.decode = structs.Decode(*pointers, *contexts.shape)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put keys and values (n, kv_heads, size) of the step's tokens into their slots."""
        count, kv_heads, size = key.shape
        strides = key.stride(0), value.stride(0)
        tokens = structs.NewTokens(key.data_ptr(), value.data_ptr(), self._slots, count, *strides)
        heads = _heads(kv_heads, 0, size, value.shape[2], 0, 1.0, None)
        self._library.store(self.pools.references[layer], ctypes.byref(tokens), heads)

    def attend_decode(
        self, layer: int, query: torch.Tensor, kv_heads: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """As `attention.attend_decode`, for the step's single tokens."""
        count, heads, size = query.shape
        value_size = self.pools.value_sizes[layer]
        out = torch.empty(count, heads, value_size)
        shape = _heads(kv_heads, heads // kv_heads, size, value_size, query.stride(0), scale, window)
        pool, decode = self.pools.references[layer], ctypes.byref(self.decode)
        self._library.attend_decode(out.data_ptr(), query.data_ptr(), pool, decode, shape)
        return out

    def attend_chunk(
        self,
        out: torch.Tensor,
        layer: int,
        query: torch.Tensor,
        context: torch.Tensor,
        kv_heads: int,
        scale: float,
        window: int | None,
    ) -> None:
        """As `attention.attend_chunk` to `out`, contiguous, over keys and values in the slots of `context`."""
        count, heads, size = query.shape
        value_size = self.pools.value_sizes[layer]
        shape = _heads(kv_heads, heads // kv_heads, size, value_size, query.stride(0), scale, window)
        chunk = ctypes.byref(structs.Chunk(context.data_ptr(), count, len(context)))
        self._library.attend_chunk(out.data_ptr(), query.data_ptr(), self.pools.references[layer], chunk, shape)


class DecodeKernel:
    """Successive layers for steps of single tokens, in one call."""

    def __init__(self, library: ctypes.CDLL, layers: Sequence[LayerKernels]) -> None:
        self._decode = library.decode_layers
        self._kept = layers
        self._layers = (_POINTER * len(layers))(*(ctypes.addressof(layer.struct) for layer in layers))

    def __call__(self, x: torch.Tensor, rotary: Rotary, step: StepKernels) -> torch.Tensor:
        """The last layer's output (n, hidden) of the first one's input x; keys and values are stored on the way."""
        x = x.clone(memory_format=torch.contiguous_format)
        stack = structs.Stack(ctypes.addressof(self._layers), ctypes.addressof(step.pools.array), len(self._kept))
        self._decode(ctypes.byref(stack), x.data_ptr(), ctypes.byref(step.decode), rotary.reference)
        return x


class Kernels:
    """The compiled kernels."""

    def __init__(self, path: Path) -> None:
        """Load the library. Raises OSError or AttributeError where it is not the one that this file describes."""
        library = ctypes.CDLL(str(path))
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = signature, None
            if name in _MEMORY_FOR:
                function.restype, function.errcheck = ctypes.c_int, _raise_without_memory
        library.int8_bytes.restype = _INT
        library.is_parallel.restype = library.weight_bits.restype = ctypes.c_int
        structs.compare_layout(library)
        self.parallel = bool(library.is_parallel())
        """Whether they use several threads: not so by a compiler without OpenMP."""
        self.weight_bits: int = library.weight_bits()
        """Bits of a weight of an 8-bit layer, by what this processor multiplies fast."""
        self._library = library

    def step(
        self, pools: Pools, slot_mapping: torch.Tensor, contexts: torch.Tensor, lengths: torch.Tensor
    ) -> StepKernels:
        """The kernels for one step.

        Args:
            slot_mapping: (n,) where keys and values of the step's tokens go, those of single tokens first.
            contexts: (single tokens, longest) slots of each one's context, itself last; then any slots.
            lengths: (single tokens,) of the contexts.
        """
        return StepKernels(self._library, pools, slot_mapping, contexts, lengths)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension."""
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._library.rms_norm(out.data_ptr(), x.data_ptr(), weight.data_ptr(), x.numel() // size, size, epsilon)
        return out

    def silu_and_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up (n, size), of both side by side (n, 2 * size), contiguous."""
        n, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(n, size)
        self._library.silu_and_multiply(out.data_ptr(), gate_up.data_ptr(), n, size)
        return out

    def norm_and_rotate(self, qkv: torch.Tensor, heads: Qkv, rotary: Rotary) -> None:
        """Norms, where there are any, and rotary embedding of queries and keys in place.

        Args:
            qkv: (n, (heads + 2 * kv_heads) * size), contiguous.
        """
        self._library.norm_and_rotate(qkv.data_ptr(), ctypes.byref(heads.struct), rotary.reference)

    def pack_int8(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8Weights:
        """A float32 layer (outputs, inputs) in 8 bits, or in what this processor multiplies fast (native/int8.h)."""
        weight = weight.contiguous()
        outputs, inputs = weight.shape
        packed = torch.empty(self._library.int8_bytes(outputs, inputs), dtype=torch.uint8)
        self._library.pack_int8(packed.data_ptr(), weight.data_ptr(), outputs, inputs)
        return Int8Weights(packed, outputs, inputs, bias)

    def multiply_int8(self, x: torch.Tensor, weights: Int8Weights) -> torch.Tensor:
        """x (rows, inputs), quantized row by row, times weights: (rows, outputs), without the bias."""
        out = torch.empty(len(x), weights.outputs)
        product = ctypes.byref(weights.struct)
        self._library.multiply_int8(out.data_ptr(), x.data_ptr(), len(x), x.stride(0), product)
        return out

    def layer(self, layer: Int8Layer) -> LayerKernels:
        """The kernels of one decoder layer."""
        return LayerKernels(self._library, layer)

    def decoder(self, layers: Sequence[LayerKernels]) -> DecodeKernel:
        """Successive layers as one kernel for steps of single tokens."""
        return DecodeKernel(self._library, layers)


@functools.lru_cache(maxsize=256)
def _heads(
    kv_heads: int, group: int, size: int, value_size: int, query_stride: int, scale: float, window: int | None
) -> Any:
    """A reference to the struct, of which a model has one or two."""
    return ctypes.byref(structs.Heads(kv_heads, group, size, value_size, query_stride, window or 0, scale))


def _raise_without_memory(failed: int, function: Any, arguments: tuple[Any, ...]) -> None:
    if failed:
        raise MemoryError(f"no memory for {_MEMORY_FOR[function.__name__]}")


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def rows_are_plain(x: torch.Tensor) -> bool:
    """Whether x (n, heads, size) is float32 on the CPU with contiguous rows, which the kernels can read as it is."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.stride(2) == 1
        and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    )


@functools.cache
def kernels() -> Kernels | None:
    """The kernels, compiled by the first call on a machine; None where that cannot be done."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return load_library(Kernels)
    except CannotCompile as error:
        # Without a compiler nothing is amiss.
        level = logging.INFO if find_compiler() is None else logging.WARNING
        log.log(level, "the CPU kernels are left to torch: %s", error)
        return None
