"""One request between an engine, which knows tokens and log probabilities, and whoever reads its events.

Text, stops, usage and events are the `Choice`s'. The engine feeds a `Job`, on the event loop:

    engine --feed(index, token_ids, logprobs)--> Job -> Choice -> EventQueue --> events
           <--------- stop(job, index) ---------

A choice that has ended by our stops, or whose caller has gone, is stopped in the engine at once, whether
or not anybody reads the events.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Protocol

from fastchat_grpc.core import Event, FinishReason, GenerateRequest, Timings, TokenLogprob
from fastchat_grpc.text import prompt as prompts
from fastchat_grpc.text.choice import Choice, ChoiceLimits
from fastchat_grpc.text.events import EventQueue
from fastchat_grpc.text.grammar import CompiledGrammar
from fastchat_grpc.text.reasoning import Marks
from fastchat_grpc.text.tokenizer import Tokenizer


class TokenEngine(Protocol):
    """An engine that feeds jobs. Both methods are called on the event loop and must not block it."""

    def submit(self, job: Job) -> None:
        """Begin every choice of `job.pending`; feed the job on the event loop from now on."""
        ...

    def stop(self, job: Job, index: int) -> None:
        """Make no more tokens for a choice; what is fed for it from now on is dropped."""
        ...


class Job:
    """One request in an engine. Used on the event loop only, but for its construction.

    Args:
        prompt_ids: as `text.prompt.prepare` returned them.
        output_apart: the output has a context of its own, as in an encoder-decoder.
    """

    def __init__(
        self,
        request: GenerateRequest,
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer,
        *,
        context_length: int,
        stream_interval: int,
        arrival: float | None = None,
        reasoning: Marks | None = None,
        output_apart: bool = False,
    ) -> None:
        self.request = request
        self.prompt_ids = prompt_ids
        self.cached_tokens = 0
        """Prompt tokens that came from a cache; set by the engine when it knows."""
        self.grammar: CompiledGrammar | None = None
        """The request's, where the backend compiles it itself; set before the job begins."""
        self.events = EventQueue()
        """What has come of the request. Closed at its end, with an error if it failed."""
        self._tokenizer = tokenizer
        self._arrival = monotonic() if arrival is None else arrival
        self._prepared_s = 0.0
        self._queued_s = 0.0
        self._first_token_s: dict[int, float] = {}
        self._engine: TokenEngine | None = None
        self._limits = ChoiceLimits(
            prompt_tokens=len(prompt_ids),
            context_length=context_length,
            stream_interval=stream_interval,
            output_apart=output_apart,
            reasoning=reasoning,
        )
        self._open: dict[int, Choice] = {}
        before = () if output_apart else prompt_ids
        for index in range(request.output.n):
            if not request.resumed_choice(index).finished:
                self._open[index] = Choice(request, index, tokenizer, self._limits, before)

    @property
    def pending(self) -> tuple[int, ...]:
        """Indices of the choices that want more tokens."""
        return tuple(self._open)

    @property
    def held_tokens(self) -> int:
        """Tokens that the engine holds keys and values of, the prompt once."""
        return len(self.prompt_ids) + sum(choice.token_count for choice in self._open.values()) if self._open else 0

    def prefix(self, index: int) -> list[int]:
        """What the engine continues for a choice: the prompt, and the output that another worker made of it."""
        return [*self.prompt_ids, *self.request.resumed_choice(index).output_token_ids]

    def max_tokens(self, index: int) -> int:
        """Tokens that the engine may still make for a choice. At least 1 while the choice is pending."""
        made = len(self.request.resumed_choice(index).output_token_ids)
        return max(1, min(self.request.stopping.max_new_tokens, self._limits.output_tokens) - made)

    def min_tokens(self, index: int) -> int:
        """Tokens before which the engine must not make an end of sequence or stop token; at most `max_tokens`.

        A request may ask for more than its prompt leaves room for; engines take that for an error.
        """
        made = len(self.request.resumed_choice(index).output_token_ids)
        return min(self.max_tokens(index), max(0, self.request.stopping.min_new_tokens - made))

    # For whoever runs it in an engine.

    def begin(self, engine: TokenEngine) -> None:
        """Choices that had their end in what was resumed end now; the rest goes to the engine."""
        self._engine = engine
        self._prepared_s = monotonic() - self._arrival
        for choice in list(self._open.values()):
            if choice.finish_reason is not None:
                self._emit(choice, ended_by_engine=True)
        if self._open:
            engine.submit(self)
        else:
            self.events.close()

    def stop(self) -> None:
        """Stop all choices in the engine; nobody wants them any more."""
        indices = self.pending
        self._open.clear()
        for index in indices:
            if self._engine is not None:
                self._engine.stop(self, index)

    # For the engine.

    def show_prompt(self, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        """Send the prompt event if the request asks for it. Call it before the first `feed`."""
        echo = prompts.echo(self._tokenizer, self.request, self.prompt_ids, logprobs)
        if echo is not None:
            self.events.put([echo])

    def started(self, at: float | None = None) -> None:
        """The engine has begun with the prompt, at a time of the monotonic clock: its time in the queue is over."""
        self._queued_s = self._queued_s or max(0.0, (monotonic() if at is None else at) - self._arrival)

    def feed(
        self,
        index: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob] = (),
        finish_reason: FinishReason | None = None,
    ) -> None:
        """Take new tokens of a choice. Does nothing for a choice that has ended.

        Args:
            logprobs: one for each token where the request asks for them, else none.
            finish_reason: set where the engine itself has ended the choice, whatever its tokens say.
        """
        choice = self._open.get(index)
        if choice is None:
            return
        if token_ids and index not in self._first_token_s:
            self._first_token_s[index] = monotonic() - self._arrival
        for i, token_id in enumerate(token_ids):
            choice.push(token_id, logprobs[i] if logprobs else None)
            if choice.finish_reason is not None:
                break
        if choice.finish_reason is None and finish_reason is not None:
            choice.end(finish_reason)
        self._emit(choice, ended_by_engine=finish_reason is not None)

    def fail(self, error: Exception) -> None:
        """End the request with an error, after the events that are out."""
        self.stop()
        self.events.close(error)

    def _emit(self, choice: Choice, ended_by_engine: bool) -> None:
        if not choice.due:
            return
        choice.cached_tokens = self.cached_tokens
        events: list[Event] = []
        if (delta := choice.delta()) is not None:
            events.append(delta)
        if choice.finish_reason is not None:
            del self._open[choice.index]
            events.append(choice.completion(self._timings(choice.index)))
            if not ended_by_engine and self._engine is not None:
                self._engine.stop(self, choice.index)
        self.events.put(events)
        if not self._open:
            self.events.close()

    def _timings(self, index: int) -> Timings:
        return Timings(
            queued_s=self._queued_s,
            time_to_first_token_s=self._first_token_s.get(index, 0.0),
            total_s=monotonic() - self._arrival,
            prepared_s=self._prepared_s,
        )
