"""Own linear layers for a model on the CPU, tried before they are kept."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastchat_grpc.models.detect import ModelKind

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_ROWS, _LENGTH = 2, 8
_TOLERANCE = 1e-3
"""Largest change of outputs, as a share of the largest output, that rounding explains."""


class Unsuitable(Exception):
    """The model does not work with replaced layers; it must be loaded again without them."""


def speed_up(model: Any, kind: ModelKind, *, int8: bool, avoid: frozenset[int]) -> None:
    """Replace the linear layers of a float32 model on the CPU by faster ones, in place.

    Args:
        int8: quantize weights to 8 bits.
        avoid: token ids (special ones) that trial inputs leave out.

    Raises:
        Unsuitable: the model fails, or its outputs are others, with replaced layers.
    """
    import torch

    from fastchat_grpc.models.cpu_linear import fast_linear, replace_linears
    from fastchat_grpc.models.quantization import quantize_int8
    from fastchat_grpc.native.kernels import kernels

    log.info("trying %s layers against the model's own", "8-bit" if int8 else "faster")
    inputs = _trial_inputs(model, kind, avoid)
    with torch.inference_mode():
        before = _run(model, inputs)
        try:
            if int8:
                native = kernels()
                assert native is not None, "plan_quantization has asked for them"
                quantize_int8(model, native)
            else:
                replace_linears(model, fast_linear)
            after = _run(model, inputs)
        except Exception as error:  # whatever a model's own code does with layers that have no weight
            raise Unsuitable(f"{type(error).__name__}: {error}") from error
    change = float((after - before).abs().max() / before.abs().max().clamp_min(1e-9))
    if not torch.isfinite(after).all() or (not int8 and change > _TOLERANCE):
        raise Unsuitable(f"outputs change by {change:.2g} of the largest")


def _run(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first output: logits, or the last hidden states."""
    output: torch.Tensor = model(**inputs)[0]
    return output


def _trial_inputs(model: Any, kind: ModelKind, avoid: frozenset[int]) -> dict[str, torch.Tensor]:
    """Random tokens: a fault of a layer shows on any."""
    import torch

    count = int(model.get_input_embeddings().weight.shape[0])
    allowed = torch.tensor([i for i in range(count) if i not in avoid] or [0])
    generator = torch.Generator().manual_seed(0)
    token_ids = allowed[torch.randint(len(allowed), (_ROWS, _LENGTH), generator=generator)]
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    if kind is ModelKind.ENCODER_DECODER:
        inputs["decoder_input_ids"] = token_ids
    return inputs
