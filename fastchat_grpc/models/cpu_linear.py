"""Faster linear layers for CPUs, with the results of torch.nn.Linear up to float32 rounding.

Decoding multiplies a few rows with every weight of the model, so it runs at the speed of memory,
and torch's own product (MKL) is tuned for many rows. Two replacements, neither with a second copy:

    HalfLinear     weights packed by FBGEMM in 16 bits, products and sums in float32. Used where
                   float16 holds the weights as well as float32 arithmetic can tell, which is so
                   for checkpoints that are stored in 16 bits, as nearly all are.
    OneDnnLinear   weights in the layout of oneDNN, for checkpoints that need all 32 bits.

`replace_linears` puts them into a model without touching its code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

_FLOAT16_MAX = 65504.0
_ROUNDING = 2.0**-24
"""Relative rounding error of float32."""
_PART = 1 << 17
_ROW_STEPS = ((8, 1), (64, 8), (256, 32), (math.inf, 128))
"""Most rows, and the multiple up to there that they are padded to."""
_ONEDNN_ROWS = 64
"""oneDNN lays weights out for a number of rows; this one is good from 1 to hundreds."""

MakeLinear: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None], nn.Module]
"""Builds a layer from weight (out, in) and bias (out,), both float32."""

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that models call one after the other on the same input."""
_MIN_WEIGHTS = 64 * 64
"""Matrices with fewer elements gain nothing."""


class PackedLinear(nn.Module):
    """Base of replacements of nn.Linear: its shape and dtype, but no weight to compute with."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Some models ask a weight for its dtype or shape. Whoever computes with this one sees that it is not there.
        self.weight = torch.full((), math.nan, dtype=weight.dtype).expand(weight.shape)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class HalfLinear(PackedLinear):
    """Linear layer with float16 weights and float32 arithmetic.

    Args:
        weight: (out, in) float32; rounded to float16, see `float16_scale`.
        bias: (out,) float32, or None.
        scale: power of two that brings the weights into float16's range.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scale: float = 1.0) -> None:
        super().__init__(weight)
        scaled = weight if scale == 1.0 else weight * scale
        with fbgemm():
            self._packed = torch.ops.quantized.linear_prepack_fp16(scaled, bias if scale == 1.0 else None)
        self._bias = None if scale == 1.0 else bias
        self._unscale = 1.0 / scale
        self._multiply = torch.ops.quantized.linear_dynamic_fp16.default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._multiply(x, self._packed)
        if self._unscale != 1.0:
            y.mul_(self._unscale)
            if self._bias is not None:
                y.add_(self._bias)
        return y


class OneDnnLinear(PackedLinear):
    """Linear layer with float32 weights in oneDNN's own layout.

    Args:
        weight: (out, in) float32.
        bias: (out,) float32, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ONEDNN_ROWS)
        self._bias = None if bias is None else bias.detach()
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        missing = padded_rows(len(rows)) - len(rows)
        if missing:
            rows = nn.functional.pad(rows, (0, 0, 0, missing))
        y: torch.Tensor = self._multiply(rows, self._packed, self._bias, "none", [], "")
        return y[: len(y) - missing].view(*x.shape[:-1], self.out_features)


def padded_rows(count: int) -> int:
    """Rows that oneDNN is given for so many: it compiles a product of its own for each number of rows and each layer,
    half a megabyte that it keeps, and steps of an engine have any number of rows."""
    step = next(step for most, step in _ROW_STEPS if count <= most)
    return -(-count // step) * step


def fast_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """The fastest layer that gives the results of nn.Linear. `weight` is (out, in) float32."""
    scale = float16_scale(weight) if has_fbgemm() else None
    if scale is not None:
        return HalfLinear(weight, bias, scale)
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return OneDnnLinear(weight, bias)
    return _plain(weight, bias)


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def float16_scale(weight: torch.Tensor) -> float | None:
    """The power of two by which float16 can hold `weight`, or None if it cannot.

    It can where the change of all weights together (their Euclidean norm) is within float32's own
    rounding, so that no product could tell. One power for a matrix costs a pass over its outputs and
    is used only where plain float16 would lose the smallest numbers of bfloat16.
    """
    low, high = torch.aminmax(weight)
    largest = max(-float(low), float(high))
    if largest == 0.0 or not math.isfinite(largest):
        return None
    widest = 2.0 ** math.floor(math.log2(_FLOAT16_MAX / largest))
    scales = [1.0, widest] if largest <= _FLOAT16_MAX else [widest]
    return next((scale for scale in scales if _fits_float16(weight, scale)), None)


def _fits_float16(weight: torch.Tensor, scale: float) -> bool:
    change = total = 0.0
    for part in torch.split(weight, max(1, _PART // weight.shape[1])):  # parts that stay in the cache
        scaled = part if scale == 1.0 else part * scale
        change += float(torch.linalg.vector_norm(scaled - scaled.half().float())) ** 2
        total += float(torch.linalg.vector_norm(scaled)) ** 2
    return change <= total * _ROUNDING**2


def has_fbgemm() -> bool:
    """Whether this torch packs matrices with FBGEMM (x86 builds do)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


@contextmanager
def fbgemm() -> Iterator[None]:
    """Pack with FBGEMM inside; torch keeps the engine as a global."""
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = engine


def replace_linears(model: nn.Module, make: MakeLinear) -> None:
    """Replace the plain linear layers of `model` in place.

    Siblings that share an input become one product, which saves calls and reads the input once.

    Args:
        model: on the CPU, in float32.
        make: builds each replacement.
    """
    adapters = {part for layer in model.modules() if hasattr(layer, "get_base_layer") for part in _of_adapters(layer)}
    for parent in [module for module in model.modules() if module not in adapters]:
        for names in _SIBLINGS:
            _fuse_siblings(parent, names, make)
        for name, layer in list(parent.named_children()):
            weight = _plain_weight(layer)
            if weight is not None and not _reads_weights(parent):
                bias: Any = layer.bias
                setattr(parent, name, make(weight, bias))


def _of_adapters(layer: nn.Module) -> Iterator[nn.Module]:
    """Modules of a LoRA layer apart from its base: small, and switched by peft."""
    for name, child in layer.named_children():
        if name != "base_layer":
            yield from child.modules()


def _reads_weights(parent: nn.Module) -> bool:
    """Whether a LoRA layer is of a kind that computes with its base layer's weights, as DoRA with their norms."""
    return bool(getattr(parent, "lora_variant", None))


class FusedLinear:
    """One product for several layers with the same input; its parts are called in order, by one thread."""

    def __init__(self, layer: nn.Module, sizes: Sequence[int]) -> None:
        self.layer = layer
        self.sizes = list(sizes)
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Output of layer `index`. Computed at the first layer's call, kept until the last one's."""
        if index == 0 or x is not self._input:
            self._outputs = self.layer(x).split(self.sizes, dim=-1)
            self._input = x  # held, so that no other tensor can pass for it
        result = self._outputs[index]
        if index == len(self.sizes) - 1:
            self._input, self._outputs = None, ()
        return result


class FusedPart(PackedLinear):
    """One of several layers that are computed together."""

    def __init__(self, weight: torch.Tensor, fused: FusedLinear, index: int) -> None:
        super().__init__(weight)
        self.fused = fused
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fused.output(self.index, x)


def _fuse_siblings(parent: nn.Module, names: Sequence[str], make: MakeLinear) -> None:
    layers: list[Any] = [getattr(parent, name, None) for name in names]
    weights = [_plain_weight(layer) for layer in layers]
    known = [weight for weight in weights if weight is not None]
    biases = (
        [layer.bias for layer in layers if layer is not None and layer.bias is not None]
        if len(known) == len(names)
        else []
    )
    if len(known) < len(names) or len({weight.shape[1] for weight in known}) > 1 or len(biases) not in (0, len(names)):
        return
    bias = torch.cat([bias.detach() for bias in biases]) if biases else None
    share(parent, names, make(torch.cat(known), bias))


def share(parent: nn.Module, names: Sequence[str], layer: nn.Module) -> None:
    """Let one layer compute what several of `parent` do, side by side; it replaces them."""
    if len(names) == 1:
        setattr(parent, names[0], layer)
        return
    weights = [getattr(parent, name).weight for name in names]
    fused = FusedLinear(layer, [weight.shape[0] for weight in weights])
    for index, (name, weight) in enumerate(zip(names, weights, strict=True)):
        setattr(parent, name, FusedPart(weight, fused, index))


def fused_layer(linears: Sequence[Any]) -> Any:
    """The one layer that computes all of them side by side, where there is one, else None."""
    if len(linears) == 1 and not isinstance(linears[0], FusedPart):
        return linears[0]
    fused = [linear.fused for linear in linears if isinstance(linear, FusedPart)]
    whole = len(fused) == len(linears) and all(f is fused[0] for f in fused) and len(fused[0].sizes) == len(fused)
    return fused[0].layer if whole else None


def plain_linear(layer: object) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight (out, in) and bias of an nn.Linear in float32, and None for anything else, subclasses included."""
    if type(layer) is not nn.Linear or layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        return None
    bias: torch.Tensor | None = layer.bias
    return layer.weight.detach(), None if bias is None else bias.detach()


def _plain_weight(layer: object) -> torch.Tensor | None:
    """Weight (out, in) of an nn.Linear or of GPT-2's Conv1D, and None for anything else, subclasses included."""
    weight: object = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return None
    is_conv1d = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
    if weight.numel() < _MIN_WEIGHTS or not (type(layer) is nn.Linear or is_conv1d):
        return None
    return weight.detach().t() if is_conv1d else weight.detach()
