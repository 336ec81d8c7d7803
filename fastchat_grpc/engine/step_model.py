"""A model over packed steps: what the runner, the embedder and the check at load see of it."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from fastchat_grpc.engine.attention import Step, running


class StepModel(Protocol):
    """Computes all tokens of a step, of however many sequences, as one row. Inputs have one dimension."""

    def forward(self, step: Step, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits (rows, vocabulary) in float32 of some rows of the step's tokens. `rows` is on the CPU."""
        ...

    def hidden_states(self, step: Step, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Last hidden states (tokens, size) of the step's tokens."""
        ...


class TransformersModel:
    """A transformers model whose attention is `attention.PACKED`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def forward(self, step: Step, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """See StepModel."""
        with running(step):
            output = self._model(
                input_ids=input_ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=rows.numpy(),  # no tensor: accelerate takes those to the first device, not to the last
            )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def hidden_states(self, step: Step, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See StepModel."""
        with running(step):
            output = self._model.base_model(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden
