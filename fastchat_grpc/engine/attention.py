"""Attention over a ragged batch: the tokens of many sequences in one row, each with its own past.

Registered with transformers under `PACKED`. A model that calls it runs all its other layers over all
tokens of a step at once. Outside a step it behaves as "sdpa", so that the same model also serves
ordinary padded batches.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fastchat_grpc.native.kernels import StepKernels, rows_are_plain

PACKED = "fastchat_packed"

Shape = tuple[int, int, int, torch.dtype, torch.device]
"""Of what a layer stores of a token: heads, key size, value size, dtype, device."""


class Step(Protocol):
    """One step's attention."""

    @property
    def decode_kernels(self) -> StepKernels | None:
        """The kernels over a step of decoding alone; None where the step is no such, or there are none."""
        ...

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention of the step's tokens; all (tokens, heads, size), of which the last may differ for values."""
        ...


class CannotPack(Exception):
    """The model's attention has a part that packed attention does not have; it needs the generic runner."""


class AttentionContext(threading.local):
    """What attention layers are given beside their arguments, by thread: transformers' interface passes no more.

    It cannot see which model's forward is running: whatever model calls `PACKED` attention in a thread takes part in
    that thread's step, so one forward at a time may run there, and none that leaves layers to other threads. Nor
    does it see what the model does between its layers; that packing changes nothing there is checked when a model is
    loaded (`probe`). A compiled or captured forward would keep the step that it was traced with.
    """

    step: Step | None = None
    masks: list[Any] | None = None
    """Where mask functions are collected that a model asks for; None: nowhere."""


_context = AttentionContext()


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Let the model's attention layers work on `step`, in this thread."""
    _context.step = step
    try:
        yield
    finally:
        _context.step = None


def current_step() -> Step | None:
    """The step that this thread's model works on."""
    return _context.step


@contextmanager
def masks_of() -> Iterator[list[Any]]:
    """Collect the mask functions that a model asks for in this thread, outside a step."""
    masks: list[Any] = []
    _context.masks = masks
    try:
        yield masks
    finally:
        _context.masks = None


def register() -> None:
    """Make `PACKED` known to transformers. Safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        if current_step() is not None:
            return None
        if _context.masks is not None and kwargs.get("mask_function") is not None:
            _context.masks.append(kwargs["mask_function"])
        return sdpa_mask(*args, **kwargs)

    AttentionInterface.register(PACKED, _packed_attention)
    AttentionMaskInterface.register(PACKED, mask)


_SHORT = 256
"""Length of a context up to which the kernel attends to a prefill chunk faster than torch does: 2 to 3 times at 50
tokens, the same at some hundreds."""
_IGNORED = {"position_ids", "cache_position", "use_cache", "is_causal", "output_attentions", "output_hidden_states"}


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The interface of transformers: query (batch, heads, tokens, size) and so on, to (batch, tokens, heads, size)."""
    step = current_step()
    if step is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    for name, argument in kwargs.items():
        if argument is not None and argument is not False and name not in _IGNORED:
            raise CannotPack(f"attention has {name}")
    if attention_mask is not None or query.shape[0] != 1 or not getattr(module, "is_causal", True):
        raise CannotPack("attention is not plainly causal")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = step.attend(
        layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), scale, sliding_window
    )
    return out[None], None


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prefill chunk in a step: its rows, and the slots of its sequence so far."""

    begin: int
    end: int
    context: torch.Tensor
    """(past + new tokens,) slots."""

    @property
    def past(self) -> int:
        """Tokens before the chunk."""
        return len(self.context) - (self.end - self.begin)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedStep:
    """A step over a paged cache. The first `len(lengths)` rows decode, one token of each sequence; then come chunks.

    A slot is a token's place in the pools, as in vLLM's slot mapping.
    """

    keys: list[torch.Tensor]
    """Per layer (slots, heads, size)."""
    values: list[torch.Tensor]
    slot_mapping: torch.Tensor
    """(tokens of the step,) where their keys and values go."""
    contexts: torch.Tensor
    """(decoding tokens, longest context) slots of each one's sequence, itself last; padded with any slot."""
    lengths: torch.Tensor
    """(decoding tokens,) lengths of the contexts."""
    prefills: tuple[Prefill, ...]
    kernels: StepKernels | None = None
    """Over the same pools and slots."""

    def to(self, device: torch.device) -> PagedStep:
        """The step for layers of another device."""
        return replace(
            self,
            slot_mapping=self.slot_mapping.to(device),
            contexts=self.contexts.to(device),
            lengths=self.lengths.to(device),
            prefills=tuple(replace(chunk, context=chunk.context.to(device)) for chunk in self.prefills),
            kernels=None,
        )

    @property
    def decode_kernels(self) -> StepKernels | None:
        return None if self.prefills else self.kernels

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        kernels = self.kernels
        if kernels is not None and rows_are_plain(query) and rows_are_plain(key) and rows_are_plain(value):
            return self._attend_natively(kernels, layer, query, key, value, scale, window)
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(0, self.slot_mapping, key)
        values.index_copy_(0, self.slot_mapping, value)
        decoding = len(self.lengths)
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        if decoding:
            out[:decoding] = attend_decode(query[:decoding], keys, values, self.contexts, self.lengths, scale, window)
        for chunk in self.prefills:
            out[chunk.begin : chunk.end] = self._attend_chunk(chunk, layer, query, key, value, scale, window)
        return out

    def _attend_natively(
        self,
        kernels: StepKernels,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        kernels.store(layer, key, value)
        kv_heads, decoding = key.shape[1], len(self.lengths)
        if not self.prefills:
            return kernels.attend_decode(layer, query, kv_heads, scale, window)
        out = torch.empty(query.shape[0], query.shape[1], value.shape[2])
        if decoding:
            out[:decoding] = kernels.attend_decode(layer, query[:decoding], kv_heads, scale, window)
        for chunk in self.prefills:
            rows = slice(chunk.begin, chunk.end)
            if len(chunk.context) <= _SHORT:
                kernels.attend_chunk(out[rows], layer, query[rows], chunk.context, kv_heads, scale, window)
            else:
                out[rows] = self._attend_chunk(chunk, layer, query, key, value, scale, window)
        return out

    def _attend_chunk(
        self,
        chunk: Prefill,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        rows = slice(chunk.begin, chunk.end)
        if not chunk.past:
            return attend_chunk(query[rows], key[rows], value[rows], scale, window)
        keys, values = self.keys[layer][chunk.context], self.values[layer][chunk.context]
        return attend_chunk(query[rows], keys, values, scale, window)


@dataclass(frozen=True, slots=True)
class MultiDeviceStep:
    """A step of a model whose layers are on other devices than the step was made on, or on several."""

    steps: dict[torch.device, PagedStep]
    decode_kernels: None = None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        return self.steps[query.device].attend(layer, query, key, value, scale, window)


def for_devices(step: PagedStep) -> Step:
    """A step made on the CPU, for the devices of the model's layers."""
    devices = {keys.device for keys in step.keys}
    if devices == {step.slot_mapping.device}:
        return step
    return MultiDeviceStep({device: step.to(device) for device in devices})


def make_pools(shapes: Sequence[Shape], tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Room for so many tokens' keys and values in each layer. Zeros: padding reads arbitrary slots, and no
    garbage may be NaN there."""
    keys = [_zeros((tokens, heads, k), t, d) for heads, k, _, t, d in shapes]
    values = [_zeros((tokens, heads, v), t, d) for heads, _, v, t, d in shapes]
    return keys, values


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. In main memory they are pages that take no memory before something is written to them."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    try:
        pages = mmap.mmap(-1, size)
    except OSError as error:
        raise MemoryError(f"no memory for {size >> 20} MiB of the KV cache: {error}") from error
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)


def attend_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    contexts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """One query token per sequence, (n, heads, size), over contexts gathered from the pool."""
    count, longest = contexts.shape
    gathered_keys = keys[contexts].transpose(1, 2)
    gathered_values = values[contexts].transpose(1, 2)
    positions = torch.arange(longest, device=lengths.device)
    mask = positions < lengths[:, None]
    if window is not None:
        mask &= positions >= lengths[:, None] - window
    # The query heads that share a key head stand where a kernel expects query tokens: no keys are repeated.
    grouped = query.reshape(count, keys.shape[1], -1, query.shape[2])
    out = sdpa(grouped, gathered_keys, gathered_values, attn_mask=mask[:, None, None], scale=scale)
    return out.reshape(count, query.shape[1], values.shape[2])


def attend_chunk(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Successive query tokens, (n, heads, size), over the keys of all tokens up to the last of them."""
    count, total = query.shape[0], keys.shape[0]
    mask = None
    if count < total or window is not None:
        positions = torch.arange(total, device=query.device)
        own = positions[total - count :, None]
        mask = positions <= own
        if window is not None:
            mask &= positions > own - window
    out = sdpa(
        query.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return out[0].transpose(0, 1)


@dataclass(slots=True)
class WholeStep:
    """Whole sequences, one after the other, without a cache. Records what each layer would store."""

    lengths: list[int]
    shapes: dict[int, Shape] = field(default_factory=dict)
    """By layer."""
    decode_kernels: None = None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        self.shapes[layer] = (key.shape[1], key.shape[2], value.shape[2], key.dtype, key.device)
        parts = zip(*(torch.split(x, self.lengths) for x in (query, key, value)), strict=True)
        return torch.cat([attend_chunk(q, k, v, scale, window) for q, k, v in parts])
