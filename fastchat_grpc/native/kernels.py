"""The C kernels of this folder, compiled on first use. Where that is not possible torch does the same, slower."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastchat_grpc.native.library import CannotCompile, find_compiler, load_library

log = logging.getLogger(__name__)

SWITCH = "FASTCHAT_GRPC_NATIVE"
"""Environment variable; 0 leaves the kernels out."""

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "attend_singles": (*[_POINTER] * 6, *[_INT] * 2, _POINTER),
    "attend_piece": (*[_POINTER] * 5, *[_INT] * 2, _POINTER),
    "store": (*[_POINTER] * 3, *[_INT] * 3),
    "rms_norm": (*[_POINTER] * 3, *[_INT] * 2, *[_FLOAT] * 2),
    "silu_and_multiply": (*[_POINTER] * 3, *[_INT] * 4),
    "rotate": (*[_POINTER] * 3, *[_INT] * 4),
    "int8_bytes": (_INT, _INT),
    "pack_int8": (_POINTER, _POINTER, _INT, _INT),
    "multiply_int8": (*[_POINTER] * 3, *[_INT] * 4),
    "before_attention": (*[_POINTER] * 5, _INT),
    "after_attention": (*[_POINTER] * 4, _INT),
    "decode": (*[_POINTER] * 3, _INT, *[_POINTER] * 2),
    "struct_sizes": (_POINTER,),
    "is_parallel": (),
    "weight_bits": (),
}
_MEMORY_FOR = dict.fromkeys(("attend_singles", "attend_piece"), "attention scores") | dict.fromkeys(
    ("multiply_int8", "before_attention", "after_attention", "decode"), "a layer's rows"
)
"""What each kernel that allocates needs memory for; it returns 1 where there is none."""
INT8_INPUTS, INT8_OUTPUTS = 64, 32
"""An 8-bit layer has a multiple of these."""


@dataclass(frozen=True, slots=True)
class Int8Weights:
    """A linear layer in 8 bits: weights as `Kernels.pack_int8` makes them, bias (outputs,)."""

    packed: torch.Tensor
    outputs: int
    inputs: int
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Layer:
    """A Llama-shaped decoder layer with 8-bit weights; norms are float32 vectors, scale and window are attention's."""

    heads: int
    kv_heads: int
    size: int
    window: int | None
    epsilon: float
    scale: float
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    qkv: Int8Weights
    o: Int8Weights
    gate_up: Int8Weights
    down: Int8Weights


class _Shape(ctypes.Structure):
    _fields_ = [
        *((n, _INT) for n in ("kv_heads", "group", "size", "value_size", "query_stride", "window")),
        ("scale", _FLOAT),
    ]


class _Product(ctypes.Structure):
    _fields_ = [(n, _POINTER) for n in ("packed", "bias")] + [(n, _INT) for n in ("outputs", "inputs")]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _INT) for name in ("hidden", "inner", "heads", "kv_heads", "size", "window")),
        *((name, _FLOAT) for name in ("epsilon", "scale")),
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, _Product) for name in ("qkv", "o", "gate_up", "down")),
    ]


class LayerKernels:
    """What stands around attention in one layer, each part in one call with one team of threads."""

    def __init__(self, library: ctypes.CDLL, layer: Int8Layer) -> None:
        self._before, self._after = library.before_attention, library.after_attention
        self._kept = layer  # the pointers below are into its tensors
        self._width = (layer.heads + 2 * layer.kv_heads) * layer.size
        products = {name: _product(getattr(layer, name)) for name in ("qkv", "o", "gate_up", "down")}
        norms = {n: _pointer(getattr(layer, n)) for n in ("attention_norm", "mlp_norm", "query_norm", "key_norm")}
        sizes = {"hidden": len(layer.attention_norm), "inner": layer.down.inputs, "window": layer.window or 0}
        heads = {name: getattr(layer, name) for name in ("heads", "kv_heads", "size", "epsilon", "scale")}
        self.struct = _Layer(**sizes, **heads, **norms, **products)
        self._layer = ctypes.byref(self.struct)

    def before_attention(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values (n, (heads + 2 * kv_heads) * size), rotated, of x (n, hidden), contiguous."""
        out = torch.empty(len(x), self._width)
        arguments = (out.data_ptr(), x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), len(x))
        self._before(self._layer, *arguments)
        return out

    def after_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output (n, hidden), of its input x and attention's output (n, heads * size), both contiguous."""
        out = torch.empty_like(x)
        self._after(self._layer, out.data_ptr(), x.data_ptr(), attended.data_ptr(), len(x))
        return out


class _Singles(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("cosine", "sine", "places", "contexts", "lengths")),
        *((name, _INT) for name in ("n", "longest")),
    ]


class DecodeKernel:
    """Successive layers for steps of single tokens, in one call."""

    def __init__(self, library: ctypes.CDLL, layers: Sequence[LayerKernels]) -> None:
        self._decode = library.decode
        self._kept = layers
        self._layers = _pointers([ctypes.addressof(layer.struct) for layer in layers])

    def __call__(
        self,
        x: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        places: torch.Tensor,
        contexts: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """The last layer's output (n, hidden) of the first one's input x; keys and values are stored on the way.

        Args:
            cosine, sine: (n, size), contiguous.
            keys, values: per layer (tokens, kv_heads, size), the pools.
            places: (n,) where the tokens' keys and values go.
            contexts, lengths: as for `Kernels.attend_singles`.
        """
        x = x.clone(memory_format=torch.contiguous_format)
        tensors = (cosine, sine, places, contexts, lengths)
        singles = _Singles(*(tensor.data_ptr() for tensor in tensors), len(x), contexts.shape[1])
        pools = [_pointers([pool.data_ptr() for pool in part]) for part in (keys, values)]
        self._decode(self._layers, *pools, len(self._kept), x.data_ptr(), ctypes.byref(singles))
        return x


def _compare_structs(library: ctypes.CDLL) -> None:
    """Raise OSError where C lays its structs out otherwise than the mirrors of them here."""
    mirrors = (_Shape, _Product, _Layer, _Singles)
    sizes = (_INT * len(mirrors))()
    library.struct_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(mirror) for mirror in mirrors]:
        raise OSError(f"its structs have {list(sizes)} bytes, not {[ctypes.sizeof(mirror) for mirror in mirrors]}")


def _pointers(addresses: Sequence[int]) -> Any:
    return (_POINTER * len(addresses))(*addresses)


def _raise_without_memory(failed: int, function: Any, arguments: tuple[Any, ...]) -> None:
    if failed:
        raise MemoryError(f"no memory for {_MEMORY_FOR[function.__name__]}")


def _shape(query: torch.Tensor, values: torch.Tensor, scale: float, window: int | None) -> _Shape:
    heads, size = query.shape[1:]
    kv_heads, value_size = values.shape[1:]
    return _Shape(kv_heads, heads // kv_heads, size, value_size, query.stride(0), window or 0, scale)


def _product(layer: Int8Weights) -> _Product:
    return _Product(layer.packed.data_ptr(), _pointer(layer.bias), layer.outputs, layer.inputs)


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Kernels:
    """The compiled kernels, for float32 tensors on the CPU whose last dimension is contiguous."""

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
        _compare_structs(library)
        self.parallel = bool(library.is_parallel())
        """Whether they use several threads: not so by a compiler without OpenMP."""
        self.weight_bits: int = library.weight_bits()
        """Bits of a weight of an 8-bit layer, by what this processor multiplies fast."""
        self._library = library

    def attend_singles(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        contexts: torch.Tensor,
        lengths: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """As `attention.attend_singles`."""
        out = torch.empty(*query.shape[:2], values.shape[2])
        self._library.attend_singles(
            out.data_ptr(),
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            contexts.data_ptr(),
            lengths.data_ptr(),
            len(query),
            contexts.shape[1],
            ctypes.byref(_shape(query, values, scale, window)),
        )
        return out

    def attend_piece(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        context: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> None:
        """As `attention.attend_piece` to `out`, contiguous, over keys and values that stand in a pool at `context`."""
        self._library.attend_piece(
            out.data_ptr(),
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            context.data_ptr(),
            len(query),
            len(context),
            ctypes.byref(_shape(query, values, scale, window)),
        )

    def store(self, pool: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> None:
        """pool[places] = rows; (tokens, heads, size), (n, heads, size) and (n,)."""
        width = pool.shape[1] * pool.shape[2]
        self._library.store(pool.data_ptr(), rows.data_ptr(), places.data_ptr(), rows.shape[0], width, rows.stride(0))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + epsilon) * (offset + weight) over the last dimension."""
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._library.rms_norm(
            out.data_ptr(), x.data_ptr(), weight.data_ptr(), x.numel() // size, size, epsilon, offset
        )
        return out

    def silu_and_multiply(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, (rows, size) each."""
        n, size = gate.shape
        out = torch.empty(n, size)
        self._library.silu_and_multiply(
            out.data_ptr(), gate.data_ptr(), up.data_ptr(), n, size, gate.stride(0), up.stride(0)
        )
        return out

    def rotate(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        """Rotary embedding of x (n, heads, size) in place, with cosine and sine (n, size) in Hugging Face's layout."""
        n, heads, size = x.shape
        self._library.rotate(x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), n, heads, size, x.stride(0))

    def pack_int8(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8Weights:
        """A float32 layer (outputs, inputs) in 8 bits, or in what this processor multiplies fast (native/int8.c)."""
        weight = weight.contiguous()
        outputs, inputs = weight.shape
        packed = torch.empty(self._library.int8_bytes(outputs, inputs), dtype=torch.uint8)
        self._library.pack_int8(packed.data_ptr(), weight.data_ptr(), outputs, inputs)
        return Int8Weights(packed, outputs, inputs, bias)

    def multiply_int8(self, x: torch.Tensor, weights: Int8Weights) -> torch.Tensor:
        """x (rows, inputs), quantized row by row, times weights: (rows, outputs), without the bias."""
        out = torch.empty(len(x), weights.outputs)
        self._library.multiply_int8(
            out.data_ptr(),
            x.data_ptr(),
            weights.packed.data_ptr(),
            len(x),
            weights.outputs,
            weights.inputs,
            x.stride(0),
        )
        return out

    def layer(self, layer: Int8Layer) -> LayerKernels:
        """The kernels of one decoder layer."""
        return LayerKernels(self._library, layer)

    def decoder(self, layers: Sequence[LayerKernels]) -> DecodeKernel:
        """Successive layers as one kernel for steps of single tokens."""
        return DecodeKernel(self._library, layers)


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
