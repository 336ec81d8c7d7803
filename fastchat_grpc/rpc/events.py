"""Events to messages and back on the event loop: a slice at a time where they are large.

The log probabilities of a long prompt are millions of objects, which take seconds to convert. Every other call of the
process waits for the loop, so it has a turn after each slice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastchat_grpc.core import Completion, Event, PromptEcho, TokenLogprob
from fastchat_grpc.rpc import convert
from fastchat_grpc.v1 import generation_pb2 as pb

SLICE = 500
"""Tokens, alternatives included, that are converted at a time: a few milliseconds of work."""


async def event_to_pb(event: Event) -> pb.GenerateResponse:
    """As `convert.event_to_pb`."""
    if isinstance(event, Completion) or not _large(event.logprobs):
        return convert.event_to_pb(event)
    message = convert.event_to_pb(replace(event, logprobs=()))
    entries = message.prompt.logprobs if isinstance(event, PromptEcho) else message.delta.logprobs
    for part in _slices(event.logprobs):
        entries.extend(map(convert.logprob_to_pb, part))
        await asyncio.sleep(0)
    return message


async def event_from_pb(message: pb.GenerateResponse) -> Event:
    """As `convert.event_from_pb`."""
    entries: Sequence[pb.TokenLogprob] = ()
    if (kind := message.WhichOneof("event")) in ("prompt", "delta"):
        entries = getattr(message, kind).logprobs
    if not _large(entries):
        return convert.event_from_pb(message)
    logprobs: list[TokenLogprob] = []
    for part in _slices(entries):
        logprobs.extend(map(convert.logprob_from_pb, part))
        await asyncio.sleep(0)
    return convert.event_from_pb(message, tuple(logprobs))


def _large(entries: Sequence[Any]) -> bool:
    return len(entries) > 1 and len(entries) * (1 + len(entries[-1].top)) > SLICE


def _slices(entries: Sequence[Any]) -> Iterator[Sequence[Any]]:
    size = max(1, SLICE // (1 + len(entries[-1].top)))
    for start in range(0, len(entries), size):
        yield entries[start : start + size]
