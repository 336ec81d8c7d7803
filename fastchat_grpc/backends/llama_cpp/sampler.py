"""How the next token of one sequence is chosen, as a chain of llama.cpp's samplers in the order of the contract.

Grammars are not llama.cpp's own: where one is ambiguous each token may take twice the time there, without an end.
"""

from __future__ import annotations

import ctypes
from typing import Any

from fastchat_grpc.errors import BackendFailed
from fastchat_grpc.text.batch import Running
from fastchat_grpc.text.grammar import GrammarState
from fastchat_grpc.text.seeds import splitmix64
from fastchat_grpc.text.tokenizer import Tokenizer

_NEVER = -1e9
"""Added to the logits of ends that must not be taken yet. Finite, so that an end which is all that a grammar
allows is still taken: where every logit is -inf llama.cpp draws any token."""


class Sampler:
    """One sequence's chain. Owned by the engine's thread; `free` it once.

    Order: grammar, suppressed ends, logit bias, repetition penalty (prompt and output), presence and frequency
    penalties (output), temperature, top-p, top-k, min-p, the draw. The draw depends on the seed and the token's place
    alone, so a sequence may be preempted, or resumed elsewhere, without a seam.
    """

    def __init__(self, llama: Any, model: Any, context: Any, tokenizer: Tokenizer, running: Running) -> None:
        self._llama = llama
        self._context = context
        self._size = tokenizer.vocabulary_size
        self._seed = running.seed
        self._greedy = running.job.request.sampling.greedy
        self._place = len(running.token_ids) - running.prompt_length
        self._suppressed = running.min_tokens
        made, grammar = running.token_ids[running.prompt_length :], running.job.grammar
        self._grammar = grammar.begin(made) if grammar is not None else None
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        try:
            self._build(tokenizer, running)
        except BaseException:
            self.free()
            raise

    def sample(self, row: int) -> int:
        """The next token, from the logits of a row of the last batch. InvalidArgument where nothing may follow."""
        llama = self._llama
        if not self._greedy:
            llama.llama_sampler_chain_add(self._chain, llama.llama_sampler_init_dist(self._draw_seed()))
        if self._grammar is not None:
            token_id = self._sample_allowed(row, self._grammar)
        else:
            token_id = int(llama.llama_sampler_sample(self._chain, self._context, row))
        if not self._greedy:
            self._drop(llama.llama_sampler_chain_n(self._chain) - 1)
        self._place += 1
        if self._suppressed:
            self._suppressed -= 1
            if not self._suppressed:
                self._drop(0)
        if token_id < 0:
            raise BackendFailed("llama.cpp chose no token")
        return token_id

    def _sample_allowed(self, row: int, grammar: GrammarState) -> int:
        """As llama_sampler_sample, among the tokens that the grammar allows."""
        import numpy as np

        llama = self._llama
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, row), (self._size,))
        rows = np.zeros(self._size, dtype=np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)]))
        rows["id"] = np.arange(self._size, dtype=np.int32)
        rows["logit"] = np.where(grammar.allowed()[: self._size], logits, -np.inf)
        data = rows.ctypes.data_as(ctypes.POINTER(llama.llama_token_data))
        candidates = llama.llama_token_data_array(data=data, size=self._size, selected=-1, sorted=False)
        llama.llama_sampler_apply(self._chain, ctypes.byref(candidates))
        if not 0 <= candidates.selected < candidates.size:
            return -1
        token_id = int(candidates.data[candidates.selected].id)
        grammar.accept(token_id)
        llama.llama_sampler_accept(self._chain, token_id)
        return token_id

    def free(self) -> None:
        """Free the chain and its samplers."""
        if self._chain is not None:
            self._llama.llama_sampler_free(self._chain)
            self._chain = None

    def _build(self, tokenizer: Tokenizer, running: Running) -> None:
        llama, request = self._llama, running.job.request
        sampling = request.sampling
        prompt, made = running.token_ids[: running.prompt_length], running.token_ids[running.prompt_length :]
        if self._suppressed:
            ends = {*request.stopping.stop_token_ids, *tokenizer.eos_token_ids}
            self._add(self._bias(dict.fromkeys(ends, _NEVER)))
        if sampling.logit_bias:
            self._add(self._bias(dict(sampling.logit_bias)))
        self._add_penalties(running, prompt, made)
        if sampling.scales:
            self._add(llama.llama_sampler_init_temp(sampling.temperature))
        if self._greedy:
            self._add(llama.llama_sampler_init_greedy())
            return
        if sampling.top_p < 1:
            self._add(llama.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.top_k > 0:
            self._add(llama.llama_sampler_init_top_k(min(sampling.top_k, self._size)))
        if sampling.min_p > 0:
            self._add(llama.llama_sampler_init_min_p(sampling.min_p, 1))

    def _add_penalties(self, running: Running, prompt: Any, made: Any) -> None:
        llama, sampling = self._llama, running.job.request.sampling
        everything = len(running.token_ids) + running.max_tokens
        if sampling.repetition_penalty != 1:
            penalty = sampling.repetition_penalty
            self._add(llama.llama_sampler_init_penalties(self._size, everything, penalty, 0.0, 0.0), [*prompt, *made])
        if sampling.frequency_penalty or sampling.presence_penalty:
            frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
            self._add(llama.llama_sampler_init_penalties(self._size, everything, 1.0, frequency, presence), made)

    def _add(self, sampler: Any, seen: Any = ()) -> None:
        if not sampler:
            raise BackendFailed("llama.cpp cannot make a sampler")
        for token_id in seen:
            self._llama.llama_sampler_accept(sampler, token_id)
        self._llama.llama_sampler_chain_add(self._chain, sampler)

    def _drop(self, position: int) -> None:
        self._llama.llama_sampler_free(self._llama.llama_sampler_chain_remove(self._chain, position))

    def _bias(self, biases: dict[int, float]) -> Any:
        llama = self._llama
        entries = (llama.llama_logit_bias * len(biases))()
        for entry, (token_id, bias) in zip(entries, biases.items(), strict=True):
            entry.token, entry.bias = token_id, bias
        return llama.llama_sampler_init_logit_bias(self._size, len(biases), entries)

    def _draw_seed(self) -> int:
        """32 bits of the seed and the place."""
        return splitmix64(self._seed, self._place + 1) >> 32
