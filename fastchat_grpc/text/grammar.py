"""Structured output: which tokens a grammar allows next, by llguidance (optional)."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING, Any

from fastchat_grpc.core import Grammar, GrammarKind
from fastchat_grpc.errors import InvalidArgument, UnsupportedField
from fastchat_grpc.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


KEPT_GRAMMARS = 64
"""Compiled grammars kept for requests that ask for the same, as those of one application do."""
WHITESPACE = r"(\r?\n)?[ \t]{0,32}"
"""Between two parts of JSON: a line break and an indent, so that no output is blanks up to its limit."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer. `compile` may take a second: call it off the event loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._llguidance_tokenizer: Any = None
        self._compiled: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()

    @staticmethod
    def available() -> bool:
        """Whether llguidance is installed."""
        from importlib.util import find_spec

        return find_spec("llguidance") is not None

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Check and compile a grammar, or find it among the last ones.

        Raises:
            InvalidArgument: the grammar is wrong, and the message says where, or no output can follow it.
            UnsupportedField: llguidance is not installed.
        """
        with self._lock:
            known = self._compiled.get(grammar)
            if known is not None:
                self._compiled.move_to_end(grammar)
                return known
        made = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = made
            if len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        return made

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        field = f"structured_output.{grammar.kind.value}"
        try:
            from llguidance import LLMatcher
        except ModuleNotFoundError:
            raise UnsupportedField(field, "needs llguidance on the worker: pip install llguidance") from None
        try:
            source = _source(LLMatcher, grammar)
        except ValueError as error:
            raise InvalidArgument(field, _reason(str(error))) from error
        matcher = LLMatcher(self._tokens(), source, log_level=0)
        if matcher.is_error():
            raise InvalidArgument(field, _reason(matcher.get_error()))
        made = CompiledGrammar(matcher, self._tokenizer, field)
        made.begin(()).allowed()
        return made

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

    def __init__(self, matcher: Any, tokenizer: Tokenizer, field: str) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._field = field

    def begin(self, output: Tokens[int]) -> GrammarState:
        """The state after some output, which is empty unless a generation is resumed."""
        state = GrammarState(self._matcher.deep_copy(), self._tokenizer, self._field)
        for token in output:
            state.accept(token)
        return state


class GrammarState:
    """Where one output stands in its grammar. Its failures are the grammar's, and so InvalidArgument."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer, field: str) -> None:
        import numpy as np

        self._matcher = matcher
        self._field = field
        self._bits = np.zeros((1, (tokenizer.vocabulary_size + 31) // 32), dtype=np.int32)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, at least one. Raises InvalidArgument where there is none."""
        import numpy as np
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits)
        self._check("no output can follow this grammar")
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little").view(np.bool_)
        if not allowed.any():
            raise InvalidArgument(self._field, "no output can follow this grammar")
        return allowed

    def mask(self, logits: torch.Tensor) -> None:
        """Forbid in one row of logits, in place, what the grammar does not allow next. As `allowed` raises, so this."""
        import torch

        forbidden = torch.from_numpy(~self.allowed()[: len(logits)]).to(logits.device)
        logits[: len(forbidden)].masked_fill_(forbidden, -torch.inf)
        logits[len(forbidden) :] = -torch.inf

    def accept(self, token: int) -> None:
        """Advance by a token that `mask` allowed."""
        self._matcher.consume_token(token)
        self._check("the output does not follow this grammar")

    def _check(self, otherwise: str) -> None:
        if self._matcher.is_error():
            reason = _reason(self._matcher.get_error())
            # Where there is no way on llguidance has a word for itself alone.
            raise InvalidArgument(self._field, otherwise if reason.isalpha() else reason)


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


_JSON = {"whitespace_pattern": WHITESPACE}


def _source(matcher: Any, grammar: Grammar) -> str:
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return str(matcher.grammar_from_json_schema({"type": "object"}, defaults=_JSON))
        case GrammarKind.JSON_SCHEMA:
            return str(matcher.grammar_from_json_schema(grammar.source, defaults=_JSON))
        case GrammarKind.REGEX:
            return str(matcher.grammar_from_regex(grammar.source))
        case GrammarKind.LARK:
            return str(matcher.grammar_from_lark(grammar.source))


def _reason(message: str) -> str:
    """What is wrong, in one line: the first, and of an expression that cannot be read the line that says why."""
    lines = message.strip().splitlines() or ["wrong grammar"]
    why = [line.removeprefix("error: ") for line in lines[1:] if line.startswith("error: ")]
    return " ".join([lines[0], *why[:1]])[:300]
