"""What the caller has of a generation, and the request with which another server goes on from there."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Collection, Iterable
from typing import Generic, NamedTuple, TypeVar

from fastchat_grpc.core import GREEDY_TEMPERATURE, GREEDY_TOP_P, Capability
from fastchat_grpc.v1 import generation_pb2 as pb

T = TypeVar("T")

UNREAD = 256
"""Events that are kept as they came. Most generations end before one must be read."""
UNREAD_BYTES = 32_768
"""And so many bytes of them: an event with many log probabilities is large, its token ids are not."""


class Codec(Generic[T]):
    """How events are read, where they must be, and written, where they were changed.

    Args:
        decode: from an event to its message.
        encode: and back.
        completes: whether an event is a Completion; called for every event, so it should be quick.
        size: bytes that an event holds; called for every event.
    """

    def __init__(
        self,
        decode: Callable[[T], pb.GenerateResponse],
        encode: Callable[[pb.GenerateResponse], T],
        completes: Callable[[T], bool],
        size: Callable[[T], int],
    ) -> None:
        self.decode = decode
        self.encode = encode
        self.completes = completes
        self.size = size


_COMPLETION_TAG = bytes([pb.GenerateResponse.COMPLETION_FIELD_NUMBER << 3 | 2])


def _completes(event: bytes) -> bool:
    # A GenerateResponse holds one field, so that the first byte tells which event it is.
    return event[:1] == _COMPLETION_TAG


PARSED: Codec[pb.GenerateResponse] = Codec(
    lambda event: event, lambda event: event, lambda event: event.HasField("completion"), lambda event: event.ByteSize()
)
RAW: Codec[bytes] = Codec(pb.GenerateResponse.FromString, pb.GenerateResponse.SerializeToString, _completes, len)


def sampled(request: pb.GenerateRequest) -> bool:
    """Whether tokens are drawn: random numbers matter."""
    sampling = request.sampling
    return not (
        (sampling.HasField("temperature") and sampling.temperature < GREEDY_TEMPERATURE)
        or (sampling.HasField("top_p") and sampling.top_p < GREEDY_TOP_P)
    )


class ResumeNeeds(NamedTuple):
    """What a server must be able to do, and be, to go on with a request.

    Attributes:
        fingerprint: of the weights and the tokenizer that began; empty: unknown, or any will do.
        backend: that began, where another would draw other random numbers; empty: any will do.
    """

    capabilities: frozenset[Capability]
    fingerprint: str = ""
    backend: str = ""


def own_seed(request: pb.GenerateRequest) -> bool:
    """Whether the caller's seed decides which tokens are drawn."""
    return request.sampling.HasField("seed") and sampled(request)


def resume_needs(request: pb.GenerateRequest, resume: pb.Resume) -> ResumeNeeds:
    """What a server must be able to do, and be, to go on with a request from there."""
    finished = {choice.index for choice in resume.choices if choice.finished}
    begun = bool(finished) or any(choice.output_token_ids for choice in resume.choices)
    continues = any(choice.output_token_ids and choice.index not in finished for choice in resume.choices)
    return _needs(request, begun, continues, resume.model_fingerprint, resume.backend)


def going_on_needs(request: pb.GenerateRequest) -> ResumeNeeds:
    """What a server must be able to do to go on with a request that another has begun; `backend` says whether it must
    be of the same one."""
    return _needs(request, True, True, "", ANY_BACKEND)


ANY_BACKEND = "*"
"""Stands for a backend that is not known yet."""


def needs_of(*, seeded: bool, stateful: bool) -> ResumeNeeds:
    """As `going_on_needs`, by what a request has: a seed that decides what is drawn; penalties or a grammar."""
    needs = {Capability.RESUME}
    if seeded:
        needs.add(Capability.SEEDED_RESUME)
    if stateful:
        needs.add(Capability.STATEFUL_RESUME)
    return ResumeNeeds(frozenset(needs), "", ANY_BACKEND if seeded else "")


def _needs(request: pb.GenerateRequest, begun: bool, continues: bool, fingerprint: str, backend: str) -> ResumeNeeds:
    """The request's own seed asks for more than the same distribution.

    With other random numbers the text would not be the one that the seed stands for. That holds for choices that
    have not begun, too, once another has: all that a seed gives comes of one generator.

    Args:
        begun: whether a choice has output already.
        continues: whether such a choice goes on.
    """
    seeded = begun and own_seed(request)
    sampling = request.sampling
    stateful = sampling.presence_penalty or sampling.frequency_penalty or request.HasField("structured_output")
    needs = needs_of(seeded=seeded, stateful=bool(stateful and continues)).capabilities
    return ResumeNeeds(needs, fingerprint, backend if seeded else "")


EMBEDS = frozenset({Capability.EMBED})
"""What requests of embeddings ask for, as `uses`."""


def uses(request: pb.GenerateRequest) -> frozenset[Capability]:
    """What a request asks of a model that not every backend can do; others refuse the request."""
    used = set()
    if request.HasField("structured_output"):
        used.add(Capability.STRUCTURED_OUTPUT)
    if request.output.HasField("logprobs"):
        used.add(Capability.LOGPROBS)
    if request.sampling.HasField("seed"):
        used.add(Capability.SEED)
    if request.HasField("chat"):
        used.add(Capability.CHAT)
    return frozenset(used)


def obstacle(request: pb.GenerateRequest, capabilities: Collection[Capability]) -> str:
    """Why a generation that begins at a server with these capabilities could not go on elsewhere; empty: it can."""
    if Capability.RESUME not in capabilities:
        return "its model cannot be continued by another worker"
    if own_seed(request) and Capability.SEEDED_RESUME not in capabilities:
        return "its model cannot continue the random numbers of a seed"
    return ""


class _Choice:
    __slots__ = ("finished", "text_length", "token_ids")

    def __init__(self) -> None:
        self.token_ids = array("i")
        self.text_length = 0
        self.finished = False


class ResumeState(Generic[T]):
    """What the caller has of one generation. `observe` every event that is passed on; changes no request.

    Args:
        request: the request as the caller sent it; it may itself be a resumed one.
        codec: how events are read.
        max_tokens: output tokens kept; beyond them the generation cannot be resumed.
        enabled: False: nothing is kept, it cannot be resumed.
    """

    def __init__(self, request: pb.GenerateRequest, codec: Codec[T], max_tokens: int, *, enabled: bool = True) -> None:
        self._codec = codec
        self._max_tokens = self._room = max_tokens
        self._choices: dict[int, _Choice] = {}
        self._unread: list[T] = []
        self._unread_bytes = 0
        self._keeping = enabled
        self._obstacle = "" if enabled else "resuming is turned off"
        self._where_it_began = ""
        self._unfinished = request.output.n if request.output.HasField("n") else 1
        self.started = False
        """Whether the caller has seen an event."""
        self._arrived = request.resume
        self.fingerprint: str = request.resume.model_fingerprint
        """Identity of the weights and the tokenizer that began; empty: unknown."""
        self.backend: str = request.resume.backend
        """Name of the backend that began; empty: unknown."""
        self._seeded = own_seed(request)
        for choice in request.resume.choices:
            self._take(choice.index, choice.output_token_ids, choice.text_length)
            if choice.finished:
                self._finish(choice.index)
        self._unfinished -= len({choice.index for choice in request.resume.choices if choice.finished})

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return self._unfinished <= 0

    @property
    def obstacle(self) -> str:
        """Why another server cannot go on from here; empty: it can."""
        self._read()
        unknown = "it is not known which backend draws the random numbers of its seed"
        return self._obstacle or self._where_it_began or (unknown if self._seeded and not self.backend else "")

    def needs(self, request: pb.GenerateRequest) -> ResumeNeeds:
        """What a server must be able to do, and be, to go on with the request from here."""
        self._read()
        choices = self._choices.values()
        begun = any(choice.token_ids or choice.finished for choice in choices)
        continues = any(choice.token_ids for choice in choices)
        return _needs(request, begun, continues, self.fingerprint, self.backend)

    def begins_where(self, obstacle: str, fingerprint: str, backend: str) -> None:
        """An attempt begins at a server.

        Args:
            obstacle: why no other could go on with it, if so.
            fingerprint: of the model there; empty: unknown.
            backend: that runs it; empty: unknown.
        """
        self._where_it_began = obstacle
        self.fingerprint = fingerprint or self._arrived.model_fingerprint
        self.backend = backend or self._arrived.backend

    def learned(self, *, fingerprint: str = "", backend: str = "") -> None:
        """The server that begins has said more of itself. It knows best: a relay may stand for several models."""
        self.fingerprint = fingerprint or self.fingerprint
        self.backend = backend or self.backend

    def give_up(self, reason: str) -> None:
        """Keep nothing more."""
        self._obstacle = self._obstacle or reason
        self._keeping = False
        self._choices.clear()
        self._unread.clear()

    def observe(self, event: T) -> None:
        """Take note of an event on its way to the caller."""
        self.started = True
        if self._codec.completes(event):
            self._unfinished -= 1
        if self._keeping and not self._where_it_began:
            self._unread.append(event)
            self._unread_bytes += self._codec.size(event)
            if len(self._unread) >= UNREAD or self._unread_bytes >= UNREAD_BYTES:
                self._read()

    def snapshot(self) -> pb.Resume:
        """What the next server needs to know."""
        self._read()
        resume = pb.Resume(model_fingerprint=self.fingerprint, backend=self.backend)
        for index, choice in sorted(self._choices.items()):
            entry = resume.choices.add(index=index, text_length=choice.text_length, finished=choice.finished)
            if not choice.finished:
                entry.output_token_ids.extend(choice.token_ids)
        return resume

    def _read(self) -> None:
        """Turn what was kept as it came into what a server needs to know."""
        events, self._unread, self._unread_bytes = self._unread, [], 0
        for item in events:
            event = self._codec.decode(item)
            if event.HasField("delta"):
                delta = event.delta
                self._take(delta.index, delta.token_ids, len(delta.reasoning) + len(delta.text))
            elif event.HasField("completion"):
                self.fingerprint = self.fingerprint or event.completion.model_fingerprint
                self._finish(event.completion.index)

    def _take(self, index: int, token_ids: Iterable[int], text_length: int) -> None:
        if not self._keeping:
            return
        choice = self._choices.setdefault(index, _Choice())
        before = len(choice.token_ids)
        choice.token_ids.extend(token_ids)
        choice.text_length += text_length
        self._room -= len(choice.token_ids) - before
        if self._room < 0:
            self.give_up(f"its output has more than the {self._max_tokens} tokens that are kept")

    def _finish(self, index: int) -> None:
        if self._keeping:
            choice = self._choices.setdefault(index, _Choice())
            choice.finished = True
            self._room += len(choice.token_ids)
            choice.token_ids = array("i")


def fallback_seed(request: pb.GenerateRequest, rng: random.Random) -> int | None:
    """A seed to send with every attempt of a request, so that whoever goes on with it draws as the first would have.

    None where the request has one, of its caller or of a relay above, or where nothing is drawn. A resumed one has it
    in its Resume.
    """
    sampling = request.sampling
    if request.resume.HasField("fallback_seed") and not sampling.HasField("fallback_seed"):
        return request.resume.fallback_seed
    if sampling.HasField("seed") or sampling.HasField("fallback_seed") or not sampled(request):
        return None
    return rng.getrandbits(63)


def resume_request(
    request: pb.GenerateRequest, resume: pb.Resume | None, *, model: str = "", fallback_seed: int | None = None
) -> pb.GenerateRequest:
    """A copy of the request for the next attempt.

    Args:
        resume: what the caller has already; None: nothing of this call.
        model: the model's full name; empty: as the caller wrote it.
        fallback_seed: for a request without a seed.
    """
    attempt = pb.GenerateRequest()
    attempt.CopyFrom(request)
    if model:
        attempt.model = model
    if fallback_seed is not None:
        attempt.sampling.fallback_seed = fallback_seed
    if resume is not None:
        attempt.resume.SetInParent()  # present even when empty: the prompt is not echoed again
        attempt.resume.CopyFrom(resume)
    return attempt
