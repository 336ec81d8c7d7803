"""What the caller has of a generation, so that another server can go on with it."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from fastchat_grpc.core import GREEDY_TEMPERATURE, GREEDY_TOP_P
from fastchat_grpc.v1 import generation_pb2 as pb

T = TypeVar("T")

UNREAD = 256
"""Events that are kept as they came. Most generations end before one must be read."""


class Codec(Generic[T]):
    """How events are read, where they must be, and written, where they were changed.

    Args:
        decode: from an event to its message.
        encode: and back.
        completes: whether an event is a Completion; called for every event, so it should be quick.
    """

    def __init__(
        self,
        decode: Callable[[T], pb.GenerateResponse],
        encode: Callable[[pb.GenerateResponse], T],
        completes: Callable[[T], bool],
    ) -> None:
        self.decode = decode
        self.encode = encode
        self.completes = completes


_COMPLETION_TAG = bytes([pb.GenerateResponse.COMPLETION_FIELD_NUMBER << 3 | 2])


def _completes(event: bytes) -> bool:
    # A GenerateResponse holds one field, so that the first byte tells which event it is.
    return event[:1] == _COMPLETION_TAG


PARSED: Codec[pb.GenerateResponse] = Codec(
    lambda event: event, lambda event: event, lambda event: event.HasField("completion")
)
RAW: Codec[bytes] = Codec(pb.GenerateResponse.FromString, pb.GenerateResponse.SerializeToString, _completes)


class _Choice:
    __slots__ = ("finished", "text_length", "token_ids")

    def __init__(self) -> None:
        self.token_ids = array("i")
        self.text_length = 0
        self.finished = False


class Progress(Generic[T]):
    """What the caller has of one generation. `observe` every event that is passed on.

    Args:
        request: the request as the caller sent it; it may itself be a resumed one.
        codec: how events are read.
        max_cached_tokens: output tokens kept; beyond them the generation cannot be resumed.
        resumable: False: keep nothing.
    """

    def __init__(
        self,
        request: pb.GenerateRequest,
        codec: Codec[T],
        max_cached_tokens: int,
        rng: random.Random | None = None,
        *,
        resumable: bool = True,
    ) -> None:
        self._request = request
        self._codec = codec
        self._rng = rng or random.Random()
        self._room = max_cached_tokens
        self._choices: dict[int, _Choice] = {}
        self._unread: list[T] = []
        self._resumable = resumable
        self._unfinished = request.output.n if request.output.HasField("n") else 1
        self.started = False
        """Whether the caller has seen an event."""
        self.resumed = False
        """Whether the present attempt goes on with what another began."""
        for choice in request.resume.choices:
            self._take(choice.index, choice.output_token_ids, choice.text_length)
            if choice.finished:
                self._unfinished -= 1
                self._finish(choice.index)

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return self._unfinished <= 0

    @property
    def resumable(self) -> bool:
        """Whether the generation can go on elsewhere once it has started."""
        self._read()
        return self._resumable

    def observe(self, event: T) -> None:
        """Take note of an event on its way to the caller."""
        self.started = True
        if self._codec.completes(event):
            self._unfinished -= 1
        if self._resumable:
            self._unread.append(event)
            if len(self._unread) >= UNREAD:
                self._read()

    def request(self, *, resumable: bool, seeded: bool = True) -> pb.GenerateRequest:
        """The request for the next attempt.

        Args:
            resumable: the next server can continue what it did not begin, and be continued.
            seeded: such a server gets a seed where the caller gave none, so that others can go on as it
                would have. Without one they go on with other random numbers.
        """
        request = self._request
        if not self.started:
            self._resumable = self._resumable and resumable
            if seeded and self._resumable:
                self._assign_seed(request)
            return request
        self._read()
        self.resumed = True
        request.resume.Clear()
        request.resume.SetInParent()  # present even when empty: the prompt is not echoed again
        for index, choice in sorted(self._choices.items()):
            entry = request.resume.choices.add(index=index, text_length=choice.text_length, finished=choice.finished)
            if not choice.finished:
                entry.output_token_ids.extend(choice.token_ids)
        return request

    def _assign_seed(self, request: pb.GenerateRequest) -> None:
        sampling = request.sampling
        greedy = (sampling.HasField("temperature") and sampling.temperature < GREEDY_TEMPERATURE) or (
            sampling.HasField("top_p") and sampling.top_p < GREEDY_TOP_P
        )
        if not greedy and not sampling.HasField("seed"):
            sampling.seed = self._rng.getrandbits(63)

    def _read(self) -> None:
        """Turn what was kept as it came into what a server needs to know."""
        events, self._unread = self._unread, []
        for item in events:
            event = self._codec.decode(item)
            if event.HasField("delta"):
                delta = event.delta
                self._take(delta.index, delta.token_ids, len(delta.text))
            elif event.HasField("completion"):
                self._finish(event.completion.index)

    def _take(self, index: int, token_ids: Iterable[int], text_length: int) -> None:
        if not self._resumable:
            return
        choice = self._choices.setdefault(index, _Choice())
        before = len(choice.token_ids)
        choice.token_ids.extend(token_ids)
        choice.text_length += text_length
        self._room -= len(choice.token_ids) - before
        if self._room < 0:
            self._resumable = False
            self._choices.clear()

    def _finish(self, index: int) -> None:
        if self._resumable:
            choice = self._choices.setdefault(index, _Choice())
            choice.finished = True
            self._room += len(choice.token_ids)
            choice.token_ids = array("i")
