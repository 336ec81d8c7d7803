"""8-bit linear layers for CPUs: int8 weights and inputs, in groups of 64 with a scale each.

Small groups keep outliers to themselves, so that all layers, the output layer too, take 8 bits without
calibration; products within a group are exact integers. What a token gives does not depend on what else is in
the batch. The products are in native/int8.c; the scheme is that of llama.cpp's Q8_0.
"""

from __future__ import annotations

import torch
from torch import nn

from fastchat_grpc.models.cpu_linear import PackedLinear, replace_linears
from fastchat_grpc.native.kernels import INT8_GROUP, INT8_PANEL, Int8Weights, Kernels

_LEVELS = 127
_ZERO = 128
_OUTPUTS = 2 * INT8_PANEL


class Int8Linear(PackedLinear):
    """Linear layer with 8-bit weights; float32 in and out.

    Args:
        weight: (out, in) float32.
        bias: (out,) float32, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: Kernels) -> None:
        super().__init__(weight)
        self._kernels = kernels
        self._padding = -self.in_features % INT8_GROUP
        self._weight, self._scales = pack_int8(weight, kernels.int8_depth)
        self._bias = None if bias is None else bias.detach()

    @property
    def exact(self) -> Int8Weights | None:
        """The weights, if they need no padding."""
        if self._padding or self.out_features % _OUTPUTS:
            return None
        return Int8Weights(self._weight, self._scales, self._bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if self._padding:
            rows = nn.functional.pad(rows, (0, self._padding))
        elif rows.stride(-1) != 1:
            rows = rows.contiguous()
        y = self._kernels.multiply_int8(rows, self._weight, self._scales)
        if y.shape[1] != self.out_features:
            y = y[:, : self.out_features]
        if self._bias is not None:
            y += self._bias
        return y.view(*x.shape[:-1], self.out_features) if x.dim() != 2 else y


def quantize_int8(model: nn.Module, kernels: Kernels) -> None:
    """Make the plain linear layers of `model` (on the CPU, in float32) 8-bit, in place."""
    replace_linears(model, lambda weight, bias: Int8Linear(weight, bias, kernels))


def pack_int8(weight: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (out, in) as `Kernels.multiply_int8` takes them: (panels, groups, 64 / depth, 16, depth), and scales."""
    out, inputs = weight.shape
    padded = nn.functional.pad(weight, (0, -inputs % INT8_GROUP, 0, -out % _OUTPUTS))
    panels, groups = padded.shape[0] // INT8_PANEL, padded.shape[1] // INT8_GROUP
    grouped = padded.view(panels, INT8_PANEL, groups, INT8_GROUP)
    top = grouped.abs().amax(-1, keepdim=True)
    inverse = torch.where(top > 0, _LEVELS / top, 0.0)
    levels = (grouped * inverse).round_().add_(_ZERO).to(torch.uint8)
    packed = levels.view(panels, INT8_PANEL, groups, INT8_GROUP // depth, depth).permute(0, 2, 3, 1, 4)
    return packed.contiguous(), (top / _LEVELS)[..., 0].transpose(1, 2).contiguous()
