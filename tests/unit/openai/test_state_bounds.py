"""Which replies hand out their state, what is in it, and what is made of state that is none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.any_pb2 import Any as Entry

from fastchat_grpc.core import Capability, Event, GenerateRequest
from fastchat_grpc.errors import BackendFailed, Draining, FastChatError, InvalidArgument, ModelDiffers, UnsupportedField
from fastchat_grpc.openai.servicer import OpenAIServicer
from fastchat_grpc.openai.state import TYPE
from fastchat_grpc.rpc import pieces
from fastchat_grpc.v1 import generation_pb2, openai_pb2
from tests.conftest import echo_config
from tests.unit.openai.carried import open_worker
from tests.unit.openai.fakes import MODEL, FakeContext, FakePort, body, chat

FULLY = frozenset({Capability.RESUME, Capability.SEEDED_RESUME, Capability.STATEFUL_RESUME})
ABLE = replace(MODEL, capabilities=MODEL.capabilities | FULLY, fingerprint="f", backend="b")


def port(**values: Any) -> FakePort:
    return FakePort(**{"models": (ABLE,), **values})


def begun(*pieces_: openai_pb2.ReplyPiece, resume: Any = None) -> list[Entry]:
    """Entries of a reply's state, with its start."""
    start = openai_pb2.ReplyPiece(start=openai_pb2.ReplyStart(id="chatcmpl-1", created=5, resume=resume))
    return [Entry(type_url=TYPE, value=piece.SerializeToString()) for piece in (start, *pieces_)]


def told(index: int = 0, text: str = "", **values: Any) -> openai_pb2.ReplyPiece:
    delta = generation_pb2.Delta(index=index, text=text, token_ids=[1])
    return openai_pb2.ReplyPiece(event=generation_pb2.GenerateResponse(delta=delta), **values)


async def ask(
    port: Any, *, asked: bool = True, worker: bool = True, entries: Any = (), ping_s: float = 0.0, **values: Any
) -> list[HttpBody]:
    """The bodies of a chat completion."""
    request = body(**chat(**{"stream": True, **values}))
    request.extensions.extend(entries)
    servicer = OpenAIServicer(port, worker_id=(lambda: "w") if worker else None, ping_s=ping_s)
    context = FakeContext(**{"x_fastchat_resume": "1"} if asked else {})
    bodies = []
    try:
        async for item in servicer.ChatCompletions(request, context):
            bodies.append(item)
    except FastChatError as error:
        error.bodies = bodies  # type: ignore[attr-defined]
        raise
    return bodies


def read(bodies: list[HttpBody]) -> list[openai_pb2.ReplyPiece]:
    return [openai_pb2.ReplyPiece.FromString(entry.value) for item in bodies for entry in item.extensions]


@pytest.mark.parametrize(
    ("can", "values"),
    [
        (FULLY, {}),
        ({Capability.RESUME}, {}),
        ({Capability.RESUME}, {"seed": 1, "temperature": 0}),
        ({Capability.RESUME, Capability.SEEDED_RESUME}, {"seed": 1}),
        ({Capability.RESUME, Capability.STATEFUL_RESUME}, {"presence_penalty": 1}),
    ],
)
async def test_every_body_of_a_reply_that_can_go_on_has_its_piece(can: set[Capability], values: dict[str, Any]) -> None:
    model = replace(ABLE, capabilities=MODEL.capabilities | can)
    bodies = await ask(port(models=(model,)), **values)
    assert [len(item.extensions) for item in bodies] == [1] * len(bodies)
    assert [piece.HasField("start") for piece in read(bodies)] == [True] + [False] * (len(bodies) - 1)
    assert [piece.complete for piece in read(bodies)] == [False] * (len(bodies) - 1) + [True]


@pytest.mark.parametrize(
    ("can", "values"),
    [
        (set(), {}),
        ({Capability.RESUME}, {"seed": 1}),
        ({Capability.RESUME}, {"frequency_penalty": 1}),
        ({Capability.RESUME, Capability.SEEDED_RESUME}, {"response_format": {"type": "json_object"}}),
    ],
)
async def test_a_reply_that_could_not_go_on_says_so_at_once(can: set[Capability], values: dict[str, Any]) -> None:
    model = replace(ABLE, capabilities=MODEL.capabilities | can)
    for stream in (True, False):
        bodies = await ask(port(models=(model,)), stream=stream, **values)
        assert [entry.value for item in bodies for entry in item.extensions] == [b""]
        assert bodies[0].extensions


async def test_who_is_not_asked_or_is_no_worker_tells_no_state() -> None:
    for values in ({"asked": False}, {"worker": False}):
        for stream in (True, False):
            assert not any(item.extensions for item in await ask(port(), stream=stream, **values))


async def test_a_worker_that_could_go_on_from_its_start_alone_does_not_tell_more_of_it() -> None:
    """Or the next one would go on from a state that is not that of the reply any more."""
    unable = replace(ABLE, capabilities=MODEL.capabilities)
    bodies = await ask(port(models=(unable,)), entries=begun())
    assert [entry.value for entry in bodies[0].extensions] == [b""]


async def test_a_token_costs_few_bytes_of_state_even_with_log_probabilities_that_have_been_told() -> None:
    pieces_ = ["word "] * 50
    for values, most in (({}, 25), ({"logprobs": True, "top_logprobs": 2}, 40)):
        sizes = [len(piece.SerializeToString()) for piece in read(await ask(port(pieces=pieces_), **values))]
        assert max(sizes[2:-3]) <= most


async def test_a_failure_that_another_worker_may_mend_ends_a_reply_with_its_status_alone() -> None:
    with pytest.raises(Draining) as told_of:
        await ask(port(error=Draining("no time left"), fail_after=1))
    assert not any(b"error" in item.data for item in told_of.value.bodies)  # type: ignore[attr-defined]
    for values in ({"asked": False}, {"models": (MODEL,)}):
        with pytest.raises(Draining) as told_of:
            models = values.pop("models", (ABLE,))
            await ask(port(error=Draining("no time left"), fail_after=1, models=models), **values)
        assert b"error" in told_of.value.bodies[-1].data  # type: ignore[attr-defined]


async def test_after_any_other_failure_nobody_goes_on() -> None:
    with pytest.raises(BackendFailed) as told_of:
        await ask(port(error=BackendFailed("broken"), fail_after=1))
    last = told_of.value.bodies[-1]  # type: ignore[attr-defined]
    assert b"error" in last.data
    assert [entry.value for entry in last.extensions] == [b""]


async def test_a_worker_that_cannot_go_on_with_anothers_reply_says_so_with_a_status() -> None:
    with pytest.raises(UnsupportedField) as told_of:
        await ask(port(error=UnsupportedField("resume", "no"), fail_after=0), entries=begun(told(text="a")))
    assert told_of.value.bodies == []  # type: ignore[attr-defined]
    async with open_worker(echo_config().backend) as servicer:
        request = body(messages=[{"role": "user", "content": "x"}], stream=True)
        request.extensions.extend(begun(told(text="x"), resume=generation_pb2.Resume(model_fingerprint="other")))
        with pytest.raises(ModelDiffers):
            [_ async for _ in servicer.ChatCompletions(request, FakeContext())]


async def test_state_that_would_not_fit_a_message_says_once_that_nobody_can_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "MAX_MESSAGE_BYTES", 700)
    for stream in (True, False):
        bodies = await ask(port(pieces=["word "] * 50), stream=stream)
        values = [entry.value for item in bodies for entry in item.extensions]
        assert values.index(b"") == len(values) - 1 > 2


async def test_a_sign_of_life_before_the_first_event_begins_the_state() -> None:
    class Slow(FakePort):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
            await asyncio.sleep(0.05)
            async for event in super().generate(request):
                yield event

    bodies = await ask(Slow(models=(ABLE,)), ping_s=0.02)
    first = read(bodies)[0]
    assert bodies[0].data == b": ping\n\n"
    assert first.start.id
    assert not first.HasField("event")
    rest = await ask(port(), entries=list(bodies[0].extensions))
    assert json.loads(rest[0].data.removeprefix(b"data: ").split(b"\n\n")[0])["id"] == first.start.id
    with pytest.raises(BackendFailed) as told_of:  # the caller's answer has begun, whatever this worker knows of it
        await ask(port(error=BackendFailed("broken"), fail_after=0), entries=list(bodies[0].extensions))
    assert b"error" in told_of.value.bodies[-1].data  # type: ignore[attr-defined]


async def test_what_is_complete_is_not_said_again() -> None:
    first = port()
    bodies = await ask(first)
    asked = port()
    assert await ask(asked, entries=[entry for item in bodies for entry in item.extensions]) == []
    assert not asked.requests


async def test_the_seed_that_was_drawn_and_who_drew_it_go_along() -> None:
    first = port()
    resume = read(await ask(first))[0].start.resume
    assert (resume.model_fingerprint, resume.backend) == ("f", "b")
    second = port()
    await ask(second, entries=begun(told(text="a"), resume=resume))
    asked = second.requests[0]
    assert asked.sampling.fallback_seed == first.requests[0].sampling.fallback_seed is not None
    assert (asked.resume_fingerprint, asked.resume_backend) == ("f", "b")
    for values in ({"seed": 3}, {"temperature": 0}):
        assert not read(await ask(port(), **values))[0].start.resume.HasField("fallback_seed")


async def test_equal_prompts_of_one_request_are_drawn_apart() -> None:
    fake = port()
    request = body(model="m", prompt=["x", "x"], stream=True)
    context = FakeContext(x_fastchat_resume="1")
    assert [item async for item in OpenAIServicer(fake, worker_id=lambda: "w").Completions(request, context)]
    seeds = {asked.sampling.fallback_seed for asked in fake.requests}
    assert len(seeds) == 2
    assert None not in seeds


async def test_what_was_cached_where_a_reply_began_counts() -> None:
    usage = generation_pb2.Usage(prompt_token_count=5, cached_token_count=1)
    delta = generation_pb2.Delta(text="a", token_ids=[1], usage=usage)
    piece = openai_pb2.ReplyPiece(event=generation_pb2.GenerateResponse(delta=delta))
    bodies = await ask(port(), entries=begun(piece), stream_options={"include_usage": True})
    assert b'"cached_tokens":1}' in bodies[-1].data


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ([Entry(type_url=TYPE, value=b"\xff")], r"extensions\[0\]: is no piece"),
        ([Entry(type_url=TYPE)], r"extensions\[0\]: is empty"),
        (begun(told())[1:], "extensions: do not begin with the start"),
        (begun(told(index=1)), r"extensions\[1\]: is of choice 1, and there are 1"),
        (begun(told(index=-1)), r"extensions\[1\]: is of choice -1"),
        (begun(told(prompt_index=1)), r"extensions\[1\]: is of prompt 1, and there are 1"),
        (begun(openai_pb2.ReplyPiece(event=generation_pb2.GenerateResponse())), r"extensions\[1\]: has an event"),
        (
            begun(openai_pb2.ReplyPiece(event=generation_pb2.GenerateResponse(completion=generation_pb2.Completion()))),
            r"extensions\[1\]: is the end of a choice that was broken off",
        ),
        (
            [Entry(type_url=TYPE, value=openai_pb2.ReplyPiece(start={"id": "x" * 129}).SerializeToString())],
            "extensions: do not begin",
        ),
    ],
)
async def test_what_is_no_state_of_the_reply_is_refused_by_its_place(entries: list[Entry], fault: str) -> None:
    asked = port()
    with pytest.raises(InvalidArgument, match=fault):
        await ask(asked, entries=entries)
    assert not asked.requests


async def test_extensions_of_somebody_else_are_left_alone() -> None:
    asked = port()
    assert await ask(asked, entries=[Entry(type_url="type.googleapis.com/other", value=b"\xff")])
    assert asked.requests[0].resume is None


async def test_more_pieces_than_are_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastchat_grpc.openai.state.MAX_PIECES", 3)
    with pytest.raises(InvalidArgument, match="at most 3 entries, got 5"):
        await ask(port(), entries=begun(*[told()] * 4))
