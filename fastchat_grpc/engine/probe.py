"""Checks, when a model is loaded, that over packed steps it computes what transformers does in its own way."""

from __future__ import annotations

from typing import Any

import torch

from fastchat_grpc.engine.attention import (
    PagedStep,
    Prefill,
    Shape,
    Step,
    WholeStep,
    for_devices,
    make_pools,
    masks_of,
)
from fastchat_grpc.engine.step_model import StepModel
from fastchat_grpc.native.kernels import Kernels, Pools

LENGTHS = 7, 5


class Probe:
    """Two short sequences packed, against each one alone, computed by transformers in its own way.

    Short ones show no window: see `lengths.short_windows`.
    """

    def __init__(self, model: Any) -> None:
        embedding = model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        sequences = [torch.randint(embedding.shape[0], (1, n), generator=generator) for n in LENGTHS]
        self.model = model
        self._device: torch.device = embedding.device
        self._ids = torch.cat(sequences, dim=1)[0]
        self._positions = torch.cat([torch.arange(n) for n in LENGTHS])
        with masks_of() as masks:
            alone = [model(input_ids=ids.to(self._device), use_cache=False).logits[0] for ids in sequences]
        self.masks = masks
        """The mask functions that the model made for them."""
        self.expected = torch.cat(alone).float()
        """Logits of each sequence alone, one after the other."""
        self.shapes: list[Shape] = []
        """What each layer stores of a token, known after `passes`."""
        self.error = float("inf")
        """The relative error of the last check."""

    def passes(self, model: StepModel, tolerance: float) -> bool:
        """Whether the sequences as a whole get the same logits, up to a relative error."""
        step = WholeStep(list(LENGTHS))
        everything = torch.arange(len(self._ids))
        logits = self._run(model, step, everything)
        self.shapes = [step.shapes[layer] for layer in sorted(step.shapes)]
        known = bool(step.shapes) and set(step.shapes) == set(range(len(step.shapes)))
        return self._is_close(logits, everything, tolerance) and known

    def decodes(self, model: StepModel, tolerance: float, kernels: Kernels | None) -> bool:
        """Whether the last tokens come out the same in a step of their own, over a cache of those before."""
        count = len(self._ids)
        keys, values = make_pools(self.shapes, count)
        sequences = torch.split(torch.arange(count), list(LENGTHS))
        last = torch.tensor(LENGTHS).cumsum(0) - 1
        before = torch.cat([slots[:-1] for slots in sequences])
        begin = LENGTHS[0] - 1
        chunks = Prefill(0, begin, sequences[0][:-1]), Prefill(begin, len(before), sequences[1][:-1])
        nothing = torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        contexts = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        pools = Pools(keys, values)

        def step(prefills: tuple[Prefill, ...], *tensors: torch.Tensor) -> PagedStep:
            names = zip(("slot_mapping", "contexts", "lengths"), tensors, strict=True)
            native = None if kernels is None else kernels.step(pools, *tensors)
            return PagedStep(keys=keys, values=values, prefills=prefills, kernels=native, **dict(names))

        prompts = step(chunks, before, *nothing)
        decode = step((), last, contexts, torch.tensor(LENGTHS))
        # Of a step only some logits are wanted. A model that makes them all would be read in wrong rows.
        if len(self._run(model, for_devices(prompts), before, keep=1)) != 1:
            return False
        return self._is_close(self._run(model, for_devices(decode), last), last, tolerance)

    def _run(self, model: StepModel, step: Step, indices: torch.Tensor, keep: int | None = None) -> torch.Tensor:
        """Logits of the tokens at `indices`, or of the first ones of them."""
        rows = torch.arange(len(indices) if keep is None else keep)
        return model.forward(step, self._ids[indices].to(self._device), self._positions[indices].to(self._device), rows)

    def _is_close(self, logits: torch.Tensor, indices: torch.Tensor, tolerance: float) -> bool:
        expected = self.expected[indices.to(self.expected.device)].to(logits.device)
        self.error = float((logits - expected).norm() / expected.norm())
        return self.error < tolerance
