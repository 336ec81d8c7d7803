"""The state of a reply, piece by piece: out for a bridge that keeps it, and in from one that goes on elsewhere.

A reply is made of a start (its id and time) and of events. So its state is these, in their order: whoever goes on feeds
them to a reply of its own, says nothing of what comes out, and has what the first had, with all that was held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from google.protobuf.any_pb2 import Any as Entry
from google.protobuf.message import DecodeError

from fastchat_grpc.core import (
    INT64_MAX,
    MAX_REQUEST_ID_LENGTH,
    Completion,
    Delta,
    Event,
    FinishReason,
    GenerateRequest,
    PromptEcho,
    ResumedChoice,
    TokenLogprob,
    Usage,
)
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.openai.call import Call
from fastchat_grpc.rpc import convert
from fastchat_grpc.rpc.pieces import MAX_PIECES, Room
from fastchat_grpc.text.seeds import splitmix64
from fastchat_grpc.v1 import generation_pb2, openai_pb2

TYPE = "resume"
"""Type of the entries. They come with every token, so it is short, and no address."""


class Fed(Protocol):
    """A reply, as far as its state is concerned: see `answer.Reply`."""

    def feed(self, event: Event, base: int = 0) -> bytes: ...
    def settled(self, index: int) -> bool: ...


class ReplyPieces:
    """Makes the pieces of one reply, in the order of its bodies. None: that body has none."""

    def __init__(self, start: openai_pb2.ReplyStart, call: Call, room: Room) -> None:
        self._start: openai_pb2.ReplyStart | None = start
        self._room = room
        self._per_prompt = call.choices_per_prompt
        self._keeps_usage = call.reply.continuous_usage
        self._begun: set[int] = set()
        # One message is filled anew for every token: to make one takes five times as long.
        self._piece = openai_pb2.ReplyPiece()
        self._delta = self._piece.event.delta
        self._token_ids = self._delta.token_ids

    @property
    def resumable(self) -> bool:
        """Whether another worker could go on from here."""
        return self._room.resumable

    def of(self, event: Event, base: int, reply: Fed) -> bytes | None:
        """For the body that a reply has made of an event."""
        if not self._room.resumable:
            return None
        if isinstance(event, Delta) and base + event.index in self._begun and not event.logprobs:
            delta = self._delta
            delta.index, delta.text, delta.reasoning = event.index, event.text, event.reasoning
            self._token_ids[:] = event.token_ids
            if self._keeps_usage:
                delta.usage.CopyFrom(convert.usage_to_pb(event.usage))
            self._piece.prompt_index = base // self._per_prompt
            return self._room.take(self._piece.SerializeToString())
        message = convert.event_to_pb(self._kept(event, base, reply))
        if isinstance(event, Delta):
            if base + event.index in self._begun and not self._keeps_usage:
                message.delta.ClearField("usage")
            self._begun.add(base + event.index)
        return self._told(openai_pb2.ReplyPiece(event=message, prompt_index=base // self._per_prompt))

    def nothing_new(self) -> bytes | None:
        """For a body without an event: the start, where it has not been told."""
        return self._told(openai_pb2.ReplyPiece()) if self._start is not None else None

    def complete(self) -> bytes | None:
        """For the last body."""
        return self._told(openai_pb2.ReplyPiece(complete=True))

    def no_more(self) -> bytes:
        """For a body after which nobody can go on."""
        self._room.resumable = False
        return b""

    def _told(self, piece: openai_pb2.ReplyPiece) -> bytes | None:
        if not self._room.resumable:
            return None
        if self._start is not None:
            piece.start.CopyFrom(self._start)
            self._start = None
        return self._room.take(piece.SerializeToString())

    def _kept(self, event: Event, base: int, reply: Fed) -> Event:
        """What of an event is needed to feed it once more."""
        if isinstance(event, Completion) or not event.logprobs:
            return event
        index = base if isinstance(event, PromptEcho) else base + event.index
        return replace(event, logprobs=_bare(event.logprobs)) if reply.settled(index) else event


def _bare(entries: Sequence[TokenLogprob]) -> tuple[TokenLogprob, ...]:
    """Log probabilities that have been told: only their bytes still tell where the next ones stand."""
    return tuple(TokenLogprob(entry.token_id, "", entry.token_bytes, None) for entry in entries)


@dataclass(slots=True)
class _Progress:
    """How far a choice is."""

    token_ids: list[int] = field(default_factory=list)
    text_length: int = 0
    finished: bool = False
    cached_tokens: int | None = None


class BegunReply:
    """A reply that another worker has begun."""

    def __init__(self, entries: Sequence[Entry], call: Call) -> None:
        self.start = openai_pb2.ReplyStart()
        self.complete = False
        self.spoken = False
        """Whether the caller has been sent anything, as far as is known; see `replay`."""
        self._per_prompt = call.choices_per_prompt
        self._prompts = len(call.generations)
        self._events: list[tuple[Event, int]] = []
        self._progress: dict[int, _Progress] = {}
        self._shown: set[int] = set()
        if len(entries) > MAX_PIECES:
            raise InvalidArgument("extensions", f"must have at most {MAX_PIECES} entries, got {len(entries)}")
        for number, entry in enumerate(entries):
            self._read(entry, f"extensions[{number}]")
        if not 1 <= len(self.start.id) <= MAX_REQUEST_ID_LENGTH:
            raise InvalidArgument("extensions", "do not begin with the start of a reply")

    def replay(self, reply: Fed) -> None:
        """Feed a new reply with what has been told."""
        for event, base in self._events:
            self.spoken = bool(reply.feed(event, base)) or self.spoken

    def rest_of(self, position: int, generation: GenerateRequest) -> GenerateRequest | None:
        """What is left to generate of the prompt at that position; None: nothing."""
        base = position * self._per_prompt
        known = {i: self._progress[base + i] for i in range(self._per_prompt) if base + i in self._progress}
        if not known and position not in self._shown:
            return generation
        if sum(choice.finished for choice in known.values()) == self._per_prompt:
            return None
        choices = tuple(
            ResumedChoice(
                index=index,
                output_token_ids=() if choice.finished else tuple(choice.token_ids),
                text_length=choice.text_length,
                finished=choice.finished,
            )
            for index, choice in known.items()
        )
        begins = self.start.resume
        return replace(
            generation, resume=choices, resume_fingerprint=begins.model_fingerprint, resume_backend=begins.backend
        )

    def as_begun(self, event: Event, base: int) -> Event:
        """An event of the rest, as whoever began would have counted it: what was cached there counts."""
        if isinstance(event, PromptEcho):
            return event
        progress = self._progress.get(base + event.index)
        cached = None if progress is None else progress.cached_tokens
        if cached is None or cached == event.usage.cached_tokens:
            return event
        return replace(event, usage=replace(event.usage, cached_tokens=cached))

    def _read(self, entry: Entry, path: str) -> None:
        try:
            piece = openai_pb2.ReplyPiece.FromString(entry.value)
        except DecodeError:
            raise InvalidArgument(path, "is no piece of a reply's state") from None
        if not entry.value:
            raise InvalidArgument(path, "is empty: nobody can go on with the reply from there")
        if piece.HasField("start"):
            self.start = piece.start
        self.complete = self.complete or piece.complete
        if not piece.HasField("event"):
            self.spoken = True  # a sign of life, or the end
            return
        try:
            event = convert.event_from_pb(piece.event)
        except ValueError:
            raise InvalidArgument(path, "has an event that is not known here") from None
        if not 0 <= piece.prompt_index < self._prompts:
            raise InvalidArgument(path, f"is of prompt {piece.prompt_index}, and there are {self._prompts}")
        self._take(event, piece.prompt_index, path)

    def _take(self, event: Event, position: int, path: str) -> None:
        base = position * self._per_prompt
        self._events.append((event, base))
        if isinstance(event, PromptEcho):
            self._shown.add(position)
            return
        if not 0 <= event.index < self._per_prompt:
            raise InvalidArgument(path, f"is of choice {event.index}, and there are {self._per_prompt}")
        progress = self._progress.setdefault(base + event.index, _Progress())
        if progress.cached_tokens is None and event.usage != Usage():
            progress.cached_tokens = event.usage.cached_tokens
        if isinstance(event, Completion):
            if event.finish_reason is FinishReason.ABORT:
                raise InvalidArgument(path, "is the end of a choice that was broken off")
            progress.finished = True
        else:
            progress.token_ids.extend(event.token_ids)
            progress.text_length += len(event.reasoning) + len(event.text)


def read_state(entries: Sequence[Entry], call: Call) -> BegunReply | None:
    """What another worker has told of a reply; None: nothing. Raises InvalidArgument for what is no state of `call`."""
    ours = [entry for entry in entries if entry.type_url == TYPE]
    return BegunReply(ours, call) if ours else None


def seeded_apart(generations: Sequence[GenerateRequest], begins: generation_pb2.Resume) -> tuple[GenerateRequest, ...]:
    """The requests of several prompts with the seed that their reply began with, if any; equal ones have others."""
    seeds = (splitmix64(begins.fallback_seed, place) & INT64_MAX for place in range(len(generations)))
    if not begins.HasField("fallback_seed"):
        return tuple(generations)
    return tuple(
        replace(generation, sampling=replace(generation.sampling, fallback_seed=seed))
        for generation, seed in zip(generations, seeds, strict=True)
    )
