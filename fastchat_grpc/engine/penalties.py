"""Penalties for tokens that were used already: sparse, since a text holds few of a vocabulary's tokens."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING

import numpy as np

from fastchat_grpc.core import SamplingParams

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


class TokenCounts:
    """Distinct tokens of one sequence, and how often each is in its output. Grows with the sequence."""

    def __init__(self, prompt: Tokens[int]) -> None:
        self._counted = len(prompt)
        distinct = list(dict.fromkeys(prompt))
        self._place = {token: place for place, token in enumerate(distinct)}
        self._ids = np.array(distinct + [0] * 64, dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    def catch_up(self, tokens: Tokens[int]) -> None:
        """Count those of the sequence's tokens, prompt and output, that came since the last call."""
        for token in tokens[self._counted :]:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[place] = token
            self._counts[place] += 1
        self._counted = len(tokens)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Distinct tokens of prompt and output."""
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """Occurrences of each of them in the output."""
        return self._counts[: len(self._place)]


def penalize(
    logits: torch.Tensor, rows: Tokens[int], counts: Tokens[TokenCounts], sampling: Tokens[SamplingParams]
) -> None:
    """Apply repetition, presence and frequency penalties to some rows of `logits` (n, vocabulary), in place.

    Repetition (Keskar et al., CTRL, 2019, as in transformers): tokens of prompt and output; positive logits
    are divided, negative ones multiplied. Presence and frequency (the OpenAI API's): tokens of the output.
    """
    import torch

    lengths = np.array([len(c.ids) for c in counts])

    def column(values: list[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), lengths)).to(logits.device)

    flat = np.concatenate([c.ids for c in counts]) + np.repeat(np.array(rows) * logits.shape[1], lengths)
    places = torch.from_numpy(flat).to(logits.device)
    occurrences = torch.from_numpy(np.concatenate([c.counts for c in counts])).to(logits.device)
    values = logits.view(-1)[places]
    repetition = column([s.repetition_penalty for s in sampling])
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= column([s.presence_penalty for s in sampling]) * (occurrences > 0)
    values -= column([s.frequency_penalty for s in sampling]) * occurrences
    logits.view(-1)[places] = values
