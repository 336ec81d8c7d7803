"""8-bit linear layers for CPUs: weights and inputs in small groups with a scale each.

Small groups keep outliers to themselves, so that all layers, the output layer too, are quantized without
calibration; products within a group are exact integers. What a token gives does not depend on what else is in
the batch. The products, and how weights are kept, are in native/int8.c.
"""

from __future__ import annotations

import torch
from torch import nn

from fastchat_grpc.models.cpu_linear import PackedLinear, replace_linears
from fastchat_grpc.native.kernels import INT8_INPUTS, INT8_OUTPUTS, Int8Weights, Kernels


class Int8Linear(PackedLinear):
    """Linear layer with 8-bit weights; float32 in and out.

    Args:
        weight: (out, in) float32.
        bias: (out,) float32, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: Kernels) -> None:
        super().__init__(weight)
        self._kernels = kernels
        self._padding = -self.in_features % INT8_INPUTS
        padded = nn.functional.pad(weight, (0, self._padding, 0, -self.out_features % INT8_OUTPUTS))
        self._weights = kernels.pack_int8(padded, None if bias is None else bias.detach())

    @property
    def exact(self) -> Int8Weights | None:
        """The layer, if its weights need no padding."""
        size = (self._weights.outputs, self._weights.inputs)
        return self._weights if size == (self.out_features, self.in_features) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if self._padding:
            rows = nn.functional.pad(rows, (0, self._padding))
        elif rows.stride(-1) != 1:
            rows = rows.contiguous()
        y = self._kernels.multiply_int8(rows, self._weights)
        if y.shape[1] != self.out_features:
            y = y[:, : self.out_features].contiguous()
        if self._weights.bias is not None:
            y += self._weights.bias
        return y.view(*x.shape[:-1], self.out_features) if x.dim() != 2 else y


class WrongProducts(Exception):
    """The kernels give other products than float32 does, beyond what 8 bits explain."""


def quantize_int8(model: nn.Module, kernels: Kernels) -> None:
    """Make the plain linear layers of `model` (on the CPU, in float32) 8-bit, in place. Raises WrongProducts."""
    replace_linears(model, lambda weight, bias: _checked(Int8Linear(weight, bias, kernels), weight, bias))


_TRIED_ROWS = 1, 9
"""Rows of inputs that a layer is tried with: a single one, and more than the kernels take at once with some left."""
_TOLERANCE = 0.2
"""Relative error (Euclidean) of a layer's outputs for random inputs: 0.01 is usual with 8 bits, 0.03 with 6 (AVX2),
more where a few weights are much larger than the others. Wrong products are off by about 1."""


def _checked(layer: Int8Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> Int8Linear:
    """The layer, if it computes what the float32 layer does: processors and compilers differ."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(_TRIED_ROWS), weight.shape[1], generator=generator)
    with torch.no_grad():
        expected = nn.functional.linear(x, weight, bias)
        for rows in _TRIED_ROWS:
            error = float((layer(x[:rows]) - expected[:rows]).norm() / expected[:rows].norm().clamp_min(1e-9))
            if not error <= _TOLERANCE:  # also where it is NaN
                raise WrongProducts(f"a layer of {tuple(weight.shape)} in 8 bits is off by {error:.2g}")
    return layer
