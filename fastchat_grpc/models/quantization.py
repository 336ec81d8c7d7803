"""8-bit linear layers for x86 CPUs, chosen layer by layer so that answers stay the model's own.

Weights are int8 with a scale for each output, inputs are uint8 with a scale for each row (token), and
products are exact integers: the result for a token does not depend on what else is in the batch.
(torch's own quantized::linear_dynamic takes one scale for all rows, so that one token's outliers
ruin the others: measured on SmolLM2-135M, it keeps the likeliest token in half the places only.)

Three things keep the error small:

    smoothing    channels with large inputs share their size with the weights (SmoothQuant,
                 arXiv:2211.10438), measured on one pass over random tokens
    no overflow  AVX2 adds pairs of products in 16 bits; each output's scale is the finest for which
                 no pair can exceed them (vpmaddubsw saturates), instead of giving up a whole bit
    choice       a layer whose error stays above a limit keeps 16-bit weights (`cpu_linear.HalfLinear`);
                 so does the last layer of each feed-forward block, whose inputs have outliers of
                 their own at every token, and the output layer
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fastchat_grpc.models.cpu_linear import (
    PackedLinear,
    computing_layer,
    fast_linear,
    fbgemm,
    is_plain_linear,
    replace_linears,
)

log = logging.getLogger(__name__)

MAX_ERROR = 0.03
"""Largest relative error of a layer's outputs that is taken."""
_KEPT = ("down_proj", "w2", "wo", "fc2", "c_proj", "dense_4h_to_h")
"""Names of the last layer of a feed-forward block."""
_SMOOTHING = (0.5, 0.0)
"""Shares of the inputs' size that move into the weights; the better is taken for each layer."""
_SAMPLED_ROWS = 64
_INPUT_LEVELS, _INPUT_ZERO = 127, 128
_PAIR_LIMIT = 32767


class Int8Linear(PackedLinear):
    """Linear layer with int8 weights and inputs quantized row by row; float32 in and out.

    Args:
        weight: (out, in) float32.
        bias: (out,) float32, or None.
        smoothing: (in,) divisors of the inputs, multiplied into the weights; None: none.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, smoothing: torch.Tensor | None = None) -> None:
        super().__init__(weight)
        if smoothing is not None:
            weight = weight * smoothing
        scales = _finest_scales(weight)
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with fbgemm(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that quantized tensors will go one day
            quantized = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        self._bias = None if bias is None else bias.detach()
        self._unsmooth = None if smoothing is None else 1.0 / smoothing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._unsmooth is not None:
            x = x * self._unsmooth
        size = x.abs().amax(-1, keepdim=True).clamp_min_(1e-20)
        y: torch.Tensor = self._multiply(x / size, 1.0 / _INPUT_LEVELS, _INPUT_ZERO, self._packed)
        y.mul_(size)
        return y if self._bias is None else y.add_(self._bias)


def quantize_int8(model: nn.Module, run: Callable[[], object]) -> None:
    """Make the linear layers of `model` 8-bit, in place, where that costs little.

    The output layer keeps 16 bits: its error goes straight into the choice of tokens.

    Args:
        model: on the CPU, in float32.
        run: runs the model once, over inputs that exercise it.
    """
    samples = _sample_inputs(model, run)

    def make(weight: torch.Tensor, bias: torch.Tensor | None, layers: Sequence[nn.Module]) -> nn.Module:
        rows = samples.get(layers[0])
        layer = None if rows is None else _best(weight, bias, rows)
        return layer or fast_linear(weight, bias, layers)

    replace_linears(model, make, head=fast_linear)
    made = [type(computing_layer(layer)).__name__ for layer in model.modules() if isinstance(layer, PackedLinear)]
    log.info("%d of %d linear layers hold 8-bit weights", made.count("Int8Linear"), len(made))


def _best(weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor) -> Int8Linear | None:
    """The 8-bit layer with the least error on `rows` (n, in), or None where none is good enough."""
    exact = nn.functional.linear(rows, weight, bias)
    candidates = [Int8Linear(weight, bias, _smoothing(weight, rows, share)) for share in _SMOOTHING]
    errors = [_relative_error(candidate(rows), exact) for candidate in candidates]
    least = min(range(len(errors)), key=errors.__getitem__)
    return candidates[least] if errors[least] <= MAX_ERROR else None


def _relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square over the outputs of each one's relative error; so small outputs count like large ones."""
    error = (result - exact).square().sum(0) / exact.square().sum(0).clamp_min(1e-20)
    return float(error.mean().sqrt())


def _smoothing(weight: torch.Tensor, rows: torch.Tensor, share: float) -> torch.Tensor | None:
    """Divisors of the input channels: max|x|^share / max|w|^(1 - share), with mean 1. None where share is 0."""
    if share == 0.0:
        return None
    inputs, weights = rows.abs().amax(0).clamp_min(1e-5), weight.abs().amax(0).clamp_min(1e-5)
    divisors = inputs.pow(share) / weights.pow(1.0 - share)
    return divisors / divisors.mean()


def _finest_scales(weight: torch.Tensor) -> torch.Tensor:
    """Scales (out,) of int8 weights by which no neighbouring pair of products exceeds 16 bits.

    A pair is (2k, 2k + 1) along the inputs. Inputs are 0 to 255, so weights of like sign add up at most.
    """
    out = weight.shape[0]
    padded = nn.functional.pad(weight, (0, weight.shape[1] % 2))
    pairs = torch.maximum(padded.clamp_min(0).view(out, -1, 2).sum(-1), (-padded).clamp_min(0).view(out, -1, 2).sum(-1))
    # One of rounding for each weight of the pair.
    by_pair = pairs.amax(1) / (_PAIR_LIMIT / 255 - 1)
    return torch.maximum(by_pair, weight.abs().amax(1) / 127).clamp_min(1e-12)


def _sample_inputs(model: nn.Module, run: Callable[[], object]) -> dict[nn.Module, torch.Tensor]:
    """Some rows of the input of each plain linear layer during `run`."""
    samples: dict[nn.Module, torch.Tensor] = {}

    def keep(layer: nn.Module, inputs: Any) -> None:
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        step = max(1, len(rows) // _SAMPLED_ROWS)
        samples[layer] = rows[::step][:_SAMPLED_ROWS].clone()

    chosen = [layer for name, layer in model.named_modules() if is_plain_linear(layer) and not name.endswith(_KEPT)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in chosen]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return samples
