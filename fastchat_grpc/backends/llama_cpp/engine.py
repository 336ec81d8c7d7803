"""Continuous batching over llama.cpp's low-level interface. Everything here runs in the engine's thread.

One step decodes one batch: the last token of every sequence that generates, and as many tokens of waiting
prompts as fit. All sequences share one KV cache. A slot keeps its tokens when its request is over, so a later
prompt that begins alike, or a further choice of the same prompt, starts from there. Where the cache is full,
kept tokens go first, then the youngest sequence: it begins again later, from its tokens.

Source: `llama.h` of llama.cpp (llama_decode, llama_memory_*, llama_sampler_*), and its server for the scheduling.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from fastchat_grpc.backends.driver import token_logprob
from fastchat_grpc.backends.llama_cpp.sampler import Sampler
from fastchat_grpc.core import TokenLogprob
from fastchat_grpc.errors import BackendFailed, OutOfMemory
from fastchat_grpc.text.batch import Output, Running
from fastchat_grpc.text.tokenizer import Tokenizer

NO_ROOM = 1  # llama_decode: no place in the KV cache for the batch
MIN_SHARED_TOKENS = 16
"""A shorter common beginning is not worth keeping order for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Sizes of a llama.cpp context."""

    slots: int
    kv_cache_tokens: int
    prefill_tokens: int
    """Tokens per step, those of generating sequences included."""
    prefix_cache: bool


@dataclass(slots=True, eq=False)
class _Slot:
    """One sequence id of llama.cpp. `tokens` are those in the KV cache, in order."""

    seq_id: int
    tokens: list[int] = field(default_factory=list)
    work: _Work | None = None
    used_at: int = 0


@dataclass(slots=True, eq=False)
class _Work:
    """A sequence in a slot: the tokens that it is made of, and how the next is chosen."""

    running: Running
    sampler: Sampler
    token_ids: list[int]
    """Prompt and output so far; the last output token is not in the KV cache yet."""
    made: int = 0
    started: bool = False
    cached_tokens: int = 0
    scores: list[TokenLogprob] = field(default_factory=list)

    @property
    def scoring(self) -> bool:
        """Whether the logits of the prompt's tokens are still wanted."""
        return self.running.scores_prompt and self.made == 0


@dataclass(frozen=True, slots=True)
class _Share:
    """Tokens of a batch that belong to one slot, and where its logits are."""

    slot: _Slot
    count: int
    first_row: int


class LlamaEngine:
    """Implements `text.batch.BatchEngine`.

    Args:
        llama: the module llama_cpp.
        model: llama_model_p, freed by `close`.
        context: llama_context_p with `limits`, freed by `close`.
        on_close: frees what else belongs to the model, before the model itself.
    """

    shares_prompts = False

    def __init__(
        self,
        llama: Any,
        model: Any,
        context: Any,
        tokenizer: Tokenizer,
        limits: EngineLimits,
        on_close: Callable[[], None],
    ) -> None:
        self._llama = llama
        self._on_close = on_close
        self._model = model
        self._context = context
        self._memory = llama.llama_get_memory(context)
        self._tokenizer = tokenizer
        self._limits = limits
        self._batch = llama.llama_batch_init(limits.prefill_tokens, 0, 1)
        self._slots = [_Slot(seq_id=i) for i in range(limits.slots)]
        self._waiting: deque[_Work] = deque()
        self._active: list[_Slot] = []  # in order of arrival
        self._clock = 0
        self.processed_tokens = 0

    @property
    def busy(self) -> bool:
        return bool(self._active or self._waiting)

    @property
    def kv_cache_usage(self) -> float:
        """Part of the KV cache that running sequences use; shared tokens count for each."""
        return min(1.0, self._used_tokens() / self._limits.kv_cache_tokens)

    @property
    def kv_free_tokens(self) -> int:
        """Tokens that the KV cache has room for."""
        return max(0, self._limits.kv_cache_tokens - self._used_tokens())

    def _used_tokens(self) -> int:
        return sum(len(slot.tokens) for slot in list(self._active))

    def add(self, running: Running) -> None:
        sampler = Sampler(self._llama, self._model, self._context, self._tokenizer, running)
        self._waiting.append(_Work(running, sampler, list(running.token_ids)))

    def remove(self, running: Running) -> None:
        for work in self._waiting:
            if work.running is running:
                self._waiting.remove(work)
                work.sampler.free()
                return
        for slot in self._active:
            if slot.work is not None and slot.work.running is running:
                self._release(slot)
                return

    def step(self) -> Iterator[Output]:
        self._admit()
        shares = self._decode()
        for share in shares:
            yield from self._commit_safely(share)

    def reset(self) -> None:
        for work in self._waiting:
            work.sampler.free()
        self._waiting.clear()
        for slot in list(self._active):
            self._release(slot)
        for slot in self._slots:
            slot.tokens = []
        self._llama.llama_memory_clear(self._memory, True)

    def close(self) -> None:
        self.reset()
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._on_close()
        self._llama.llama_model_free(self._model)

    # Slots.

    def _admit(self) -> None:
        """Give waiting sequences a slot while there is one, and room for their tokens."""
        while self._waiting and len(self._active) < len(self._slots):
            work = self._waiting[0]
            used = sum(len(slot.work.token_ids) for slot in self._active if slot.work is not None)
            if self._active and used + len(work.token_ids) >= self._limits.kv_cache_tokens:
                return
            self._waiting.popleft()
            slot = self._choose_slot(work)
            slot.work = work
            self._active.append(slot)
            if not work.made:
                work.cached_tokens = len(slot.tokens)

    def _choose_slot(self, work: _Work) -> _Slot:
        """A free slot that holds as much of the beginning as any does; the rest of what it holds is dropped."""
        free = [slot for slot in self._slots if slot.work is None]
        if not self._limits.prefix_cache or work.scoring:
            slot = min(free, key=lambda slot: (len(slot.tokens) > 0, slot.used_at))
            self._forget(slot)
            return slot
        # At least one token is decoded anew, for its logits.
        wanted = work.token_ids[:-1]
        slot = max(free, key=lambda slot: (_common(slot.tokens, wanted), -len(slot.tokens), -slot.used_at))
        source = max(self._slots, key=lambda slot: _common(slot.tokens, wanted))
        own, best = _common(slot.tokens, wanted), _common(source.tokens, wanted)
        if best >= own + MIN_SHARED_TOKENS:
            slot = min(free, key=lambda slot: (len(slot.tokens) > 0, slot.used_at))
            if slot is not source:
                self._forget(slot)
                self._llama.llama_memory_seq_cp(self._memory, source.seq_id, slot.seq_id, 0, best)
                slot.tokens = source.tokens[:best]
                return slot
        self._truncate(slot, own if own >= MIN_SHARED_TOKENS else 0)
        return slot

    def _truncate(self, slot: _Slot, length: int) -> None:
        if length < len(slot.tokens):
            if not self._llama.llama_memory_seq_rm(self._memory, slot.seq_id, length, -1):
                length = 0
                self._llama.llama_memory_seq_rm(self._memory, slot.seq_id, -1, -1)
            del slot.tokens[length:]

    def _forget(self, slot: _Slot) -> None:
        self._llama.llama_memory_seq_rm(self._memory, slot.seq_id, -1, -1)
        slot.tokens = []

    def _release(self, slot: _Slot) -> None:
        """The sequence is over; its tokens stay for later prompts while there is room."""
        assert slot.work is not None
        slot.work.sampler.free()
        slot.work = None
        self._active.remove(slot)
        self._clock += 1
        slot.used_at = self._clock
        if not self._limits.prefix_cache:
            self._forget(slot)

    def _make_room(self) -> None:
        """Free a part of the KV cache: the tokens kept longest ago, else those of the youngest sequence."""
        idle = [slot for slot in self._slots if slot.work is None and slot.tokens]
        if idle:
            self._forget(min(idle, key=lambda slot: slot.used_at))
            return
        if len(self._active) == 1:
            raise OutOfMemory("the KV cache has no room for this request, even alone; raise kv_cache_tokens")
        slot = self._active.pop()
        assert slot.work is not None
        self._waiting.appendleft(slot.work)
        slot.work = None
        self._forget(slot)

    # Batches.

    def _decode(self) -> list[_Share]:
        while True:
            shares = self._fill_batch()
            if not shares:
                return []
            result = self._llama.llama_decode(self._context, self._batch)
            if result == 0:
                break
            if result != NO_ROOM:
                raise BackendFailed(f"llama.cpp cannot decode a batch (code {result})")
            self._make_room()
        for share in shares:
            start = len(share.slot.tokens)
            assert share.slot.work is not None
            share.slot.tokens += share.slot.work.token_ids[start : start + share.count]
            self.processed_tokens += share.count
        return shares

    def _fill_batch(self) -> list[_Share]:
        """Every generating sequence has its next token in; then prompts, the oldest first, while there is room."""
        self._batch.n_tokens = 0
        shares = []
        generating = [slot for slot in self._active if _missing(slot) == 1]
        reading = [slot for slot in self._active if _missing(slot) > 1]
        for slot in (*generating, *reading):
            count = min(_missing(slot), self._limits.prefill_tokens - self._batch.n_tokens)
            if count:
                shares.append(self._put(slot, count))
        return shares

    def _put(self, slot: _Slot, count: int) -> _Share:
        work, batch = slot.work, self._batch
        assert work is not None
        first_row, start = batch.n_tokens, len(slot.tokens)
        for row, position in enumerate(range(start, start + count), start=first_row):
            batch.token[row] = work.token_ids[position]
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = slot.seq_id
            batch.logits[row] = work.scoring or position == len(work.token_ids) - 1
        batch.n_tokens = first_row + count
        return _Share(slot, count, first_row)

    def _commit_safely(self, share: _Share) -> Iterator[Output]:
        """As `_commit`; what goes wrong with one sequence, such as its grammar, ends that one alone."""
        assert share.slot.work is not None
        running = share.slot.work.running
        try:
            yield from self._commit(share)
        except Exception as error:
            self._release(share.slot)
            yield Output(running, error=error)

    def _commit(self, share: _Share) -> Iterator[Output]:
        """What a share of the batch brought: log probabilities of the prompt, the next token."""
        slot, work = share.slot, share.slot.work
        assert work is not None
        if not work.started:
            work.started = True
            yield Output(work.running, started_at=monotonic(), cached_tokens=work.cached_tokens)
        if work.scoring:
            self._score(share, work)
        if _missing(slot) > 0:
            return
        if work.scoring:
            yield Output(work.running, prompt_logprobs=tuple(work.scores))
        row = share.first_row + share.count - 1
        token_id = work.sampler.sample(row)
        logprobs: tuple[TokenLogprob, ...] = ()
        alternatives = work.running.job.request.output.logprobs
        if alternatives is not None:
            logprobs = (self._logprob(row, token_id, alternatives),)
        work.made += 1
        work.token_ids.append(token_id)
        yield Output(work.running, (token_id,), logprobs)

    def _score(self, share: _Share, work: _Work) -> None:
        """Log probabilities of the prompt's tokens: each from the logits of the one before."""
        alternatives = work.running.job.request.output.prompt_logprobs or 0
        end = len(share.slot.tokens)
        if not work.scores:
            work.scores.append(token_logprob(self._tokenizer, work.token_ids[0], None))
        for row, position in enumerate(range(end - share.count, end), start=share.first_row):
            if position + 1 < len(work.token_ids):
                work.scores.append(self._logprob(row, work.token_ids[position + 1], alternatives))

    def _logprob(self, row: int, token_id: int, alternatives: int) -> TokenLogprob:
        """From the raw logits, before any sampler."""
        import numpy as np

        pointer = self._llama.llama_get_logits_ith(self._context, row)
        logits = np.ctypeslib.as_array(pointer, (self._tokenizer.vocabulary_size,)).astype(np.float64)
        highest = float(logits.max())
        total = highest + float(np.log(np.exp(logits - highest).sum()))
        top: list[tuple[int, float]] = []
        if alternatives:
            best = np.argpartition(logits, -alternatives)[-alternatives:]
            best = best[np.argsort(-logits[best], kind="stable")]
            top = [(int(i), float(logits[i]) - total) for i in best]
        return token_logprob(self._tokenizer, token_id, float(logits[token_id]) - total, top)


def _missing(slot: _Slot) -> int:
    """Tokens of a slot's sequence that are not in the KV cache yet."""
    assert slot.work is not None
    return len(slot.work.token_ids) - len(slot.tokens)


def _common(held: Sequence[int], wanted: Sequence[int]) -> int:
    """Length of the common beginning."""
    limit = min(len(held), len(wanted))
    if held[:limit] == wanted[:limit]:
        return limit
    return next(i for i in range(limit) if held[i] != wanted[i])


def embed(llama: Any, context: Any, token_ids: Sequence[int], size: int, chunk: int) -> list[float]:
    """The mean of a text's last hidden states, from a context of its own that gives embeddings per token."""
    import numpy as np

    memory = llama.llama_get_memory(context)
    llama.llama_memory_clear(memory, True)
    total = np.zeros(size, dtype=np.float64)
    batch = llama.llama_batch_init(chunk, 0, 1)
    try:
        for start in range(0, len(token_ids), chunk):
            piece = token_ids[start : start + chunk]
            for row, token_id in enumerate(piece):
                batch.token[row] = token_id
                batch.pos[row] = start + row
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = 0
                batch.logits[row] = True
            batch.n_tokens = len(piece)
            result = llama.llama_decode(context, batch)
            if result != 0:
                raise BackendFailed(f"llama.cpp cannot embed a text (code {result})")
            for row in range(len(piece)):
                pointer = llama.llama_get_embeddings_ith(context, row)
                total += np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (size,))
    finally:
        llama.llama_batch_free(batch)
    return [float(x) for x in total / len(token_ids)]
