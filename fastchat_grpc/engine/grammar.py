"""Structured output: which tokens a grammar allows next, by llguidance (optional)."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING, Any

import numpy as np

from fastchat_grpc.core import Grammar, GrammarKind
from fastchat_grpc.errors import BackendFailed, InvalidArgument, UnsupportedField
from fastchat_grpc.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


class GrammarCompiler:
    """Compiles grammars for one tokenizer. `compile` may take a second: call it off the event loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._llguidance_tokenizer: Any = None

    @staticmethod
    def available() -> bool:
        """Whether llguidance is installed."""
        from importlib.util import find_spec

        return find_spec("llguidance") is not None

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Check and compile a grammar.

        Raises:
            InvalidArgument: the grammar is wrong; the message says where.
            UnsupportedField: llguidance is not installed.
        """
        field = f"structured_output.{grammar.kind.value}"
        try:
            from llguidance import LLMatcher
        except ModuleNotFoundError:
            raise UnsupportedField(field, "needs llguidance on the worker: pip install llguidance") from None
        try:
            source = _source(LLMatcher, grammar)
        except ValueError as error:
            raise InvalidArgument(field, _first_line(str(error))) from error
        matcher = LLMatcher(self._tokens(), source, log_level=0)
        if matcher.is_error():
            raise InvalidArgument(field, _first_line(matcher.get_error()))
        return CompiledGrammar(matcher, self._tokenizer.vocabulary_size)

    def _tokens(self) -> Any:
        """llguidance's view of the tokenizer; made once, at the first grammar."""
        with self._lock:
            if self._llguidance_tokenizer is None:
                from llguidance import LLTokenizer, TokenizerWrapper

                vocabulary = TokenizerWrapper(_Vocabulary(self._tokenizer))
                ends = sorted(self._tokenizer.eos_token_ids)
                self._llguidance_tokenizer = LLTokenizer(vocabulary, eos_token=ends)
            return self._llguidance_tokenizer


class CompiledGrammar:
    """A grammar at its start; every choice of a request gets a state of its own."""

    def __init__(self, matcher: Any, vocabulary_size: int) -> None:
        self._matcher = matcher
        self._vocabulary_size = vocabulary_size

    def begin(self, output: Tokens[int]) -> GrammarState:
        """The state after some output, which is empty unless a generation is resumed."""
        state = GrammarState(self._matcher.deep_copy(), self._vocabulary_size)
        for token in output:
            state.accept(token)
        return state


class GrammarState:
    """Where one output stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary_size: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros((1, (vocabulary_size + 31) // 32), dtype=np.int32)

    def mask(self, logits: torch.Tensor) -> None:
        """Forbid in one row of logits, in place, what the grammar does not allow next."""
        import torch
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little").view(np.bool_)
        forbidden = torch.from_numpy(~allowed[: len(logits)]).to(logits.device)
        logits[: len(forbidden)].masked_fill_(forbidden, -torch.inf)
        logits[len(forbidden) :] = -torch.inf

    def accept(self, token: int) -> None:
        """Advance by a token that `mask` allowed."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BackendFailed(f"the grammar failed: {_first_line(self._matcher.get_error())}")


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.eos_token_ids)
        self.bos_token_id = None
        self.special_token_ids = sorted(tokenizer.special_token_ids)
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocabulary_size)]

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("text, not bytes")
        return self._tokenizer.encode(text, add_special_tokens=False)


def _source(matcher: Any, grammar: Grammar) -> str:
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return str(matcher.grammar_from_json_schema({"type": "object"}))
        case GrammarKind.JSON_SCHEMA:
            return str(matcher.grammar_from_json_schema(grammar.source))
        case GrammarKind.REGEX:
            return str(matcher.grammar_from_regex(grammar.source))
        case GrammarKind.LARK:
            return str(matcher.grammar_from_lark(grammar.source))


def _first_line(message: str) -> str:
    return (message.strip().splitlines() or ["wrong grammar"])[0][:300]
