"""Logits of all tokens of a prompt, some at a time: in float32 those of a long one take gigabytes.

Works with any model that has a body (transformers' `base_model`) and makes logits of its last hidden states, with
whatever it does to them. The body runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class LogitsInSlices:
    """A forward pass over one sequence. `output` is the model's, with logits of the last token."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self._model = model
        self._inputs = inputs
        self._body = model.base_model
        self._kept: Any = None
        hook = self._body.register_forward_hook(self._keep) if self._body is not model else None
        try:
            self.output = model(**inputs, return_dict=True)
        finally:
            if hook is not None:
                hook.remove()

    def slices(self, rows: int) -> Iterator[torch.Tensor]:
        """Logits of all tokens in order, (up to `rows`, vocabulary) at a time, in float32."""
        if self._kept is None:  # a model without a body of its own has made them all
            yield from (part.float() for part in torch.split(self.output.logits[0], rows))
            return
        for hidden in torch.split(self._kept.last_hidden_state, rows, dim=1):
            with _forward(self._body, lambda *_, h=hidden, **__: self._with(h)):
                logits: torch.Tensor = self._model(**self._inputs, return_dict=True).logits[0]
            yield logits.float()

    def _keep(self, body: Any, args: Any, output: Any) -> Any:
        self._kept = output
        return self._with(output.last_hidden_state[:, -1:])

    def _with(self, hidden: torch.Tensor) -> Any:
        return type(self._kept)(**{**self._kept, "last_hidden_state": hidden})


@contextmanager
def _forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
