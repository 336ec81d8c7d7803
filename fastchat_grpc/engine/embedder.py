"""Embeddings: inputs in batches, pooled as the model was trained for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastchat_grpc.engine.attention import WholeStep
from fastchat_grpc.engine.lengths import DynamicRotary
from fastchat_grpc.engine.step_model import StepModel
from fastchat_grpc.errors import BackendFailed

BATCH_TOKENS = 2048
"""Tokens of a batch, padding included: what running streams wait for between two of their tokens."""

Vectors = list[list[float]]


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector per row.

    Args:
        hidden: (rows, tokens, size) last hidden states.
        mask: (rows, tokens), 1 for tokens and 0 for the padding after them.
        pooling: "mean" of all tokens, "cls" for the first, or "last".
    """
    match pooling:
        case "mean":
            weights = mask[..., None].to(hidden.dtype)
            return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        case "cls":
            return hidden[:, 0]
        case "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]
    raise BackendFailed(f"unknown pooling {pooling!r}")


class Embedder:
    """Embeds with a model that the engine thread owns. `packed`: the same for packed steps, where it can be packed."""

    def __init__(
        self, model: Any, pooling: str, activate: Callable[[str], None], *, packed: StepModel | None = None
    ) -> None:
        self._encode = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model.base_model
        self._device: torch.device = model.get_input_embeddings().weight.device
        self._rotary = DynamicRotary(model)
        self._pooling = pooling
        self._activate = activate
        self._packed = packed

    @torch.inference_mode()
    def embed(self, inputs: list[list[int]], normalize: bool, adapter: str) -> Vectors:
        """The vectors of some inputs, computed together: see `batches`."""
        self._activate(adapter)
        self._rotary.restore(self._rotary.fresh)
        hidden, mask = (
            self._hidden_padded(inputs) if self._packed is None else self._hidden_packed(self._packed, inputs)
        )
        vectors = pool(hidden.float(), mask.to(hidden.device), self._pooling)
        if normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        made: Vectors = vectors.tolist()
        return made

    def _hidden_padded(self, inputs: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = padded([torch.tensor(token_ids) for token_ids in inputs])
        output = self._encode(input_ids=ids.to(self._device), attention_mask=mask.to(self._device))
        return output.last_hidden_state, mask

    def _hidden_packed(self, model: StepModel, inputs: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """All inputs as one row, so that nothing is computed for padding."""
        lengths = [len(token_ids) for token_ids in inputs]
        ids = torch.tensor([token for token_ids in inputs for token in token_ids], device=self._device)
        positions = torch.cat([torch.arange(n, device=self._device) for n in lengths])
        return padded(list(torch.split(model.hidden_states(WholeStep(lengths), ids, positions), lengths)))


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one tensor, filled up with zeros, and the mask of what is no filling."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


def batches(lengths: list[int], budget: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices of inputs in groups of similar lengths whose padded size keeps to the budget, shortest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and lengths[i] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
