"""What an encoder-decoder's generation configuration demands of its output, whatever a request asks for.

A translation model is told its language by a forced first token, and some models repeat themselves without a rule
against it. By the rules of transformers' logits processors of the same names (ForcedBOSToken, ForcedEOSToken,
SuppressTokens, SuppressTokensAtBegin, NoRepeatNGram, NoBadWords), which come after the penalties.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRules:
    """Rules for every output of a model."""

    forced_first: int | None = None
    forced_last: tuple[int, ...] = ()
    """Of which one stands where the output reaches its limit."""
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    """Not at the first place that no token is forced at."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Of several tokens each, of which the last must not follow the others."""
    no_repeat: int = 0
    """No so many tokens twice; 0: off."""
    start: int = 0
    """Token before the output."""

    @classmethod
    def of(cls, config: Any, start: int) -> OutputRules:
        """The rules of a transformers GenerationConfig."""
        words = [tuple(word) for word in config.bad_words_ids or ()]
        return cls(
            forced_first=_ids(config.forced_bos_token_id)[0] if config.forced_bos_token_id is not None else None,
            forced_last=_ids(config.forced_eos_token_id),
            suppressed=(*_ids(config.suppress_tokens), *(word[0] for word in words if len(word) == 1)),
            suppressed_first=_ids(config.begin_suppress_tokens),
            bad_words=tuple(word for word in words if len(word) > 1),
            no_repeat=config.no_repeat_ngram_size or 0,
            start=start,
        )

    def __bool__(self) -> bool:
        return self != OutputRules(start=self.start)

    def apply(self, logits: torch.Tensor, output: Tokens[int], limit: int) -> None:
        """Change one row of logits, in place, for the token after `output`, which may have `limit` tokens."""
        if self.forced_first is not None and not output:
            _allow_only(logits, (self.forced_first,))
        if self.forced_last and len(output) == limit - 1:
            _allow_only(logits, self.forced_last)
        forbidden = list(self.suppressed)
        if len(output) == (self.forced_first is not None):
            forbidden += self.suppressed_first
        text = [self.start, *output]
        forbidden += [word[-1] for word in self.bad_words if tuple(text[len(text) - len(word) + 1 :]) == word[:-1]]
        forbidden += self._repeating(text)
        if forbidden:
            logits[torch.tensor(forbidden, device=logits.device)] = -torch.inf

    def _repeating(self, text: Tokens[int]) -> list[int]:
        size = self.no_repeat
        if not size or len(text) < size:
            return []
        end = list(text[len(text) - size + 1 :])
        return [text[i + size - 1] for i in range(len(text) - size + 1) if list(text[i : i + size - 1]) == end]


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(i) for i in value) if isinstance(value, list | tuple) else (int(value),)


def _allow_only(logits: torch.Tensor, token_ids: tuple[int, ...]) -> None:
    logits.fill_(-torch.inf)
    logits[torch.tensor(token_ids, device=logits.device)] = 0.0
