"""Own linear layers for a model on the CPU, tried before they are kept."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastchat_grpc.models.detect import ModelKind

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_ROWS = 2
_LENGTH, _CALIBRATION_LENGTH = 8, 96
"""Tokens of each row: enough to compare outputs, and enough to see a model's outlier channels."""
_TOLERANCE = 1e-3
"""Largest change of outputs, as a share of the largest output, that rounding explains."""


class Unsuitable(Exception):
    """The model does not work with replaced layers; it must be loaded again without them."""


def speed_up(model: Any, kind: ModelKind, *, int8: bool, avoid: frozenset[int]) -> None:
    """Replace the linear layers of a float32 model on the CPU by faster ones, in place.

    Args:
        int8: quantize weights to 8 bits where that costs little.
        avoid: token ids (special ones) that trial inputs leave out.

    Raises:
        Unsuitable: the model fails, or its outputs are others, with replaced layers.
    """
    import torch

    from fastchat_grpc.models.cpu_linear import fast_linear, replace_linears
    from fastchat_grpc.models.quantization import quantize_int8

    inputs = _trial_inputs(model, kind, avoid, _CALIBRATION_LENGTH if int8 else _LENGTH)
    with torch.inference_mode():
        before = _run(model, inputs)
        try:
            if int8:
                quantize_int8(model, lambda: _run(model, inputs))
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


def _trial_inputs(model: Any, kind: ModelKind, avoid: frozenset[int], length: int) -> dict[str, torch.Tensor]:
    """Random tokens. They show a model's outlier channels as well as text does, in any language."""
    import torch

    count = int(model.get_input_embeddings().weight.shape[0])
    allowed = torch.tensor([i for i in range(count) if i not in avoid] or [0])
    generator = torch.Generator().manual_seed(0)
    token_ids = allowed[torch.randint(len(allowed), (_ROWS, length), generator=generator)]
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    if kind is ModelKind.ENCODER_DECODER:
        inputs["decoder_input_ids"] = token_ids
    return inputs
