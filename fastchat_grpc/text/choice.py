"""One choice of a generation: its tokens become text and events, and it knows when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastchat_grpc.core import (
    ChatPrompt,
    Completion,
    Delta,
    FinishReason,
    GenerateRequest,
    GrammarKind,
    Timings,
    TokenLogprob,
    Usage,
)
from fastchat_grpc.text.blanks import MAX_BLANKS, BlankRun
from fastchat_grpc.text.detokenizer import make_detokenizer
from fastchat_grpc.text.reasoning import Marks, parser_for
from fastchat_grpc.text.stop import EndTokens, StopMatcher
from fastchat_grpc.text.tokenizer import Tokenizer

PROMPT_END_TOKENS = 16
"""Tokens of a prompt's end that tell whether it has opened a thought."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceLimits:
    """What a choice needs to know of its model and prompt."""

    prompt_tokens: int
    context_length: int
    stream_interval: int
    """Default number of tokens between two Deltas."""
    output_apart: bool = False
    """The output has a context of its own and shares none with the prompt, as in an encoder-decoder."""
    reasoning: Marks | None = None
    """How the model marks what it thinks before it answers; None: it does not."""

    @property
    def output_tokens(self) -> int:
        """Most tokens of output."""
        return self.context_length if self.output_apart else self.context_length - self.prompt_tokens


def continues_text(request: GenerateRequest) -> bool:
    """Whether the output is more of the prompt's text: of a text, or of a message to be continued.

    An answer is a text of its own. As in FastChat it is decoded alone, so that it does not begin with the
    space that sentencepiece puts before every word.
    """
    prompt = request.prompt
    return prompt.continue_final_message if isinstance(prompt, ChatPrompt) else True


_JSON = (GrammarKind.JSON_OBJECT, GrammarKind.JSON_SCHEMA)


class Choice:
    """Feed it tokens with `push`; take what is ready with `delta`; it has ended when `finish_reason` is set.

    A resumed choice replays its tokens on construction, silently, and may have ended by that already.
    A backend pushes nothing after the end.

    Args:
        prompt_ids: the prompt, or at least its last tokens: the output's text may go on from its text, or begin in a
            thought that it has opened.
    """

    def __init__(
        self,
        request: GenerateRequest,
        index: int,
        tokenizer: Tokenizer,
        limits: ChoiceLimits,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        stopping = request.stopping
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.matched: str | int | None = None
        self.token_count = 0
        self.cached_tokens = 0
        """Of the prompt; set by whoever knows."""
        self._limits = limits
        self._tokenizer = tokenizer
        self._interval = request.output.stream_interval or limits.stream_interval
        self._min_tokens = stopping.min_new_tokens
        self._max_tokens = min(stopping.max_new_tokens, limits.output_tokens)
        self._stop_token_ids = frozenset(stopping.stop_token_ids)
        self._ends = EndTokens(request, tokenizer.eos_token_ids)
        self._blanks = BlankRun() if request.grammar is not None and request.grammar.kind in _JSON else None
        self._include_stop = stopping.include_stop
        self._detokenizer = make_detokenizer(
            tokenizer, request.output.keep_special_tokens, prompt_ids if continues_text(request) else ()
        )
        self._matcher = StopMatcher(stopping.stop, stopping.include_stop)
        self._cumulative: str | None = "" if request.output.cumulative_text else None
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._reasoning_tokens = 0
        end = tokenizer.decode(prompt_ids[-PROMPT_END_TOKENS:], keep_special_tokens=True) if limits.reasoning else ""
        self._thought = parser_for(request, limits.reasoning, end)
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._started = False
        self._replay(request, index)

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> None:
        """Take the next token, and its log probability where the request asks for it."""
        self.token_count += 1
        self._token_ids.append(token_id)
        if logprob is not None:
            self._logprobs.append(logprob)
        if self._ends.at(token_id, self.token_count):
            self._stop_at(token_id)
            return
        suppressed = self.token_count <= self._min_tokens
        inside = self._thought is not None and self._thought.inside
        if text := self._detokenizer.push(token_id) or self._mark(token_id):
            self._say(self._matcher.feed(text, too_early=suppressed))
            if self._matcher.matched is not None:
                self.matched = self._matcher.matched
                self._finish(FinishReason.STOP)
                return
        self._reasoning_tokens += inside and self._thought is not None
        endless = self._blanks is not None and self._blanks.feed(text) > MAX_BLANKS
        if endless or self.token_count >= self._max_tokens:
            self._end(FinishReason.LENGTH)

    def end(self, reason: FinishReason) -> None:
        """End the choice because its engine has, for a reason that its tokens do not show."""
        self._end(reason)

    @property
    def due(self) -> bool:
        """Whether a Delta should go out now: at the first token, every interval, and at the end."""
        pending = len(self._token_ids)
        return pending >= self._interval or (pending > 0 and not self._started) or self.finish_reason is not None

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=self._limits.prompt_tokens,
            completion_tokens=self.token_count,
            cached_tokens=self.cached_tokens,
            reasoning_tokens=self._reasoning_tokens,
        )

    def delta(self) -> Delta | None:
        """Everything since the last Delta, or None where there is nothing."""
        text, reasoning = "".join(self._text), "".join(self._reasoning)
        if not text and not reasoning and not self._token_ids:
            return None
        if self._cumulative is not None:
            self._cumulative += text
        delta = Delta(
            index=self.index,
            text=text,
            reasoning=reasoning,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            usage=self.usage,
            cumulative_text=self._cumulative or "",
        )
        self._started = True
        self._text, self._reasoning, self._token_ids, self._logprobs = [], [], [], []
        return delta

    def completion(self, timings: Timings) -> Completion:
        """The closing event; call it once, after the end."""
        assert self.finish_reason is not None
        return Completion(
            index=self.index,
            finish_reason=self.finish_reason,
            matched=self.matched,
            usage=self.usage,
            timings=timings,
        )

    def _stop_at(self, token_id: int) -> None:
        self._end(FinishReason.STOP)
        if token_id in self._stop_token_ids:
            self.matched = token_id
        if self._include_stop and self.matched is not None:
            self._text.append(self._detokenizer.push(token_id) + self._detokenizer.flush())

    def _end(self, reason: FinishReason) -> None:
        # The rest of the text may still complete a stop string, as when U+FFFD is one.
        too_early = self.token_count <= self._min_tokens
        self._say(self._matcher.feed(self._detokenizer.flush(), too_early=too_early))
        if self._matcher.matched is not None:
            self.matched, reason = self._matcher.matched, FinishReason.STOP
        self._say(self._matcher.flush())
        self._finish(reason)

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        if self._thought is not None:
            self._take(*self._thought.close())
            self._thought = None

    def _say(self, text: str) -> None:
        """Take text of the output: it is the answer, or the reasoning before it."""
        if self._thought is None:
            self._text.append(text)
            return
        self._take(*self._thought.feed(text))
        if self._thought.done:
            self._thought = None

    def _take(self, reasoning: str, text: str) -> None:
        self._reasoning.append(reasoning)
        self._text.append(text)

    def _mark(self, token_id: int) -> str:
        """Text of a mark of reasoning that is a special token, which text leaves out."""
        if self._thought is None or token_id not in self._tokenizer.special_token_ids:
            return ""
        token = self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        return token if self._thought.marks.part_of(token) else ""

    def _replay(self, request: GenerateRequest, index: int) -> None:
        resumed = request.resumed_choice(index)
        if not resumed.output_token_ids:
            return
        for token_id in resumed.output_token_ids:
            if self.finish_reason is None:
                self.push(token_id)
        reasoning, text = "".join(self._reasoning), "".join(self._text)
        # The reasoning comes before the text, so that one number tells how far the caller is in both.
        known = max(0, resumed.text_length - len(reasoning))
        if self._cumulative is not None:
            self._cumulative = text[:known]
        self._reasoning, self._text = [reasoning[resumed.text_length :]], [text[known:]]
        self._token_ids, self._logprobs = [], []
        self._started = True
