"""From logits to tokens: every row by its own request's parameters, all rows at once.

The order, each part skipped where it changes nothing: grammar, logit bias, min_new_tokens, repetition
penalty, presence and frequency penalties, an encoder-decoder's own rules, temperature, top-p, top-k, min-p.
(Penalties before temperature, as in the OpenAI API, vLLM, SGLang and Hugging Face: they mean the same at any
temperature. Hugging Face and vLLM put top-k before top-p.) The last three all keep the likeliest tokens, so
they are found together from a partial sort. Greedy rows (`SamplingParams.greedy`) take the likeliest token
after the penalties.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from fastchat_grpc.engine.output_rules import OutputRules
from fastchat_grpc.engine.penalties import TokenCounts, penalize
from fastchat_grpc.engine.request import Sequence
from fastchat_grpc.engine.rng import uniforms

FIRST_CANDIDATES = 128
"""Tokens that the first partial sort looks at; where they do not reach top_p it looks at more."""
SUM_BLOCK = 256
"""Tokens that are summed before the search for a token, so that it needs no sum over the vocabulary in order."""


class Sampler:
    """Chooses the next tokens. Remembers the last batch's parameters, which rarely change between two steps."""

    def __init__(
        self, eos_token_ids: frozenset[int], rules: OutputRules | None = None, output_tokens: int = 2**31 - 1
    ) -> None:
        self._eos_token_ids = eos_token_ids
        self._rules = rules or None
        self._output_tokens = output_tokens
        self._parameters: _Parameters | None = None

    def forget(self) -> None:
        """Let go of the last batch."""
        self._parameters = None

    def constrain(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> dict[int, Exception]:
        """Forbid in place what grammars do not allow. Returns the errors of grammars that failed, by row."""
        failed: dict[int, Exception] = {}
        for row in self._rows(sequences, logits.device).constrained:
            grammar = sequences[row].grammar
            assert grammar is not None
            try:
                grammar.mask(logits[row])
            except Exception as error:
                failed[row] = error
        return failed

    def sample(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
        """The next token of each sequence, by what `constrain` has left of the logits.

        Args:
            logits: (rows, vocabulary), float32, one row for each sequence; overwritten.
        """
        rows = self._rows(sequences, logits.device)
        self._adjust(logits, sequences, rows)
        if not rows.random:
            return _to_list(logits.argmax(dim=-1))
        tokens = torch.empty(len(sequences), dtype=torch.long, device=logits.device)
        if rows.greedy:
            tokens[rows.greedy_index] = logits[rows.greedy_index].argmax(dim=-1)
        draws = torch.from_numpy(_draws(sequences)).to(logits.device)
        if rows.plain:
            tokens[rows.plain_index] = draw_any(_pick(logits, rows.plain_index), draws[rows.plain_index])
        if rows.truncated:
            candidates = truncate(_pick(logits, rows.truncated_index), rows.top_p, rows.top_k, rows.min_p)
            tokens[rows.truncated_index] = candidates.draw(draws[rows.truncated_index])
        return _to_list(tokens)

    def _rows(self, sequences: Rows[Sequence], device: torch.device) -> _Parameters:
        known = self._parameters
        if known is None or known.sequences != sequences:
            known = self._parameters = _Parameters(list(sequences), device)
        return known

    def _adjust(self, logits: torch.Tensor, sequences: Rows[Sequence], rows: _Parameters) -> None:
        for row in rows.biased:
            bias = sequences[row].request.spec.sampling.logit_bias
            ids = torch.tensor(list(bias), device=logits.device)
            logits[row, ids] += torch.tensor(list(bias.values()), device=logits.device)
        for row in rows.delayed:
            self._suppress_end(logits[row], sequences[row])
        if rows.penalized:
            counts = [_counts(sequences[row]) for row in rows.penalized]
            penalize(logits, rows.penalized, counts, [sequences[row].request.spec.sampling for row in rows.penalized])
        if self._rules is not None:
            for row, sequence in enumerate(sequences):
                self._apply_rules(self._rules, logits[row], sequence)
        if rows.scaled:
            logits /= rows.temperature

    def _apply_rules(self, rules: OutputRules, logits: torch.Tensor, sequence: Sequence) -> None:
        if sequence.grammar is None:  # which says itself what may stand where
            limit = min(sequence.request.spec.stopping.max_new_tokens, self._output_tokens)
            rules.apply(logits, sequence.tokens[sequence.prompt_length :], limit)

    def _suppress_end(self, logits: torch.Tensor, sequence: Sequence) -> None:
        """Forbid what would end the output before min_new_tokens, unless a grammar allows nothing else."""
        stopping = sequence.request.spec.stopping
        if sequence.output_length >= stopping.min_new_tokens:
            return
        ends = set(stopping.stop_token_ids) | (set() if stopping.ignore_eos else self._eos_token_ids)
        ids = torch.tensor(sorted(ends), dtype=torch.long, device=logits.device)
        kept = logits[ids]
        logits[ids] = -torch.inf
        if sequence.grammar is not None and logits.max() == -torch.inf:
            logits[ids] = kept


class _Parameters:
    """Parameters of a batch's rows, as tensors, and which rows need what."""

    def __init__(self, sequences: list[Sequence], device: torch.device) -> None:
        self.sequences = sequences
        rows = [(i, s.request.spec.sampling) for i, s in enumerate(sequences)]
        self.constrained = [i for i, s in enumerate(sequences) if s.grammar is not None]
        self.biased = [i for i, p in rows if p.logit_bias]
        self.delayed = [i for i, s in enumerate(sequences) if s.request.spec.stopping.min_new_tokens]
        self.penalized = [i for i, p in rows if p.penalizes]
        temperatures = [p.temperature if p.scales else 1.0 for _, p in rows]
        self.scaled = any(t != 1.0 for t in temperatures)
        self.temperature = torch.tensor(temperatures, device=device)[:, None]
        self.greedy = [i for i, p in rows if p.greedy]
        self.random = len(self.greedy) < len(rows)
        truncated = [(i, p) for i, p in rows if not p.greedy and p.truncates]
        self.truncated = [i for i, _ in truncated]
        self.plain = [i for i, p in rows if not p.greedy and i not in set(self.truncated)]
        self.greedy_index = torch.tensor(self.greedy, dtype=torch.long, device=device)
        self.truncated_index = torch.tensor(self.truncated, dtype=torch.long, device=device)
        self.plain_index = torch.tensor(self.plain, dtype=torch.long, device=device)
        self.top_p = torch.tensor([p.top_p for _, p in truncated], device=device)
        self.top_k = torch.tensor([p.top_k if p.top_k > 0 else 2**31 - 1 for _, p in truncated], device=device)
        self.min_p = torch.tensor([p.min_p for _, p in truncated], device=device)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may follow: (rows, width) ids with their probabilities, 0 for those that were dropped."""

    ids: torch.Tensor
    probabilities: torch.Tensor

    def draw(self, draws: torch.Tensor) -> torch.Tensor:
        """One id per row; `draws` (rows,) are numbers in [0, 1). The probabilities need not sum to 1."""
        # By id, not by probability: equal logits, common in 16 bits, must not swap places from batch to batch.
        ids, order = self.ids.sort(dim=-1)
        totals = self.probabilities.gather(1, order).double().cumsum(dim=-1)
        return ids.gather(1, _search(totals, draws[:, None] * totals[:, -1:]))[:, 0]


def truncate(logits: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor, min_p: torch.Tensor) -> Candidates:
    """Keep the likeliest tokens of each row, by top-p, then top-k, then min-p.

    All three keep a beginning of the tokens sorted by probability, the first one always. So a partial sort
    is enough once a row's first dropped token is in sight; rows where it is not yet are sorted further.

    Args:
        logits: (rows, vocabulary); top_p, top_k, min_p: (rows,), neutral at 1, a huge number and 0.
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    vocabulary = logits.shape[-1]
    width = min(FIRST_CANDIDATES, vocabulary)
    while True:
        values, ids = logits.topk(width, dim=-1)
        probabilities = (values - total).exp()
        before = probabilities.cumsum(dim=-1) - probabilities
        places = torch.arange(width, device=logits.device)
        keep = (before < top_p[:, None]) & (places < top_k[:, None])
        keep &= probabilities >= min_p[:, None] * probabilities[:, :1]
        keep[:, 0] = True
        if width == vocabulary or not bool(keep[:, -1].any()):
            return Candidates(ids, probabilities * keep)
        width = min(width * 8, vocabulary)


def draw_any(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """One token per row from the whole distribution; overwrites `logits` (rows, vocabulary).

    Finds the block of tokens in which the cumulative probability passes the draw, then the token in it.
    """
    rows, vocabulary = logits.shape
    logits -= logits.amax(dim=-1, keepdim=True)
    weights = logits.exp_()
    if vocabulary % SUM_BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -vocabulary % SUM_BLOCK))
    blocks = weights.view(rows, -1, SUM_BLOCK)
    totals = blocks.sum(dim=-1).double().cumsum(dim=-1)
    targets = draws[:, None] * totals[:, -1:]
    block = _search(totals, targets)
    before = torch.where(block > 0, totals.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks[torch.arange(rows, device=logits.device), block[:, 0]].double().cumsum(dim=-1)
    return (block * SUM_BLOCK + _search(inside, targets - before))[:, 0]


def _search(totals: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Where each row's cumulative `totals` (rows, n) pass its target (rows, 1): never at a place without weight."""
    places = torch.searchsorted(totals, targets, right=True)
    # Rounding may leave a target a hair past the end: then it is the last place that has any weight.
    return torch.minimum(places, (totals < totals[:, -1:]).sum(dim=-1, keepdim=True))


def _draws(sequences: Rows[Sequence]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    keys = np.array([(s.seed, s.index, s.output_length) for s in sequences], dtype=np.uint64)
    return uniforms(keys[:, 0], keys[:, 1], keys[:, 2])


def _counts(sequence: Sequence) -> TokenCounts:
    if sequence.sampling_state is None:
        sequence.sampling_state = TokenCounts(sequence.request.prompt)
    counts: TokenCounts = sequence.sampling_state
    counts.catch_up(sequence.tokens)
    return counts


def _pick(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of `logits`; all of them, uncopied, where that is what is asked for."""
    return logits if len(index) == len(logits) else logits[index]


def _to_list(tokens: torch.Tensor) -> list[int]:
    return [int(token) for token in tokens.tolist()]
