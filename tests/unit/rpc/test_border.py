"""The RPC border: messages to domain types and back, errors to statuses and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from fastchat_grpc import core, errors
from fastchat_grpc.rpc import convert
from fastchat_grpc.rpc.status import _subclasses, error_from_rpc, error_to_status
from fastchat_grpc.v1 import generation_pb2 as pb

f32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def bounded(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


sampling = st.builds(
    core.SamplingParams,
    temperature=bounded(0, 100),
    top_p=bounded(0, 1),
    top_k=st.integers(-1, 1000),
    min_p=bounded(0, 1),
    repetition_penalty=bounded(0.125, 4),
    presence_penalty=bounded(-2, 2),
    frequency_penalty=bounded(-2, 2),
    seed=st.none() | st.integers(core.INT64_MIN, core.INT64_MAX),
    logit_bias=st.dictionaries(st.integers(0, 1000), bounded(-100, 100), max_size=3),
)
stopping = st.builds(
    core.StopConditions,
    max_new_tokens=st.integers(10, 10_000),
    min_new_tokens=st.integers(0, 10),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    include_stop=st.booleans(),
)
output = st.builds(
    core.OutputOptions,
    n=st.integers(4, 128),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    echo=st.booleans(),
    stream_interval=st.none() | st.integers(1, 50),
    cumulative_text=st.booleans(),
    keep_special_tokens=st.booleans(),
)
images = st.builds(core.Image, data=st.binary(min_size=1, max_size=4), media_type=st.text(max_size=5)) | st.builds(
    core.Image, url=st.text(min_size=1, max_size=5)
)
messages = st.builds(
    core.ChatMessage,
    role=st.sampled_from(core.CHAT_ROLES),
    content=st.text(max_size=10) | st.lists(st.text(max_size=5) | images, min_size=1, max_size=3).map(tuple),
    name=st.text(max_size=5),
    tool_calls=st.lists(
        st.builds(core.ToolCall, id=st.text(max_size=3), name=st.text(max_size=3), arguments_json=st.just("{}")),
        max_size=2,
    ).map(tuple),
    tool_call_id=st.text(max_size=3),
)
json_objects = st.dictionaries(st.text(max_size=4), st.booleans() | st.text(max_size=4), max_size=3)
tools = st.builds(
    core.Tool,
    name=st.text(max_size=4),
    description=st.text(max_size=4),
    parameters_json=st.just("") | json_objects.map(json.dumps),
)
chats = st.builds(
    core.ChatPrompt,
    messages=st.lists(messages, min_size=1, max_size=3).map(tuple),
    tools=st.lists(tools, max_size=2).map(lambda listed: (core.Tool(name="none"), *listed)),
    tool_choice=st.sampled_from([*core.ToolChoice, "none"]),
    template_arguments_json=st.just("") | json_objects.map(json.dumps),
)
prompts = (
    st.text(min_size=1).map(core.TextPrompt)
    | st.lists(st.integers(0, 2**31 - 1), min_size=1).map(lambda ids: core.TokenPrompt(tuple(ids)))
    | chats
)
resumes = st.none() | st.lists(
    st.builds(
        core.ResumedChoice,
        index=st.integers(0, 3),
        output_token_ids=st.lists(st.integers(0, 99), max_size=3).map(tuple),
        text_length=st.integers(0, 99),
        finished=st.booleans(),
    ),
    max_size=3,
    unique_by=lambda choice: choice.index,
).map(tuple)
grammars = (
    st.none()
    | st.builds(
        core.Grammar, st.sampled_from([k for k in core.GrammarKind if k.value != "json_object"]), st.text(min_size=1)
    )
    | st.just(core.Grammar(core.GrammarKind.JSON_OBJECT))
)
requests = st.builds(
    core.GenerateRequest,
    prompt=prompts,
    model=st.text(max_size=5),
    sampling=sampling,
    stopping=stopping,
    output=output,
    grammar=grammars,
    request_id=st.text(max_size=10),
    priority=st.integers(-5, 5),
    lora_adapter=st.text(max_size=5),
    session_key=st.text(max_size=5),
    truncate_prompt_tokens=st.none() | st.integers(1, 99),
    resume=resumes,
    resume_fingerprint=st.just(""),
)


@given(requests)
def test_a_request_survives_the_wire_whole(request: core.GenerateRequest) -> None:
    wire = convert.generate_request_to_pb(request).SerializeToString()
    assert convert.generate_request_from_pb(pb.GenerateRequest.FromString(wire)) == request


def test_pieces_of_a_resume_that_are_put_behind_a_request_add_up() -> None:
    request = pb.GenerateRequest(prompt="p", output=pb.OutputOptions(n=2)).SerializeToString()
    pieces = [
        pb.Resume(model_fingerprint="f", backend="b", fallback_seed=-7),
        pb.Resume(choices=[pb.ResumedChoice(index=1, output_token_ids=[1, 2], text_length=3)]),
        pb.Resume(choices=[pb.ResumedChoice(index=0, output_token_ids=[9])]),
        pb.Resume(choices=[pb.ResumedChoice(index=1, output_token_ids=[3], text_length=1)]),
        pb.Resume(choices=[pb.ResumedChoice(index=0, finished=True)]),
    ]
    for piece in pieces:
        request += pb.GenerateRequest(resume=piece).SerializeToString()
    domain = convert.generate_request_from_pb(pb.GenerateRequest.FromString(request))
    assert domain.resume == (
        core.ResumedChoice(index=1, output_token_ids=(1, 2, 3), text_length=4),
        core.ResumedChoice(index=0, output_token_ids=(9,), finished=True),
    )
    assert (domain.resume_fingerprint, domain.resume_backend) == ("f", "b")
    assert domain.sampling.fallback_seed == -7


top = st.builds(core.TopLogprob, st.integers(0, 99), st.text(max_size=3), st.binary(max_size=3), f32)
logprobs = st.lists(
    st.builds(
        core.TokenLogprob,
        st.integers(0, 99),
        st.text(max_size=3),
        st.binary(max_size=3),
        st.none() | f32,
        st.lists(top, max_size=2).map(tuple),
    ),
    max_size=2,
).map(tuple)
counts = st.integers(0, 10_000)
usages = st.builds(core.Usage, prompt_tokens=counts, completion_tokens=counts, cached_tokens=counts)
token_ids = st.lists(st.integers(0, 99), max_size=4).map(tuple)
events = (
    st.builds(
        core.Delta,
        index=st.integers(0, 127),
        text=st.text(),
        token_ids=token_ids,
        usage=usages,
        logprobs=logprobs,
        cumulative_text=st.text(),
    )
    | st.builds(
        core.Completion,
        index=st.integers(0, 127),
        finish_reason=st.sampled_from(core.FinishReason),
        usage=usages,
        matched=st.none() | st.text() | st.integers(0, 99),
        origin=st.none()
        | st.builds(core.Origin, model=st.text(min_size=1), worker_id=st.text(), request_id=st.text(max_size=5)),
        timings=st.builds(core.Timings, queued_s=st.just(0.5), time_to_first_token_s=st.just(1.25), total_s=st.just(2)),
    )
    | st.builds(core.PromptEcho, text=st.text(), token_ids=token_ids, logprobs=logprobs)
)


@given(events)
def test_an_event_survives_the_wire_whole(event: core.Event) -> None:
    wire = convert.event_to_pb(event).SerializeToString()
    assert convert.event_from_pb(pb.GenerateResponse.FromString(wire)) == event


def test_an_unset_field_takes_its_default_and_a_zero_stays_a_zero() -> None:
    unset = convert.generate_request_from_pb(pb.GenerateRequest(prompt="x"))
    assert unset.sampling == core.SamplingParams()
    assert unset.stopping.max_new_tokens == 256
    zero = convert.generate_request_from_pb(pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(temperature=0)))
    assert zero.sampling.greedy


USER = pb.ChatMessage(role="user", content="x")
TOOL = pb.Tool(name="f")


def test_a_choice_of_tools_is_no_name_of_a_function() -> None:
    function = pb.Tool(name="none", parameters_json='{"b": 1, "a": 2.0}')
    modes = {pb.TOOL_CHOICE_MODE_NONE: core.ToolChoice.NONE, 0: core.ToolChoice.AUTO}
    for mode, choice in modes.items():
        chat = pb.ChatInput(messages=[USER], tools=[function], tool_choice=pb.ToolChoice(mode=mode))  # type: ignore[arg-type]
        assert convert.chat_from_pb(chat).tool_choice is choice
    named = pb.ChatInput(messages=[USER], tools=[function], tool_choice=pb.ToolChoice(function="none"))
    assert convert.chat_from_pb(named).tool_choice == "none"
    assert convert.chat_to_pb(convert.chat_from_pb(named)) == named
    assert convert.chat_from_pb(pb.ChatInput(messages=[USER])).tool_choice is core.ToolChoice.AUTO


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerateRequest(), "input"),
        (pb.GenerateRequest(prompt=""), "prompt"),
        (pb.GenerateRequest(prompt_token_ids=pb.TokenIds()), "prompt_token_ids"),
        (pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[-1])), "prompt_token_ids.ids[0]"),
        (pb.GenerateRequest(chat=pb.ChatInput()), "chat.messages"),
        (pb.GenerateRequest(chat=pb.ChatInput(messages=[pb.ChatMessage(role="boss")])), "chat.messages[0].role"),
        (
            pb.GenerateRequest(
                chat=pb.ChatInput(messages=[pb.ChatMessage(role="user", content="x", parts=[pb.ContentPart(text="y")])])
            ),
            "chat.messages[0]",
        ),
        *[
            (
                pb.GenerateRequest(chat=pb.ChatInput(messages=[USER], tools=[TOOL, tool])),
                "chat.tools[1].parameters_json",
            )
            for tool in (
                pb.Tool(name="g", parameters_json="{"),
                pb.Tool(name="g", parameters_json="[1]"),
                pb.Tool(name="g", parameters_json='{"minimum": NaN}'),
                pb.Tool(name="g", parameters_json="[" * 100_000),
                pb.Tool(name="g", parameters_json='{"minimum": ' + "9" * 5000 + "}"),
            )
        ],
        (
            pb.GenerateRequest(chat=pb.ChatInput(messages=[USER], template_arguments_json="null")),
            "chat.template_arguments_json",
        ),
        (
            pb.GenerateRequest(
                chat=pb.ChatInput(messages=[USER], tools=[TOOL], tool_choice=pb.ToolChoice(function="none"))
            ),
            "chat.tool_choice.function",
        ),
        (
            pb.GenerateRequest(chat=pb.ChatInput(messages=[USER], tool_choice=pb.ToolChoice(mode=99))),  # type: ignore[arg-type]
            "chat.tool_choice.mode",
        ),
        (pb.GenerateRequest(prompt="x", structured_output=pb.StructuredOutput()), "structured_output"),
        (pb.GenerateRequest(prompt="x", request_id="r" * 129), "request_id"),
        (pb.GenerateRequest(prompt="x", truncate_prompt_tokens=0), "truncate_prompt_tokens"),
        (pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(temperature=-1)), "sampling.temperature"),
        (pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(temperature=float("nan"))), "sampling.temperature"),
        (pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(top_p=1.5)), "sampling.top_p"),
        (pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(top_k=-2)), "sampling.top_k"),
        (pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(min_p=2)), "sampling.min_p"),
        (
            pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(repetition_penalty=0)),
            "sampling.repetition_penalty",
        ),
        (
            pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(repetition_penalty=float("inf"))),
            "sampling.repetition_penalty",
        ),
        (
            pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(repetition_penalty=1e-38)),
            "sampling.repetition_penalty",
        ),
        (pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(presence_penalty=3)), "sampling.presence_penalty"),
        (pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(logit_bias={-1: 1})), "sampling.logit_bias"),
        (pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(logit_bias={1: 101})), "sampling.logit_bias[1]"),
        (pb.GenerateRequest(prompt="x", stopping=pb.StopConditions(max_new_tokens=0)), "stopping.max_new_tokens"),
        (pb.GenerateRequest(prompt="x", stopping=pb.StopConditions(min_new_tokens=300)), "stopping.min_new_tokens"),
        (pb.GenerateRequest(prompt="x", stopping=pb.StopConditions(stop=["a"] * 65)), "stopping.stop"),
        (pb.GenerateRequest(prompt="x", stopping=pb.StopConditions(stop=[""])), "stopping.stop[0]"),
        (pb.GenerateRequest(prompt="x", output=pb.OutputOptions(n=0)), "output.n"),
        (pb.GenerateRequest(prompt="x", output=pb.OutputOptions(n=129)), "output.n"),
        (pb.GenerateRequest(prompt="x", output=pb.OutputOptions(logprobs=21)), "output.logprobs"),
        (pb.GenerateRequest(prompt="x", output=pb.OutputOptions(stream_interval=0)), "output.stream_interval"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_field_is_refused_by_its_path(message: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        convert.generate_request_from_pb(message)
    assert caught.value.field == field


class ReceivedError(grpc.aio.AioRpcError):
    """A status as a client gets it."""

    def __init__(self, error: errors.FastChatError) -> None:
        status = rpc_status.to_status(error_to_status(error))
        super().__init__(
            status.code, grpc.aio.Metadata(), grpc.aio.Metadata(*status.trailing_metadata), details=status.details
        )


def make(cls: type[errors.FastChatError]) -> errors.FastChatError:
    if cls is errors.PromptTooLong:
        return errors.PromptTooLong("input", 10, 5)
    if issubclass(cls, errors.InvalidArgument):
        return cls("some.field", "is wrong")
    return cls("it failed", metadata={"a": "b"}, retry_after_s=1.5)


OWN_CLASSES = [cls for cls in _subclasses(errors.FastChatError) if cls.__module__ == "fastchat_grpc.errors"]


@pytest.mark.parametrize("cls", OWN_CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_survives_the_wire(cls: type[errors.FastChatError]) -> None:
    sent = make(cls)
    received = error_from_rpc(ReceivedError(sent))
    assert type(received) is cls
    assert received.message == sent.message
    assert received.metadata == sent.metadata
    assert received.retry_after_s == sent.retry_after_s
    if isinstance(sent, errors.InvalidArgument):
        assert isinstance(received, errors.InvalidArgument)
        assert received.field == sent.field


def test_every_error_has_a_reason_of_its_own() -> None:
    reasons = [cls.reason for cls in OWN_CLASSES]
    assert len(set(reasons)) == len(reasons)


def test_a_bad_field_is_named_in_the_details() -> None:
    status = error_to_status(errors.InvalidArgument("sampling.top_p", "must be from 0 to 1, got 2"))
    found: dict[str, Any] = {}
    for detail in status.details:
        for cls in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest):
            message = cls()
            if detail.Unpack(message):
                found[cls.__name__] = message
    assert found["ErrorInfo"].domain == "fastchat_grpc"
    assert found["BadRequest"].field_violations[0].field == "sampling.top_p"


def test_a_status_of_grpc_itself_becomes_an_error_of_its_code() -> None:
    received = grpc.aio.AioRpcError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), grpc.aio.Metadata(), details="message too large"
    )
    error = error_from_rpc(received)
    assert error.code is errors.Code.RESOURCE_EXHAUSTED
    assert not isinstance(error, errors.QueueFull), "it must not look like a full queue, which is retried elsewhere"
    assert error.message == "message too large"


def test_domain_types_are_immutable() -> None:
    request = core.GenerateRequest(prompt=core.TextPrompt("x"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.model = "other"  # type: ignore[misc]
