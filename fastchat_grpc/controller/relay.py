"""The relay: a controller answers as a worker does, by passing each request to a worker that it picks.

Messages stay bytes. A request is read once, to learn model and session; events are read in passing, to
know what the caller has if the worker dies (see `fastchat_grpc.rpc.failover`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from time import monotonic
from typing import Any

from fastchat_grpc.config import DispatchMethod, FailoverConfig
from fastchat_grpc.controller.callers import NOBODY, Caller
from fastchat_grpc.controller.candidates import Attempts, Candidates
from fastchat_grpc.controller.dispatch import Dispatcher, PickRequest
from fastchat_grpc.core import Capability, ModelInfo
from fastchat_grpc.rpc.failover import Call, Failover
from fastchat_grpc.rpc.pool import ChannelPool, PooledChannel
from fastchat_grpc.rpc.resume import (
    RAW,
    ResumeState,
    fallback_seed,
    obstacle,
    resume_needs,
    resume_request,
    uses,
)
from fastchat_grpc.v1 import generation_pb2 as pb

logger = logging.getLogger(__name__)

READERS_LOOK_S = 1.0
GENERATE = "/fastchat_grpc.v1.GenerationService/Generate"
AFFINITY_CHARACTERS = 256
"""Length of prompt that prefix_affinity goes by where there is no session key."""

Named = Callable[[str], bytes]
"""Serializes a request with the model's full name in it."""
Begins = Callable[[ResumeState[bytes]], None]


class Relay:
    """Relays calls to workers, past those that fail. Its counters are those of its `failover`.

    Args:
        send_timeout_s: how long an event may lie unread before its request is ended; `run` looks.
    """

    def __init__(
        self, dispatcher: Dispatcher, pool: ChannelPool, config: FailoverConfig, send_timeout_s: float = 60.0
    ) -> None:
        self.dispatcher = dispatcher
        self.pool = pool
        self.failover = Failover(config)
        self.attempts = Attempts(dispatcher, pool)
        self._send_timeout_s = send_timeout_s

    def generate(
        self, request: pb.GenerateRequest, caller: Caller = NOBODY, begins: Begins | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Serialized GenerateResponses of one generation. Close the generator to end it. Does not change `request`.

        Args:
            begins: called whenever a worker is asked to begin it, with what will be known of the one that did.
        """
        relayed = _Generation(self, request, caller, begins)
        return self.failover.generate(request, relayed.candidates, RAW, caller.deadline)

    async def call(
        self,
        method: str,
        model: str,
        named: Named,
        caller: Caller = NOBODY,
        prefers: frozenset[Capability] = frozenset(),
    ) -> bytes:
        """The serialized response of one unary call that may be repeated without harm.

        Args:
            model: as the caller named it; empty for the only one.
            named: the serialized request, given the model's full name.
            prefers: as in PickRequest.
        """

        def start(channel: PooledChannel, info: ModelInfo, call: Call[bytes]) -> Any:
            multicallable = channel.unary_unary(method)
            return multicallable(named(info.name), timeout=call.remaining_s(), metadata=caller.metadata)

        candidates = Candidates(self.attempts, model, "", lambda call: PickRequest(prefers=prefers), start, method)
        return await self.failover.call(candidates, caller.deadline)

    async def run(self) -> None:
        """End, until cancelled, what callers do not read: each holds a place at a worker, and memory here."""
        while True:
            await asyncio.sleep(min(READERS_LOOK_S, self._send_timeout_s / 4))
            now = monotonic()
            unread = [attempt for attempt in self.attempts.running if attempt.unread_s(now) > self._send_timeout_s]
            for attempt in unread:
                attempt.drop(now)
            if unread:
                logger.warning(
                    "%d relayed requests were not read for %g s and are ended", len(unread), self._send_timeout_s
                )

    def affinity_key(self, request: pb.GenerateRequest) -> str:
        """What prefix_affinity groups a request by; empty where nothing goes by it."""
        if self.dispatcher.method is not DispatchMethod.PREFIX_AFFINITY:
            return ""
        return request.session_key or _prefix(request)


def naming(message: Any) -> Named:
    """A message with a field `model`, serialized with the model's full name there. The message is not changed."""

    def named(model: str) -> bytes:
        copy = type(message)()
        copy.CopyFrom(message)
        copy.model = model
        return bytes(copy.SerializeToString())

    return named


def _prefix(request: pb.GenerateRequest) -> str:
    match request.WhichOneof("input"):
        case "prompt":
            return request.prompt[:AFFINITY_CHARACTERS]
        case "prompt_token_ids":
            return str(request.prompt_token_ids.ids[: AFFINITY_CHARACTERS // 4])
        case "chat":
            text = ""
            for message in request.chat.messages:
                text += f"{message.role}:{message.content or ''.join(part.text for part in message.parts)}\n"
                if len(text) >= AFFINITY_CHARACTERS:
                    break
            return text[:AFFINITY_CHARACTERS]
    return ""


class _Generation:
    """One generation: what it wants of a worker, and the request that a worker gets."""

    def __init__(self, relay: Relay, request: pb.GenerateRequest, caller: Caller, begins: Begins | None) -> None:
        self._begins = begins
        self._request = request
        self._caller = caller
        self._fallback_seed = fallback_seed(request, relay.failover.rng)
        self._uses = uses(request)
        self._arrived = resume_needs(request, request.resume) if request.HasField("resume") else None
        self.candidates = Candidates(
            relay.attempts, request.model, relay.affinity_key(request), self._wanted, self._open, GENERATE
        )

    def _wanted(self, call: Call[bytes]) -> PickRequest:
        request, state = self._request, call.state
        wanted = PickRequest(adapter=request.lora_adapter, prefers=self._uses)
        if state is not None and state.started:
            return wanted.going_on(state.needs(request))
        return wanted.going_on(self._arrived) if self._arrived is not None else wanted

    def _open(self, channel: PooledChannel, info: ModelInfo, call: Call[bytes]) -> Any:
        request, state = self._request, call.state
        assert state is not None
        if not state.started:
            state.begins_where(obstacle(request, info.capabilities), info.fingerprint, info.backend)
            if self._begins is not None:
                self._begins(state)
        message = resume_request(
            request,
            state.snapshot() if state.started else None,
            model=info.name,
            fallback_seed=self._fallback_seed,
        )
        generate = channel.unary_stream(GENERATE)
        return generate(message.SerializeToString(), timeout=call.remaining_s(), metadata=self._caller.metadata)
