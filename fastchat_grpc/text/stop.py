"""Ends of an output: tokens that end it, and stop strings, found as soon as the text contains one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastchat_grpc.core import GenerateRequest


class EndTokens:
    """Which tokens end an output: ends of sequence and stop tokens, behind the first min_new_tokens.

    Under a grammar an end of sequence is the end before them too: the grammar allowed nothing else, and nothing can
    follow.
    """

    def __init__(self, request: GenerateRequest, eos_token_ids: frozenset[int]) -> None:
        stopping = request.stopping
        self._min_tokens = stopping.min_new_tokens
        self._always = frozenset() if request.grammar is None else eos_token_ids
        self._late = frozenset(stopping.stop_token_ids) | (frozenset() if stopping.ignore_eos else eos_token_ids)

    def at(self, token_id: int, count: int) -> bool:
        """Whether a token is the end, as token number `count` of the output, counted from 1."""
        return (token_id in self._late and count > self._min_tokens) or token_id in self._always


@dataclass(slots=True)
class _Pattern:
    """One stop string as a Knuth-Morris-Pratt automaton: `matched` characters of it end the text so far."""

    text: str
    failure: list[int] = field(init=False)
    matched: int = 0

    def __post_init__(self) -> None:
        self.failure = [0] * len(self.text)
        k = 0
        for i in range(1, len(self.text)):
            while k and self.text[i] != self.text[k]:
                k = self.failure[k - 1]
            k += self.text[i] == self.text[k]
            self.failure[i] = k

    def feed(self, char: str) -> bool:
        """Advance by one character; True when the whole string has been seen."""
        while self.matched and char != self.text[self.matched]:
            self.matched = self.failure[self.matched - 1]
        self.matched += char == self.text[self.matched]
        return self.matched == len(self.text)

    def pass_by(self) -> None:
        """Go on behind a whole string that is no stop; its end may begin another."""
        if self.matched == len(self.text):
            self.matched = self.failure[-1]


class StopMatcher:
    """Splits text, piece by piece, into what may be sent and what might be the start of a stop string.

    The first stop string to be complete wins; of several complete at the same character, the longest,
    since it began earliest. So the outcome does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._patterns = [_Pattern(stop) for stop in stops]
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str, *, too_early: bool = False) -> str:
        """Take new text and return what may be sent. After a match (see `matched`) nothing more is.

        Args:
            too_early: a stop string that is complete in this text ends nothing yet; one that begins in it may.
        """
        if not self._patterns:
            return text
        if self.matched is not None:
            return ""
        for i, char in enumerate(text):
            complete = [pattern.text for pattern in self._patterns if pattern.feed(char)]
            if complete and too_early:
                for pattern in self._patterns:
                    pattern.pass_by()
            elif complete:
                return self._end(self._held + text[: i + 1], max(complete, key=len))
        held = max(pattern.matched for pattern in self._patterns)
        everything = self._held + text
        cut = len(everything) - held
        self._held = everything[cut:]
        return everything[:cut]

    def flush(self) -> str:
        """Return what was held back: the text ended before a stop string was complete."""
        held, self._held = self._held, ""
        return held

    def _end(self, text: str, stop: str) -> str:
        self.matched, self._held = stop, ""
        return text if self._include_stop else text[: len(text) - len(stop)]
