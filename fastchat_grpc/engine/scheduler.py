"""Which tokens of which sequences run in the next step. Pure: no model, no clock, no thread."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastchat_grpc.engine.kv_cache import BlockPool
from fastchat_grpc.engine.request import Batch, Chunk, Sequence

GROW_AFTER_STEPS = 64
SMALLEST_CHUNK_BLOCKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Sizes of a step."""

    max_running: int
    prefill_tokens: int
    """Prompt tokens per step at most."""
    step_seconds: float = 0.25
    """What a running stream should wait for between two tokens; prefill chunks are cut to it."""
    logprob_tokens: int = 2**31 - 1
    """Of these, those of prompts that want log probabilities, which take a row of logits each."""
    reuse_prefixes: bool = True
    whole_prompts: bool = False
    """Never split a prompt and never repeat a step, for models whose own state moves on with every call."""


class Scheduler:
    """Continuous batching: sequences join and leave at every step.

    Running sequences come first, each with one token; what the step's budget leaves goes to prompts, the
    shortest rest first, so that a short prompt is never stuck behind a long one, but always a part to the
    oldest. A sequence joins when the pool has room for all its tokens. When the pool runs dry, the
    youngest of the lowest priority gives its blocks back and computes them again later.
    """

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self.pool = pool
        self.limits = limits
        self.on_free: Callable[[Sequence], None] = lambda sequence: None
        """Told of every sequence that loses its blocks, for what is kept of it beside them."""
        self.waiting: list[Sequence] = []  # sorted by order
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._max_running = limits.max_running
        self._prefill_tokens = limits.prefill_tokens
        self._chunk_tokens = float(limits.prefill_tokens)  # of all prefill chunks of a step, as steps are fast or slow
        self._good_steps = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by its priority and age."""
        insort(self.waiting, sequence, key=lambda s: s.order)

    def next_batch(self) -> Batch | None:
        """The next step, or None when there is nothing to run."""
        decodes = self._decode()
        forks: list[tuple[Sequence, Sequence]] = []
        prefills = self._prefill(forks)
        if not decodes and not prefills:
            return None
        # Single tokens first: the runner computes them together. Sorting is stable.
        chunks = sorted((*decodes, *prefills), key=lambda chunk: chunk.count > 1)
        return Batch(tuple(chunks), tuple(forks))

    def commit(self, batch: Batch) -> None:
        """Account for a step that ran. Call before the sampled tokens are appended."""
        for chunk in batch.chunks:
            chunk.sequence.computed = chunk.start + chunk.count
            self._publish(chunk.sequence)
        for parent, child in batch.forks:
            child.computed = parent.computed
            self._publish(child)

    def pace(self, batch: Batch, seconds: float) -> None:
        """Note how long a step took; prompts are cut finer where machine, model or context make steps slow."""
        tokens = sum(chunk.count for chunk in batch.chunks if chunk.count > 1)
        if tokens * 2 < self._chunk_tokens:  # a small step says little of a large one
            return
        fitting = tokens * self.limits.step_seconds / max(seconds, 1e-6)
        smallest = SMALLEST_CHUNK_BLOCKS * self.pool.block_size
        self._chunk_tokens = min(max((self._chunk_tokens + fitting) / 2, smallest), self.limits.prefill_tokens)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free what it holds; harmless if it is not here."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._free(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Give back a running sequence's blocks; it computes its tokens again when there is room."""
        self.running.remove(sequence)
        self._free(sequence)
        self.add(sequence)
        self.preemptions += 1

    def shrink(self, batch: Batch) -> bool:
        """Make the next steps smaller, after one that ran out of memory. False if they cannot be."""
        for _, child in batch.forks:
            self.preempt(child)
        if self.limits.whole_prompts:
            # Some of them have moved on and some have not: all begin again.
            for chunk in batch.chunks:
                self.preempt(chunk.sequence)
        smallest = self.limits.whole_prompts or self._prefill_tokens <= self.pool.block_size
        if len(batch.chunks) == 1 and (batch.chunks[0].count == 1 or smallest):
            return False
        self._max_running = max(1, len(batch.chunks) // 2)
        self._prefill_tokens = max(self.pool.block_size, self._prefill_tokens // 2)
        self._good_steps = 0
        for sequence in sorted(self.running, key=lambda s: s.order)[self._max_running :]:
            self.preempt(sequence)
        return True

    def grow(self) -> None:
        """Note a step that went well; after some, try larger ones again."""
        self._good_steps += 1
        if self._good_steps % GROW_AFTER_STEPS == 0:
            self._max_running = min(self._max_running * 2, self.limits.max_running)
            self._prefill_tokens = min(self._prefill_tokens * 2, self.limits.prefill_tokens)

    def requeue_followers(self, sequence: Sequence) -> None:
        """Let sequences that waited for this one's prefill run by themselves."""
        followers, sequence.followers = sequence.followers, []
        for follower in followers:
            if not follower.finished:
                self.add(follower)

    def _decode(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in sorted(self.running, key=lambda s: s.order):
            if sequence not in self.running or _prefilling(sequence):
                continue
            if self._make_room(sequence):
                chunks.append(Chunk(sequence, sequence.computed, 1, samples=True))
        return [chunk for chunk in chunks if chunk.sequence in self.running]

    def _make_room(self, sequence: Sequence) -> bool:
        """Get the sequence a block for its next token, from the youngest others if need be."""
        if self.pool.blocks_for(len(sequence.tokens)) <= len(sequence.table.blocks):
            return True
        while self.pool.available == 0:
            youngest = max(self.running, key=lambda s: s.order)
            self.preempt(youngest)
            if youngest is sequence:
                return False
        sequence.table.blocks.append(self.pool.allocate())
        return True

    def _prefill(self, forks: list[tuple[Sequence, Sequence]]) -> list[Chunk]:
        budget = min(self._prefill_tokens, int(self._chunk_tokens))
        started = [s for s in self.running if _prefilling(s)]
        joined = self._admit(budget, sum(len(s.tokens) - s.computed for s in started))
        chunks = []
        for sequence, count in self._shares(started + joined, budget):
            samples = sequence.computed + count == len(sequence.tokens)
            chunks.append(Chunk(sequence, sequence.computed, count, samples))
            if samples:
                forks.extend((sequence, child) for child in self._fork(sequence))
        return chunks

    def _shares(self, sequences: list[Sequence], budget: int) -> list[tuple[Sequence, int]]:
        """Split the budget: the oldest gets a quarter, then the shortest rest is served first."""
        if not sequences:
            return []
        if self.limits.whole_prompts:
            return [(s, len(s.tokens) - s.computed) for s in sequences]
        most = self._most(sequences)
        oldest = min(sequences, key=lambda s: s.order)
        shares = {id(oldest): min(max(budget // 4, 1), most[id(oldest)])}
        budget -= shares[id(oldest)]
        for sequence in sorted(sequences, key=lambda s: (len(s.tokens) - s.computed, s.order)):
            share = min(most[id(sequence)] - shares.get(id(sequence), 0), budget)
            shares[id(sequence)] = shares.get(id(sequence), 0) + share
            budget -= share
        return [(s, shares[id(s)]) for s in sequences if shares[id(s)] > 0]

    def _most(self, sequences: list[Sequence]) -> dict[int, int]:
        """What each sequence may compute in a step, the budget aside."""
        logprob_tokens = self.limits.logprob_tokens
        most: dict[int, int] = {}
        for sequence in sorted(sequences, key=lambda s: s.order):
            count = len(sequence.tokens) - sequence.computed
            if sequence.request.wants_prompt_logprobs:
                count = min(count, logprob_tokens)
                logprob_tokens -= count
            most[id(sequence)] = count
        return most

    def _admit(self, budget: int, promised: int) -> list[Sequence]:
        """Let waiting sequences join while there are slots, blocks, and tokens left in this step.

        `promised` is what is left of the prompts that have begun. A step always has room for one more
        sequence beside a long prompt, which is why shares are split by the shortest rest.
        """
        joined: list[Sequence] = []
        tokens = min(promised, budget // 2)
        while self.waiting and len(self.running) < self._max_running and tokens < budget:
            sequence = self.waiting[0]
            if not self._claim(sequence):
                break
            self.waiting.pop(0)
            self.running.append(sequence)
            joined.append(sequence)
            tokens += len(sequence.tokens) - sequence.computed
        return joined

    def _claim(self, sequence: Sequence) -> bool:
        """Give a sequence blocks for all its tokens, shared ones first. False where the pool has no room."""
        cached: list[tuple[int, int]] = []
        if self.limits.reuse_prefixes and not sequence.request.wants_prompt_logprobs:
            # The last token is always computed, for its logits.
            cached = self.pool.match(sequence.tokens[:-1], sequence.request.adapter)
        for _, block in cached:
            self.pool.share(block)
        # One spare block for each running sequence's next tokens, or joining would only preempt somebody.
        needed = self.pool.blocks_for(len(sequence.tokens)) - len(cached)
        spare = min(len(self.running), self.pool.block_count // 16)
        if needed + spare > self.pool.available:
            self.pool.release([block for _, block in cached])
            return False
        table = sequence.table
        table.blocks = [block for _, block in cached]
        table.published = len(cached)
        table.node = cached[-1][0] if cached else table.node
        table.blocks.extend(self.pool.allocate() for _ in range(needed))
        sequence.computed = len(cached) * self.pool.block_size
        return True

    def _fork(self, parent: Sequence) -> Iterable[Sequence]:
        """Let the parent's followers share its prompt; those without room wait and run by themselves."""
        followers, parent.followers = parent.followers, []
        full = len(parent.tokens) // self.pool.block_size
        needed = self.pool.blocks_for(len(parent.tokens)) - full
        for child in followers:
            if child.finished:
                continue
            if len(self.running) >= self._max_running or self.pool.available < needed + len(self.running):
                self.add(child)
                continue
            for block in parent.table.blocks[:full]:
                self.pool.share(block)
            child.table.blocks = parent.table.blocks[:full] + [self.pool.allocate() for _ in range(needed)]
            self.running.append(child)
            yield child

    def _publish(self, sequence: Sequence) -> None:
        if not self.limits.reuse_prefixes:
            return
        table, size = sequence.table, self.pool.block_size
        while (table.published + 1) * size <= sequence.computed:
            start = table.published * size
            block = table.blocks[table.published]
            table.node = self.pool.publish(table.node, sequence.tokens, start, sequence.request.adapter, block)
            table.published += 1

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.table.blocks)
        sequence.table.clear()
        sequence.computed = 0
        self.on_free(sequence)


def _prefilling(sequence: Sequence) -> bool:
    """Whether a prompt, or what was preempted, is still to be computed. Whoever has followers must pass it on."""
    return len(sequence.tokens) - sequence.computed > 1 or bool(sequence.followers)
