"""One answer under way: events of generations in, the bodies of a stream or a single body out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import grpc
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.core import Completion, Event, GenerateRequest, PromptEcho
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.openai import pings, sse
from fastchat_grpc.openai.beside import Beside
from fastchat_grpc.openai.call import Call
from fastchat_grpc.openai.merge import merge
from fastchat_grpc.openai.paths import rename
from fastchat_grpc.openai.port import GenerationPort
from fastchat_grpc.openai.state import TYPE, BegunReply, ReplyPieces
from fastchat_grpc.rpc.border import to_domain_error
from fastchat_grpc.rpc.retry import Verdict, judge


class Reply(Protocol):
    """A reply of one kind: it is fed events in their order."""

    def feed(self, event: Event, base: int = 0) -> bytes:
        """What of a streamed reply an event adds; nothing where it says nothing new, or the reply is not streamed.

        Args:
            base: index of the first choice of the event's prompt.
        """
        ...

    def settled(self, index: int) -> bool:
        """Whether the log probabilities that a choice was fed have all been told."""
        ...

    def end(self) -> bytes:
        """What follows the last event: the end of a stream, or the whole body."""
        ...


class Answer:
    """The answer to one call.

    Args:
        pieces: of its state, where they are asked for and can be had.
        begun: what another worker has told of it.
        ping_s: as in `pings.with_pings`.
    """

    def __init__(
        self,
        port: GenerationPort,
        beside: Beside,
        call: Call,
        *,
        pieces: ReplyPieces | None = None,
        begun: BegunReply | None = None,
        ping_s: float = 0.0,
    ) -> None:
        self._port = port
        self._beside = beside
        self._call = call
        self._pieces = pieces
        self._begun = begun
        self._ping_s = ping_s

    def bodies(self, reply: Reply) -> AsyncGenerator[HttpBody, None]:
        """The bodies that a caller is sent."""
        return self._stream(reply) if self._call.reply.stream else self._whole(reply)

    async def _stream(self, reply: Reply) -> AsyncGenerator[HttpBody, None]:
        """One body per event that says something new, or adds to the state that is asked for.

        A failure midway ends the stream in band; but where state is asked for, one that another worker may mend does
        not.
        """
        begun, said, pieces = self._begun is not None and self._begun.spoken, 0.0, self._pieces
        try:
            async with (
                aclosing(self._events()) as events,
                aclosing(pings.with_pings(events, self._ping_s)) as items,
            ):
                async for item in items:
                    if item is None:
                        chunk, state = sse.PING, None if pieces is None else pieces.nothing_new()
                    else:
                        base, event = item
                        weight, state = _weight(event, self._call), None
                        chunk = await self._beside.write(weight, reply.feed, event, base)
                        if pieces is not None:
                            state = await self._beside.write(weight, pieces.of, event, base, reply)
                    now = time.monotonic()
                    if not chunk and begun and 0 < self._ping_s < now - said:
                        chunk = sse.PING  # text is held back, such as a long argument of a call
                    if chunk:
                        yield _body(chunk, state) if begun else _body(chunk, state, sse.CONTENT_TYPE)
                        begun, said = True, now
                    elif state is not None:
                        yield _body(b"", state)
            yield _body(reply.end(), None if pieces is None else pieces.complete())
        except Exception as failure:
            if not begun or isinstance(failure, grpc.aio.AbortError):
                raise
            error = to_domain_error(failure, "OpenAIService")
            if pieces is not None and pieces.resumable:
                if judge(error, resumed=self._begun is not None) is not Verdict.FINAL:
                    raise error from None
                yield _body(sse.failure(error), pieces.no_more())
            else:
                yield _body(sse.failure(error))
            # For gRPC callers and metrics; over HTTP the status is already sent, and the event above tells.
            raise error from None

    async def _whole(self, reply: Reply) -> AsyncGenerator[HttpBody, None]:
        """One body at the end, and before it, where state is asked for, bodies that hold nothing else."""
        size, pieces = 0, self._pieces
        async with aclosing(self._events()) as events:
            async for base, event in events:
                reply.feed(event, base)
                weight = _weight(event, self._call)
                size += weight
                if pieces is not None:
                    state = await self._beside.write(weight, pieces.of, event, base, reply)
                    if state is not None:
                        yield _body(b"", state)
        body = await self._beside.write(size, reply.end)
        yield _body(body, None if pieces is None else pieces.complete(), sse.JSON_TYPE)

    async def _events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Events of all prompts, each with the index of the first choice of its prompt."""
        begun, per_prompt = self._begun, self._call.choices_per_prompt
        positions: list[int] = []
        generations: list[AsyncGenerator[Event, None]] = []
        for position, generation in enumerate(self._call.generations):
            rest = generation if begun is None else begun.rest_of(position, generation)
            if rest is not None:
                positions.append(position)
                generations.append(self._generate(position, rest))
        if not generations:
            return
        async with aclosing(merge(generations)) as merged:
            async for place, event in merged:
                base = positions[place] * per_prompt
                yield base, event if begun is None else begun.as_begun(event, base)

    async def _generate(self, position: int, generation: GenerateRequest) -> AsyncGenerator[Event, None]:
        try:
            async with aclosing(self._port.generate(generation)) as events:
                async for event in events:
                    yield event
        except InvalidArgument as error:
            renames = self._call.reply.renames
            if len(self._call.generations) > 1:
                own = {path: f"prompt[{position}]" for path, shown in renames.items() if shown == "prompt"}
                renames = {**renames, **own, "prompt": f"prompt[{position}]"}
            raise rename(error, renames) from None


def _body(data: bytes, state: bytes | None = None, content_type: str = "") -> HttpBody:
    # Most have data alone, and each field costs time.
    body = HttpBody(data=data, content_type=content_type) if content_type else HttpBody(data=data)
    if state is not None:
        body.extensions.add(type_url=TYPE, value=state)
    return body


def _weight(event: Event, call: Call) -> int:
    """Bytes that an event adds to an answer, roughly."""
    if isinstance(event, Completion):
        return 0
    tokens = len(event.logprobs) * (1 + len(event.logprobs[-1].top)) if event.logprobs else 0
    size = len(event.text) + len(getattr(event, "reasoning", "")) + 100 * tokens
    return size * call.choices_per_prompt if isinstance(event, PromptEcho) else size
