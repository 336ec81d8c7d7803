"""What in a model depends on how long a sequence is, made visible to a check with short ones.

Attention windows and chunks reach the layers in several ways: as an argument, as a mask, or both. Where they come as a
mask alone, packed attention would not see them, and nothing would show before a sequence is longer than a window,
which may take thousands of tokens. So the check at load runs the model with its windows shrunken.
Rotary embeddings whose frequencies depend on the longest sequence of a call (dynamic, longrope) would turn with what
else is in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

SHORT_WINDOW = 3
_WINDOWS = ("sliding_window", "attention_chunk_size")
_TURNS_BY_LENGTH = ("dynamic", "longrope")

MaskFunction = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, head, query position, key position) to whether the query sees the key: transformers' way to say a mask."""


@contextmanager
def short_windows(model: Any, others: Iterable[Any] = ()) -> Iterator[bool]:
    """Shrink the windows and chunks of a model, and those that others hold, to `SHORT_WINDOW`.

    Yields whether there are any.
    """
    changed: list[tuple[Any, str, int]] = []
    try:
        for holder in (*_holders(model), *others):
            for name in _WINDOWS:
                value = getattr(holder, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > SHORT_WINDOW:
                    setattr(holder, name, SHORT_WINDOW)
                    changed.append((holder, name, value))
        yield bool(changed)
    finally:
        for holder, name, value in reversed(changed):
            setattr(holder, name, value)


def _holders(model: Any) -> Iterable[Any]:
    """Everything in a model that may hold a window: configurations and layers."""
    found = [model.config, model.config.get_text_config()]
    for module in model.modules():
        found += [module, getattr(module, "config", None)]
    return {id(holder): holder for holder in found if holder is not None}.values()


def turns_by_length(config: Any, context_length: int | None) -> bool:
    """Whether within the context rotary frequencies depend on the longest sequence of a call."""
    text = config.get_text_config()
    stated = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in stated.values() if isinstance(value, dict)]
    for rope in nested or [stated]:
        if rope.get("rope_type") in _TURNS_BY_LENGTH:
            limit = (
                rope.get("original_max_position_embeddings")
                or getattr(text, "original_max_position_embeddings", None)
                or text.max_position_embeddings
            )
            if context_length is None or context_length > limit:
                return True
    return False


class DynamicRotary:
    """Rotary embeddings of a model that remember the longest sequence of all, and compute with it from then on."""

    def __init__(self, model: Any) -> None:
        """`model` has computed nothing long yet."""
        self._modules = [m for m in model.modules() if getattr(m, "rope_type", None) == "dynamic"]
        self.fresh = self.state()

    def state(self) -> list[dict[str, Any]]:
        """What they remember now."""
        return [{"max_seq_len_cached": m.max_seq_len_cached, "inv_freq": m.inv_freq} for m in self._modules]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Let them remember something else."""
        for module, remembered in zip(self._modules, state, strict=True):
            for name, value in remembered.items():
                setattr(module, name, value)


def limits_sight(mask_function: MaskFunction, context_length: int) -> bool:
    """Whether a mask hides any earlier token of a sequence, as windows and chunks do."""
    last = context_length - 1
    distances = [d for d in (0, *(2**k for k in range(40)), last) if d <= last]
    queries = torch.tensor([*(last for _ in distances), *distances])
    keys = torch.tensor([*(last - d for d in distances), *(0 for _ in distances)])
    zero = torch.zeros((), dtype=torch.long)
    seen = torch.stack([torch.as_tensor(mask_function(zero, zero, q, k)) for q, k in zip(queries, keys, strict=True)])
    return not bool(seen.all())
