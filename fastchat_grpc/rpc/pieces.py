"""The state of an answer, piece by piece, for bridges that take a broken one to another worker.

What is asked for and sent, and by which rules, is in docs/contract.md ("State that travels with an answer").
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from fastchat_grpc.config import MAX_MESSAGE_BYTES
from fastchat_grpc.core import Capability, Completion, Delta, Event, GenerateRequest, ModelInfo, PromptEcho
from fastchat_grpc.rpc.bridge import RESUME_HEADER
from fastchat_grpc.v1 import generation_pb2 as pb

PIECE_OVERHEAD = 32
"""Bytes around a piece where it is sent back, at most."""
MAX_PIECES = 262_144
"""Pieces of one answer: whoever goes on with it reads them all first."""


def asked_for(metadata: Iterable[tuple[str, Any]] | None) -> bool:
    """Whether a call wants the state of its answer."""
    return any(key == RESUME_HEADER and value == "1" for key, value in metadata or ())


def can_go_on(request: GenerateRequest, capabilities: Collection[Capability]) -> bool:
    """Whether a worker with these capabilities could go on with the request from any token."""
    sampling = request.sampling
    needs = {Capability.RESUME}
    if sampling.seed is not None and not sampling.greedy:
        needs.add(Capability.SEEDED_RESUME)
    if sampling.presence_penalty or sampling.frequency_penalty or request.grammar is not None:
        needs.add(Capability.STATEFUL_RESUME)
    return needs <= frozenset(capabilities)


def beginning(request: GenerateRequest, model: ModelInfo, rng: random.Random) -> pb.Resume:
    """What all of an answer has in common with its beginning: its model, and the seed that it is drawn with, if any."""
    resume = pb.Resume(model_fingerprint=model.fingerprint, backend=model.backend)
    sampling = request.sampling
    if sampling.fallback_seed is not None:
        resume.fallback_seed = sampling.fallback_seed
    elif sampling.seed is None and not sampling.greedy and Capability.SEEDED_RESUME in model.capabilities:
        resume.fallback_seed = rng.getrandbits(63)
    return resume


class Room:
    """How much state one answer may hand out: it goes to the next worker in one message, behind the request.

    Args:
        able: whether the model can go on with the answer at all; else the first piece says that it cannot.
    """

    def __init__(self, request_bytes: int, *, able: bool) -> None:
        self._bytes = MAX_MESSAGE_BYTES - request_bytes if able else 0
        self._pieces = MAX_PIECES
        self.resumable = True
        """Whether the answer can go on from here."""

    def take(self, piece: bytes) -> bytes:
        """The piece; or nothing, where it does not fit: that says that the answer cannot go on from here."""
        self._bytes -= len(piece) + PIECE_OVERHEAD
        self._pieces -= 1
        if self._bytes < 0 or self._pieces < 0:
            self.resumable = False
            return b""
        return piece


class GenerationPieces:
    """Makes `GenerateResponse.resume_piece` of the events of one generation, in their order.

    Args:
        begins: see `beginning`.
    """

    def __init__(self, begins: pb.Resume, room: Room) -> None:
        self._begins: pb.Resume | None = begins
        self._room = room
        # One message is filled anew for every event: to make one takes five times as long.
        self._resume = pb.Resume()
        self._choice = self._resume.choices.add()
        self._token_ids = self._choice.output_token_ids

    @property
    def resumable(self) -> bool:
        """Whether the next event has a piece."""
        return self._room.resumable

    def of(self, event: Event) -> bytes:
        """What an event adds."""
        choice = self._choice
        choice.index = 0 if isinstance(event, PromptEcho) else event.index
        choice.text_length = len(event.reasoning) + len(event.text) if isinstance(event, Delta) else 0
        choice.finished = isinstance(event, Completion)
        self._token_ids[:] = event.token_ids if isinstance(event, Delta) else ()
        piece = self._resume.SerializeToString()
        if self._begins is not None:
            piece = self._begins.SerializeToString() + piece  # messages that are put behind each other are one
            self._begins = None
        return self._room.take(piece)


def seeded(request: GenerateRequest, begins: pb.Resume) -> GenerateRequest:
    """The request, with the seed that its answer has begun with."""
    if not begins.HasField("fallback_seed") or request.sampling.fallback_seed is not None:
        return request
    return replace(request, sampling=replace(request.sampling, fallback_seed=begins.fallback_seed))
