"""Answers in chunks of the OpenAI schema, as events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

from fastchat_grpc.core import Completion, Delta, FinishReason, Timings, TokenLogprob, TopLogprob, Usage
from fastchat_grpc.errors import WorkerUnavailable

NO_TOKEN_ID = -1
"""The API names tokens by their text alone."""
_LENGTH = frozenset({"length", "max_tokens", "max_length", "model_length"})
_FILTERED = frozenset({"content_filter", "content_filtered", "safety", "sensitive"})
_ABORT = frozenset({"abort", "aborted", "cancelled", "canceled", "error", "insufficient_system_resource"})


def finish_reason(name: str) -> FinishReason:
    """A server's word for why it ended. An answer that is whole has many: stop, eos_token, end_turn, tool_calls..."""
    if name in _LENGTH:
        return FinishReason.LENGTH
    if name in _FILTERED:
        return FinishReason.CONTENT_FILTER
    return FinishReason.ABORT if name in _ABORT else FinishReason.STOP


class Answer:
    """The choices of one request at the server: `indices[i]` is our index of its choice i."""

    def __init__(self, indices: Sequence[int], *, cumulative: bool, arrival: float, logprobs: bool) -> None:
        self._choices = [_Choice(index, cumulative=cumulative, arrival=arrival, logprobs=logprobs) for index in indices]
        self._usage: Usage | None = None
        self._done = False

    def take(self, chunk: Mapping[str, Any]) -> Iterator[Delta]:
        """The Deltas of a chunk; an empty chunk is the end that the server has marked."""
        self._done = self._done or not chunk
        usage = _usage(chunk.get("usage"))
        for place, choice in enumerate(chunk.get("choices") or ()):
            number = int(choice.get("index") or 0) if len(self._choices) > 1 else place
            if number < len(self._choices):
                delta = self._choices[number].take(choice, usage)
                if delta is not None:
                    yield delta
        if usage is not None:
            self._usage = usage
            if len(self._choices) == 1:
                self._choices[0].usage = usage

    @property
    def pieces(self) -> int:
        """Output tokens so far, as well as the chunks tell: progress of the server."""
        return sum(choice.tokens for choice in self._choices)

    def unanswered(self) -> list[int]:
        """Indices of choices that the server has said nothing of: some make one choice whatever n is."""
        return [choice.index for choice in self._choices if not choice.seen]

    def completions(self) -> list[Completion]:
        """The ends of all choices that were answered. Raises WorkerUnavailable where the server broke off."""
        answered = [choice for choice in self._choices if choice.seen or len(self._choices) == 1]
        if len(self._choices) > 1 and self._usage is not None:
            _share(self._usage, answered)
        return [choice.completion(self._done) for choice in answered]


def _usage(usage: Mapping[str, Any] | None) -> Usage | None:
    if not usage:
        return None
    details = usage.get("prompt_tokens_details") or {}
    output_details = usage.get("completion_tokens_details") or {}
    return Usage(
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
        cached_tokens=int(details.get("cached_tokens") or 0),
        reasoning_tokens=int(output_details.get("reasoning_tokens") or 0),
    )


def _share(total: Usage, choices: Sequence[_Choice]) -> None:
    """Give each choice its part of the output tokens that the server counts together, by the pieces that it sent."""
    pieces = sum(choice.tokens for choice in choices)
    given = thought = before = 0
    for choice in choices:
        before += choice.tokens
        upto = total.completion_tokens * before // pieces if pieces else 0
        upto_thought = total.reasoning_tokens * before // pieces if pieces else 0
        choice.usage = replace(total, completion_tokens=upto - given, reasoning_tokens=upto_thought - thought)
        given, thought = upto, upto_thought


class _Choice:
    """One choice."""

    def __init__(self, index: int, *, cumulative: bool, arrival: float, logprobs: bool) -> None:
        self.index = index
        self.usage = Usage()
        self.seen = False
        self._cumulative: list[str] | None = [] if cumulative else None
        self._arrival = arrival
        self._first_s = 0.0
        self._pieces = 0
        self._finish: FinishReason | None = None
        self._matched: str | int | None = None
        self._calls = _Calls()
        self._logprobs = logprobs

    @property
    def tokens(self) -> int:
        """Output tokens so far, as well as the chunks tell."""
        return max(self._pieces, self.usage.completion_tokens)

    def take(self, choice: Mapping[str, Any], usage: Usage | None) -> Delta | None:
        """The Delta of a chunk's choice, if it brings something. `usage` as the same chunk says it."""
        self.seen = True
        self._ends(choice)
        delta = choice.get("delta")
        said = choice if delta is None else delta
        text, thought = _words(said) if delta is not None else (said.get("text") or "", "")
        calls = self._calls.text(said.get("tool_calls") or (), ended=self._finish is not None)
        self._pieces += bool(text or thought or said.get("tool_calls"))
        text += calls
        logprobs = tuple(_logprobs(choice.get("logprobs"))) if self._logprobs else ()
        if not text and not thought and not logprobs:
            return None
        return self._delta(text, thought, logprobs, usage)

    def completion(self, done: bool) -> Completion:
        """The end. Raises WorkerUnavailable where the server stopped in the middle; `done`: it has marked its end."""
        if self._finish is None and not done:
            raise WorkerUnavailable("the upstream server ended its answer in the middle")
        usage = self.usage
        if not usage.completion_tokens:  # a server that counts nothing
            usage = replace(usage, completion_tokens=self._pieces)
        timings = Timings(time_to_first_token_s=self._first_s, total_s=monotonic() - self._arrival)
        return Completion(
            index=self.index,
            finish_reason=self._finish or FinishReason.STOP,
            matched=self._matched,
            usage=usage,
            timings=timings,
        )

    def _ends(self, choice: Mapping[str, Any]) -> None:
        reason = choice.get("finish_reason")
        if reason:
            self._finish = finish_reason(str(reason))
            matched = choice.get("stop_reason")
            self._matched = matched if isinstance(matched, str | int) else None

    def _delta(self, text: str, reasoning: str, logprobs: tuple[TokenLogprob, ...], usage: Usage | None) -> Delta:
        self._first_s = self._first_s or monotonic() - self._arrival
        if self._cumulative is not None:
            self._cumulative.append(text)
        return Delta(
            index=self.index,
            text=text,
            reasoning=reasoning,
            token_ids=(),
            logprobs=logprobs,
            usage=usage or replace(self.usage, completion_tokens=self.tokens),
            cumulative_text="".join(self._cumulative or ()),
        )


def _words(said: Mapping[str, Any]) -> tuple[str, str]:
    """What a piece of a message says to the reader, an answer or a refusal, and what it thinks."""
    content = said.get("content") or ""
    thought = str(said.get("reasoning_content") or said.get("reasoning") or "")
    refusal = str(said.get("refusal") or "")
    if isinstance(content, str):
        return content + refusal, thought
    # Mistral's reasoning models: parts that are text, or thoughts made of parts.
    thought += "".join(_words({"content": part.get("thinking")})[0] for part in content)
    return "".join(str(part.get("text") or "") for part in content) + refusal, thought


class _Calls:
    """Tool calls, which come in pieces, as text: each is `<tool_call>{"name": ..., "arguments": ...}</tool_call>`."""

    def __init__(self) -> None:
        self._open = False
        self._arguments = False

    def text(self, pieces: Sequence[Mapping[str, Any]], *, ended: bool) -> str:
        """What these pieces add. `ended`: nothing follows."""
        parts: list[str] = []
        for piece in pieces:
            function = piece.get("function") or {}
            # A name begins a call; indices do not tell, as some servers give all calls the same.
            if function.get("name"):
                parts += [self._close(), '<tool_call>{"name": ', json.dumps(function["name"]), ', "arguments": ']
                self._open = True
            if self._open and (arguments := function.get("arguments")):
                parts.append(arguments if isinstance(arguments, str) else json.dumps(arguments))
                self._arguments = True
        if ended:
            parts.append(self._close())
        return "".join(parts)

    def _close(self) -> str:
        was_open, self._open = self._open, False
        had_arguments, self._arguments = self._arguments, False
        return ("" if had_arguments else "{}") + "}</tool_call>" if was_open else ""


def _logprobs(found: Mapping[str, Any] | None) -> Iterator[TokenLogprob]:
    """Log probabilities of a chunk's tokens: of chats, or of completions (in lists)."""
    if not found:
        return
    for entry in found.get("content") or ():
        top = [
            _top(other.get("token"), other.get("bytes"), other["logprob"]) for other in entry.get("top_logprobs") or ()
        ]
        token, data = str(entry.get("token") or ""), entry.get("bytes")
        yield TokenLogprob(NO_TOKEN_ID, token, _bytes(token, data), float(entry["logprob"]), tuple(top))
    tokens = found.get("tokens") or ()
    values = found.get("token_logprobs") or ()
    tops = found.get("top_logprobs") or [None] * len(tokens)
    for token, value, others in zip(tokens, values, tops, strict=False):
        ranked = sorted((others or {}).items(), key=lambda pair: -pair[1])
        alternatives = tuple(_top(other, None, logprob) for other, logprob in ranked)
        yield TokenLogprob(NO_TOKEN_ID, str(token), _bytes(str(token), None), value, alternatives)


def _top(token: object, data: Sequence[int] | None, logprob: float) -> TopLogprob:
    return TopLogprob(NO_TOKEN_ID, str(token or ""), _bytes(str(token or ""), data), float(logprob))


def _bytes(token: str, data: Sequence[int] | None) -> bytes:
    return bytes(data) if data is not None else token.encode("utf-8", "replace")
