"""Runs a step through the model: all tokens of all sequences in one forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fastchat_grpc.engine.attention import (
    PACKED,
    CannotPack,
    PagedStep,
    Prefill,
    Shape,
    for_devices,
    make_pools,
    register,
)
from fastchat_grpc.engine.cpu_llama import CpuLlama, Unsuitable
from fastchat_grpc.engine.lengths import limits_sight, short_windows, turns_by_length
from fastchat_grpc.engine.probe import Probe
from fastchat_grpc.engine.request import Batch, Chunk, Sequence
from fastchat_grpc.engine.step_model import StepModel, TransformersModel
from fastchat_grpc.native.kernels import Kernels, Pools, kernels

log = logging.getLogger(__name__)

BLOCK_SIZE = 16
FAST_TOLERANCE = 0.01
PROBE_TOLERANCE = 0.05
INT8_TOLERANCE = 0.1
"""Relative error. A model that packing does not suit is off by about 1. One with 8-bit inputs is off by about
0.02 whatever is done differently, since any rounding may move an input by a whole level."""


@dataclass(frozen=True, slots=True)
class StepLogits:
    """Logits of a step, float32, for the rows that somebody wants."""

    logits: torch.Tensor
    """(rows, vocabulary)"""
    sampled: list[int]
    """The row of each of `Batch.sampled`."""
    prompts: Rows[tuple[Chunk, Iterable[torch.Tensor]]]
    """Chunks whose every token's logits are wanted, and these: (some tokens, vocabulary) one after the other. To be
    taken once, before the next step."""


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Bytes of a cache."""

    per_token: int
    per_sequence: int = 0
    """Whatever its length, as a recurrent state."""


class ModelRunner(Protocol):
    """Computes chunks, and owns what it keeps of sequences."""

    whole_prompts: bool
    """Whether a prompt must be computed in one chunk."""
    reuses_prefixes: bool
    """Whether blocks of one sequence can serve another."""

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        ...

    def cache_sizes(self) -> dict[torch.device, CacheSize]:
        """What a sequence's cache takes on each device."""
        ...

    def run(self, batch: Batch) -> StepLogits:
        """Compute the batch, then carry out its forks."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Free what is kept for a sequence beside the block pool."""
        ...


class PackedRunner:
    """For models whose attention goes through transformers' AttentionInterface: one ragged row, a paged cache."""

    whole_prompts = False
    reuses_prefixes = True

    def __init__(
        self,
        model: StepModel,
        device: torch.device,
        shapes: Rows[Shape],
        activate: Callable[[str], None],
        native: Kernels | None,
    ) -> None:
        """`device`: where inputs go; `shapes`: what each layer stores of a token."""
        self.model = model
        self._activate = activate
        self.device = device
        self._shapes = shapes
        on_cpu = all(dtype == torch.float32 and device.type == "cpu" for *_, dtype, device in self._shapes)
        self._kernels = native if on_cpu else None
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._pools: Pools | None = None

    def cache_sizes(self) -> dict[torch.device, CacheSize]:
        sizes: dict[torch.device, int] = {}
        for heads, k, v, dtype, device in self._shapes:
            sizes[device] = sizes.get(device, 0) + heads * (k + v) * dtype.itemsize
        return {device: CacheSize(size) for device, size in sizes.items()}

    def allocate(self, block_count: int) -> None:
        """Make the cache."""
        self._keys, self._values = make_pools(self._shapes, block_count * BLOCK_SIZE)
        self._pools = Pools(self._keys, self._values)

    def run(self, batch: Batch) -> StepLogits:
        logits_rows = LogitsRows(batch)
        parts = [self._forward(chunks, adapter, logits_rows) for adapter, chunks in by_adapter(batch).items()]
        for parent, child in batch.forks:
            self._fork(parent, child)
        return logits_rows.result(parts)

    def _forward(self, chunks: list[Chunk], adapter: str, logits_rows: LogitsRows) -> torch.Tensor:
        step, input_ids, positions = self._pack(chunks)
        rows = torch.tensor(logits_rows.rows(chunks), dtype=torch.int64)
        self._activate(adapter)
        return self.model.forward(for_devices(step), self._tensor(input_ids), self._tensor(positions), rows)

    def release(self, sequence: Sequence) -> None:
        sequence.runner_state = None

    def _pack(self, chunks: Rows[Chunk]) -> tuple[PagedStep, NDArray[np.int64], NDArray[np.int64]]:
        decoding = sum(chunk.count == 1 for chunk in chunks)
        contexts = [_slots(chunk.sequence, chunk.start + chunk.count) for chunk in chunks]
        lengths = np.array([len(slots) for slots in contexts[:decoding]], dtype=np.int64)
        padded = np.zeros((decoding, max(lengths, default=0)), dtype=np.int64)
        for row, slots in zip(padded, contexts, strict=False):
            row[: len(slots)] = slots
        prefills, begin = [], decoding
        for chunk, slots in zip(chunks[decoding:], contexts[decoding:], strict=True):
            prefills.append(Prefill(begin, begin + chunk.count, torch.from_numpy(slots)))
            begin += chunk.count
        slot_mapping = np.concatenate([slots[c.start :] for c, slots in zip(chunks, contexts, strict=True)])
        tensors = tuple(map(torch.from_numpy, (slot_mapping, padded, lengths)))
        kernels = self._kernels
        step = PagedStep(
            keys=self._keys,
            values=self._values,
            slot_mapping=tensors[0],
            contexts=tensors[1],
            lengths=tensors[2],
            prefills=tuple(prefills),
            kernels=None if kernels is None or self._pools is None else kernels.step(self._pools, *tensors),
        )
        input_ids = [t for c in chunks for t in c.sequence.tokens[c.start : c.start + c.count]]
        positions = np.concatenate([np.arange(c.start, c.start + c.count) for c in chunks])
        return step, np.array(input_ids, dtype=np.int64), positions

    def _fork(self, parent: Sequence, child: Sequence) -> None:
        """Copy the block that is not full; full ones are shared already."""
        for source, target in zip(parent.table.blocks, child.table.blocks, strict=False):
            if source != target:
                a, b = source * BLOCK_SIZE, target * BLOCK_SIZE
                for cache in (*self._keys, *self._values):
                    cache[b : b + BLOCK_SIZE] = cache[a : a + BLOCK_SIZE]

    def _tensor(self, array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


class _Slots:
    """Slots of a sequence's tokens in the pools, as numbers that grow with its table."""

    __slots__ = ("blocks", "known", "slots")

    def __init__(self, blocks: list[int]) -> None:
        self.blocks = blocks
        self.known = 0
        self.slots = np.zeros(0, dtype=np.int64)


def _slots(sequence: Sequence, count: int) -> NDArray[np.int64]:
    """Slots of a sequence's first tokens."""
    state: _Slots | None = sequence.runner_state
    blocks = sequence.table.blocks
    # A preempted sequence comes back with another list.
    if state is None or state.blocks is not blocks:
        state = sequence.runner_state = _Slots(blocks)
    if state.known < len(blocks):
        fresh = np.array(blocks[state.known :], dtype=np.int64)[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)
        state.slots = np.concatenate((state.slots, fresh.reshape(-1)))
        state.known = len(blocks)
    return state.slots[:count]


def by_adapter(batch: Batch) -> dict[str, list[Chunk]]:
    """Chunks by the LoRA adapter that they run with, in the order of the batch."""
    groups: dict[str, list[Chunk]] = {}
    for chunk in batch.chunks:
        groups.setdefault(chunk.sequence.request.adapter, []).append(chunk)
    return groups


class LogitsRows:
    """Keeps account of whose logits are where, while a batch runs in parts."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._last: dict[int, int] = {}
        self._prompts: list[tuple[Chunk, int]] = []
        self._count = 0

    def rows(self, chunks: Rows[Chunk]) -> list[int]:
        """Rows of the next part, one for each token of its chunks, whose logits are wanted."""
        rows: list[int] = []
        begin = 0
        for chunk in chunks:
            if wants_every(chunk):
                self._prompts.append((chunk, self._count + len(rows)))
                rows.extend(range(begin, begin + chunk.count))
            elif chunk.samples:
                rows.append(begin + chunk.count - 1)
            self._last[id(chunk.sequence)] = self._count + len(rows) - 1
            begin += chunk.count
        self._count += len(rows)
        return rows

    def result(self, parts: list[torch.Tensor]) -> StepLogits:
        """The parts' logits together."""
        sampled = [self._last[id(chunk.sequence)] for chunk in self._batch.chunks if chunk.samples]
        sampled += [self._last[id(parent)] for parent, _ in self._batch.forks]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        prompts = [(chunk, [logits[first : first + chunk.count]]) for chunk, first in self._prompts]
        return StepLogits(logits, sampled, prompts)


def wants_every(chunk: Chunk) -> bool:
    """Whether log probabilities of the prompt ask for the logits of all tokens of a chunk."""
    return chunk.sequence.request.wants_prompt_logprobs and chunk.start < chunk.sequence.prompt_length


def make_packed_runner(
    model: Any,
    activate: Callable[[str], None],
    *,
    rounds_inputs: bool = False,
    fast: bool = True,
    context_length: int | None = None,
) -> PackedRunner | None:
    """A PackedRunner if the model computes the same with it as without, else None and the model as it was.

    Args:
        rounds_inputs: the model's layers round their inputs, to 8 bits.
        fast: allow kernels, and a model written for CPUs; they are kept only if they change nothing either.
        context_length: longest sequence that will come; None: any.
    """
    log.info("checking that requests can share a step without a change of their outputs")
    before = model.config._attn_implementation
    packed = TransformersModel(model)
    register()
    try:
        if turns_by_length(model.config, context_length):
            raise CannotPack("its rotary embedding depends on the longest sequence of a step")
        model.set_attn_implementation(PACKED)
        probes = _probes(model, context_length)
        _check(probes, packed, INT8_TOLERANCE if rounds_inputs else PROBE_TOLERANCE, None)
    except Exception as error:
        log.info("packed attention does not suit this model: %s", error)
        model.set_attn_implementation(before)
        return None
    native = kernels() if fast else None
    if native is not None and not (native.parallel or rounds_inputs):
        native = None  # torch's many threads are faster than our one
    device: torch.device = model.get_input_embeddings().weight.device
    chosen: StepModel = packed
    if native is not None:
        try:
            chosen = _cpu_llama(model, probes, native, INT8_TOLERANCE if rounds_inputs else FAST_TOLERANCE)
        except Unsuitable as error:
            log.info("the model runs as transformers wrote it: %s", error)
        except Exception as error:  # a model whose code is another than its names say
            log.warning("the fast path for CPUs does not suit this model, and is left out: %s", error)
            native = None
    return PackedRunner(chosen, device, probes[0].shapes, activate, native)


def _cpu_llama(model: Any, probes: list[Probe], native: Kernels, tolerance: float) -> CpuLlama:
    """The model as written for CPUs. Raises Unsuitable, or CannotPack where it computes something else."""
    llama = CpuLlama(model, native)
    _check(probes, llama, tolerance, native, windows=llama.layers)
    llama.share_weights()
    log.info("%d layers run on the fast path for CPUs", len(llama.layers))
    return llama


def _probes(model: Any, context_length: int | None) -> list[Probe]:
    """The model as it is; and with short windows, where it has any."""
    plain = Probe(model)
    with short_windows(model) as has_windows:
        short = Probe(model) if has_windows else plain
    if torch.equal(short.expected, plain.expected):
        longest = context_length or model.config.get_text_config().max_position_embeddings
        if any(limits_sight(mask, longest) for mask in plain.masks):
            raise CannotPack("its attention is limited in a way that cannot be tried out")
        return [plain]
    return [plain, short]


def _check(
    probes: list[Probe], model: StepModel, tolerance: float, native: Kernels | None, windows: Iterable[Any] = ()
) -> None:
    """Raise CannotPack where a model computes something else. `windows`: who holds any, besides transformers' model."""
    for i, probe in enumerate(probes):
        with short_windows(probe.model, windows) if i > 0 else nullcontext():
            if not (probe.passes(model, tolerance) and probe.decodes(model, tolerance, native)):
                raise CannotPack(f"the output is off by {probe.error:.2g}")
