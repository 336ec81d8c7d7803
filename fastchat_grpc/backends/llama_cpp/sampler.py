"""How the next token of one sequence is chosen, as a chain of llama.cpp's samplers in the order of the contract."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from fastchat_grpc.backends.engine_thread import Running
from fastchat_grpc.core import GREEDY_TEMPERATURE, Grammar, GrammarKind
from fastchat_grpc.errors import BackendFailed, InvalidArgument
from fastchat_grpc.text.seeds import splitmix64
from fastchat_grpc.text.tokenizer import Tokenizer

_NEVER = -1e9
"""Added to the logits of ends that must not be taken yet. Finite, so that an end which is all that a grammar
allows is still taken: where every logit is -inf llama.cpp draws any token, and ends the process when the grammar
cannot go on with it."""


class Sampler:
    """One sequence's chain. Owned by the engine's thread; `free` it once.

    Order: suppressed ends, logit bias, grammar, repetition penalty (prompt and output), presence and frequency
    penalties (output), temperature, top-p, top-k, min-p, the draw. The draw depends on the seed and the token's place
    alone, so a sequence may be preempted, or resumed elsewhere, without a seam.
    """

    def __init__(self, llama: Any, model: Any, context: Any, tokenizer: Tokenizer, running: Running) -> None:
        self._llama = llama
        self._context = context
        self._vocab = llama.llama_model_get_vocab(model)
        self._size = tokenizer.vocabulary_size
        self._seed = running.seed
        self._greedy = running.job.request.sampling.greedy
        self._place = len(running.token_ids) - running.prompt_length
        self._suppressed = running.min_tokens
        self._grammar_kind = running.job.request.grammar.kind if running.job.request.grammar is not None else None
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
        if self._grammar_kind is not None:
            token_id = self._sample_checked(row)
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

    def _sample_checked(self, row: int) -> int:
        """As llama_sampler_sample, but a token that the grammar forbids is never given to it.

        There a C++ exception would end the process, with everyone's requests.
        """
        import numpy as np

        llama = self._llama
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, row), (self._size,))
        rows = np.zeros(self._size, dtype=np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)]))
        rows["id"], rows["logit"] = np.arange(self._size, dtype=np.int32), logits
        data = rows.ctypes.data_as(ctypes.POINTER(llama.llama_token_data))
        candidates = llama.llama_token_data_array(data=data, size=self._size, selected=-1, sorted=False)
        llama.llama_sampler_apply(self._chain, ctypes.byref(candidates))
        if not 0 <= candidates.selected < candidates.size:
            return -1
        chosen = candidates.data[candidates.selected]
        if not math.isfinite(chosen.logit):
            raise dead_end(self._grammar_kind)
        llama.llama_sampler_accept(self._chain, chosen.id)
        return int(chosen.id)

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
        if request.grammar is not None:
            self._add_grammar(request.grammar, made)
        self._add_penalties(running, prompt, made)
        if GREEDY_TEMPERATURE <= sampling.temperature != 1.0:
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

    def _add_grammar(self, grammar: Grammar, made: Sequence[int]) -> None:
        """Raises InvalidArgument where the output that is to be continued is none that the grammar allows.

        It is asked before each token: a forbidden one that it is given ends the process.
        """
        llama = self._llama
        sampler = self._grammar(grammar)
        self._add(sampler)  # the chain frees it
        for token_id in made:
            row = (llama.llama_token_data * 1)(llama.llama_token_data(id=token_id, logit=0.0, p=0.0))
            candidate = llama.llama_token_data_array(data=row, size=1, selected=-1, sorted=False)
            llama.llama_sampler_apply(sampler, ctypes.byref(candidate))
            if not math.isfinite(row[0].logit):
                raise InvalidArgument("resume.choices.output_token_ids", "are not what the grammar allows")
            llama.llama_sampler_accept(sampler, token_id)

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

    def _grammar(self, grammar: Grammar) -> Any:
        sampler = self._llama.llama_sampler_init_grammar(self._vocab, gbnf(grammar).encode(), b"root")
        if not sampler:
            raise InvalidArgument(f"structured_output.{grammar.kind.value}", "llama.cpp cannot read the grammar")
        return sampler

    def _draw_seed(self) -> int:
        """32 bits of the seed and the place."""
        return splitmix64(self._seed, self._place + 1) >> 32


def dead_end(kind: GrammarKind | None) -> InvalidArgument:
    """The error for a grammar that nothing can go on with: its author's, not the engine's."""
    field = f"structured_output.{kind.value}" if kind is not None else "structured_output"
    return InvalidArgument(field, "allows nothing that the model could say next")


@lru_cache(maxsize=64)
def gbnf(grammar: Grammar) -> str:
    """A grammar in llama.cpp's notation: made once, off the event loop, for every choice that follows it.

    Raises InvalidArgument.
    """
    from llama_cpp import llama_grammar

    if grammar.kind is GrammarKind.JSON_OBJECT:
        return str(llama_grammar.JSON_GBNF)
    try:
        return str(llama_grammar.json_schema_to_gbnf(grammar.source))
    except Exception as error:  # the converter raises anything from KeyError to RecursionError
        raise InvalidArgument(
            "structured_output.json_schema", f"llama.cpp cannot use this schema ({type(error).__name__})"
        ) from error
