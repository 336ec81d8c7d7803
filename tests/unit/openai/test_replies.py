"""From a generation's events to OpenAI's replies, whole and streamed."""

from __future__ import annotations

import base64
import json
import re
import struct
from dataclasses import replace
from typing import Any

import pytest
from google.api.httpbody_pb2 import HttpBody
from openai.types import Completion as SdkCompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fastchat_grpc.core import FinishReason
from fastchat_grpc.errors import (
    BackendFailed,
    InvalidArgument,
    ModelNotFound,
    PromptTooLong,
    QueueFull,
    UnsupportedField,
)
from fastchat_grpc.openai.servicer import OpenAIServicer
from fastchat_grpc.v1 import openai_pb2 as pb
from tests.unit.openai.fakes import (
    MODEL,
    FakeContext,
    FakePort,
    ask_chat,
    ask_text,
    body,
    chat,
    events,
    stream_chat,
    stream_text,
)

USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 2,
    "total_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 3},
}


async def test_a_chat_streams_role_then_content_then_finish_then_done() -> None:
    chunks = await stream_chat(FakePort())
    deltas = [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks[:-1]]
    assert deltas == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Hel"}, None),
        ({"content": "lo"}, None),
        ({}, "stop"),
    ]
    assert chunks[-1] == "[DONE]"
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    assert all("usage" not in chunk for chunk in chunks[:-1])
    for chunk in chunks[:-1]:
        ChatCompletionChunk.model_validate(chunk, strict=True)


async def test_usage_comes_in_a_chunk_of_its_own_where_asked_for() -> None:
    chunks = await stream_chat(FakePort(), stream_options={"include_usage": True})
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"] == USAGE
    assert all(chunk["usage"] is None for chunk in chunks[:-2])


async def test_usage_can_come_with_every_chunk() -> None:
    chunks = await stream_chat(FakePort(), stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk != "[DONE]"]
    assert counts == sorted(counts)
    assert counts[-1] == 2


async def test_an_answer_that_a_filter_cut_short_says_so() -> None:
    port = FakePort(finish=FinishReason.CONTENT_FILTER)
    whole, text = await ask_chat(port), await ask_text(port)
    ChatCompletion.model_validate(whole, strict=True)
    SdkCompletion.model_validate(text, strict=True)
    streamed = (await stream_chat(port))[-2]
    ChatCompletionChunk.model_validate(streamed, strict=True)
    found = [reply["choices"][0]["finish_reason"] for reply in (whole, text, streamed)]
    assert found == ["content_filter"] * 3


async def test_a_whole_chat_has_message_finish_and_usage() -> None:
    reply = await ask_chat(FakePort(finish=FinishReason.LENGTH))
    ChatCompletion.model_validate(reply, strict=True)
    choice = reply["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert choice["finish_reason"] == "length"
    assert reply["usage"] == USAGE
    assert reply["model"] == "m"


async def test_every_choice_is_answered_and_counted() -> None:
    reply = await ask_chat(FakePort(), n=3)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in reply["choices"]} == {"Hello"}
    assert reply["usage"]["prompt_tokens"] == 5
    assert reply["usage"]["completion_tokens"] == 6
    chunks = await stream_chat(FakePort(), n=2)
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == "Hello"
        assert own[-1]["finish_reason"] == "stop"


async def test_an_empty_output_still_has_role_and_finish() -> None:
    chunks = await stream_chat(FakePort(pieces=()))
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[1]["choices"][0]["finish_reason"] == "stop"
    assert (await ask_chat(FakePort(pieces=())))["choices"][0]["message"]["content"] == ""


async def test_the_text_of_chunks_is_escaped_as_json_wants() -> None:
    text = 'a"b\\c\nd\u2028é😀\x00'
    chunks = await stream_chat(FakePort(pieces=(text,)))
    assert chunks[1]["choices"][0]["delta"]["content"] == text


async def test_chat_logprobs_name_tokens_bytes_and_alternatives() -> None:
    reply = await ask_chat(FakePort(), logprobs=True, top_logprobs=2)
    ChatCompletion.model_validate(reply, strict=True)
    first = reply["choices"][0]["logprobs"]["content"][0]
    assert first["token"] == "Hel"
    assert first["bytes"] == list(b"Hel")
    assert first["logprob"] == -0.5
    assert [top["token"] for top in first["top_logprobs"]] == ["Hel", "other"]
    assert first["top_logprobs"][1]["logprob"] == -9999.0
    chunks = await stream_chat(FakePort(), logprobs=True)
    tokens = [
        entry["token"] for chunk in chunks[:-1] for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", [])
    ]
    assert tokens == ["Hel", "lo"]


async def test_logprobs_of_text_that_is_held_back_are_not_lost() -> None:
    chunks = await stream_chat(FakePort(pieces=("<tool", "_box>")), logprobs=True, tools=[TOOL])
    tokens = [
        entry["token"] for chunk in chunks[:-1] for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", [])
    ]
    assert tokens == ["<tool", "_box>"]


async def test_text_logprobs_are_parallel_lists_with_offsets() -> None:
    SdkCompletion.model_validate(await ask_text(FakePort(), logprobs=2), strict=True)
    reply = await ask_text(FakePort(), logprobs=2, echo=True)
    choice = reply["choices"][0]
    assert choice["text"] == "Say: Hello"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["Say: ", "Hel", "lo"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {"Hel": -0.5, "other": -9999.0}
    assert logprobs["text_offset"] == [0, 5, 8]


async def test_a_streamed_text_joins_to_the_whole_one() -> None:
    chunks = await stream_text(FakePort(), echo=True, logprobs=0, stream_options={"include_usage": True})
    texts = [chunk["choices"][0]["text"] for chunk in chunks[:-2]]
    offsets = [o for chunk in chunks[:-2] for o in (chunk["choices"][0]["logprobs"] or {}).get("text_offset", [])]
    assert "".join(texts) == "Say: Hello"
    assert offsets == [0, 5, 8]
    assert chunks[-3]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["usage"] == USAGE


async def test_several_prompts_are_answered_in_order_with_joint_usage() -> None:
    reply = await ask_text(FakePort(), prompt=["a", "b", "c"], n=2)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3, 4, 5]
    assert reply["usage"]["prompt_tokens"] == 15
    assert reply["usage"]["completion_tokens"] == 12
    chunks = await stream_text(FakePort(), prompt=["a", "b"])
    for index in (0, 1):
        texts = [c["choices"][0]["text"] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert "".join(texts) == "Hello"


async def test_scoring_a_prompt_returns_its_logprobs_alone() -> None:
    reply = await ask_text(FakePort(), max_tokens=0, echo=True, logprobs=1)
    assert reply["choices"][0]["text"] == "Say: "
    assert reply["choices"][0]["logprobs"]["tokens"] == ["Say: "]
    assert reply["usage"]["completion_tokens"] == 0


async def test_the_model_is_told_by_its_fingerprint_where_it_is_known() -> None:
    known = FakePort(models=[replace(MODEL, fingerprint="abc")])
    for ask in (ask_chat, ask_text):
        assert (await ask(known))["system_fingerprint"] == "abc"
        assert (await ask(FakePort()))["system_fingerprint"] is None
    for stream in (stream_chat, stream_text):
        assert {chunk["system_fingerprint"] for chunk in (await stream(known))[:-1]} == {"abc"}


async def test_the_stop_that_matched_is_told() -> None:
    assert (await ask_chat(FakePort(matched="END")))["choices"][0]["stop_reason"] == "END"
    assert (await stream_chat(FakePort(matched=42)))[-2]["choices"][0]["stop_reason"] == 42


async def test_echo_of_a_chat_begins_with_the_assistants_last_message() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    settings: dict[str, Any] = {"messages": messages, "continue_final_message": True, "echo": True}
    assert (await ask_chat(FakePort(), **settings))["choices"][0]["message"]["content"] == "Well, Hello"
    chunks = await stream_chat(FakePort(), **settings)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "Well, Hello"


# ------------------------------------------------------------------------------------- tools

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


async def test_a_call_in_the_output_becomes_a_tool_call() -> None:
    reply = await ask_chat(FakePort(pieces=("Let me look. ", CALL)), tools=[TOOL])
    ChatCompletion.model_validate(reply, strict=True)
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look."
    call = choice["message"]["tool_calls"][0]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert re.fullmatch("[a-zA-Z0-9]{9}", call["id"])  # what the templates of Mistral's models ask for


async def test_a_call_streams_its_name_first_and_its_arguments_in_pieces() -> None:
    chunks = await stream_chat(FakePort(pieces=tuple(CALL)), tools=[TOOL])
    for chunk in chunks[:-1]:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    calls = [c["choices"][0]["delta"]["tool_calls"][0] for c in chunks[:-1] if "tool_calls" in c["choices"][0]["delta"]]
    assert calls[0]["function"] == {"name": "weather", "arguments": ""}
    assert len(calls) > 5
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"city": "Oslo"}
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert not any(c["choices"][0]["delta"].get("content") for c in chunks[:-1])


async def test_a_named_call_is_the_whole_output() -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    reply = await ask_chat(FakePort(pieces=('{"city":', '"Oslo"}')), tools=[TOOL], tool_choice=choice)
    message = reply["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Oslo"}'}
    assert reply["choices"][0]["finish_reason"] == "stop"


LISTED = '[{"name": "weather", "parameters": {"city": "Oslo"}}]'


@pytest.mark.parametrize("length", range(len(LISTED)))
async def test_a_required_call_that_is_cut_shows_nothing_of_its_json_as_content(length: int) -> None:
    pieces = tuple(LISTED[:length])
    cut: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 12}
    reply = await ask_chat(FakePort(pieces=pieces, finish=FinishReason.LENGTH), **cut)
    ChatCompletion.model_validate(reply, strict=True)
    choice = reply["choices"][0]
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "length"
    assert ("tool_calls" in choice["message"]) is (length >= len('[{"name": "weather"'))
    for call in choice["message"].get("tool_calls", ()):
        assert '{"city": "Oslo"}'.startswith(call["function"]["arguments"])
    chunks = await stream_chat(FakePort(pieces=pieces, finish=FinishReason.LENGTH), **cut)
    assert not any(chunk["choices"][0]["delta"].get("content") for chunk in chunks[:-1])
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("arguments", ['""', "null", '" "', "{}"])
async def test_a_call_without_arguments_has_an_empty_object(arguments: str) -> None:
    text = f'<tool_call>{{"name": "weather", "arguments": {arguments}}}</tool_call>'
    (call,) = (await ask_chat(FakePort(pieces=tuple(text)), tools=[TOOL]))["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {}


async def test_text_is_left_alone_where_no_tools_are_given() -> None:
    assert (await ask_chat(FakePort(pieces=(CALL,))))["choices"][0]["message"]["content"] == CALL


# ------------------------------------------------------------------------------------ errors


async def test_a_failure_before_the_first_event_is_raised_with_the_callers_field() -> None:
    port = FakePort(pieces=(), error=InvalidArgument("sampling.top_k", "must not exceed the vocabulary"))
    with pytest.raises(InvalidArgument) as caught:
        await stream_chat(port)
    assert caught.value.field == "top_k"
    assert port.closed == 1


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        ("chat.messages[1].parts[0].image", "messages[1].content[0].image"),
        ("stopping.max_new_tokens", "max_completion_tokens"),
        ("structured_output.json_schema", "response_format"),
        ("chat.template_arguments_json", "chat_template_kwargs"),
        ("prompt", "messages"),
        ("output.n", "n"),
        ("model", "model"),
    ],
)
async def test_errors_of_a_backend_name_the_field_of_the_openai_schema(field: str, shown: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await ask_chat(FakePort(pieces=(), error=InvalidArgument(field, "is wrong")))
    assert caught.value.field == shown


@pytest.mark.parametrize("written", ["max_tokens", "max_completion_tokens"])
async def test_errors_name_other_fields_as_the_caller_wrote_them(written: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await ask_chat(FakePort(), min_tokens=6, **{written: 5})
    assert caught.value.message == f"min_tokens: must be from 0 to {written} (5), got 6"


async def test_errors_of_a_backend_name_other_fields_of_the_openai_schema() -> None:
    refusal = UnsupportedField("stopping.ignore_eos", "cannot be combined with structured_output, which must end")
    asked = {"response_format": {"type": "json_object"}, "ignore_eos": True}
    with pytest.raises(UnsupportedField) as caught:
        await ask_chat(FakePort(pieces=(), error=refusal), **asked)
    assert caught.value.message == "ignore_eos: cannot be combined with response_format, which must end"
    with pytest.raises(PromptTooLong) as too_long:
        await ask_chat(FakePort(pieces=(), error=PromptTooLong("prompt", 200, 100)))
    assert too_long.value.message.startswith("messages: the prompt has 200 tokens, but")


async def test_the_failing_prompt_of_several_is_named() -> None:
    with pytest.raises(PromptTooLong) as caught:
        await ask_text(FakePort(pieces=(), error=PromptTooLong("prompt", 200, 100)), prompt=["a", "b"])
    assert caught.value.field in ("prompt[0]", "prompt[1]")
    assert caught.value.metadata["context_length"] == "100"


async def test_a_failure_midway_is_told_in_the_stream_and_in_the_status() -> None:
    port = FakePort(error=BackendFailed("the engine stopped"), fail_after=1)
    sent: list[bytes] = []

    async def collect() -> None:
        async for item in OpenAIServicer(port).ChatCompletions(body(**chat(stream=True)), FakeContext()):
            sent.append(item.data)

    with pytest.raises(BackendFailed):
        await collect()
    found = events(b"".join(sent))
    assert found[-2] == {
        "error": {
            "message": "the engine stopped",
            "type": "server_error",
            "param": None,
            "code": "backend_failed",
        }
    }
    assert found[-1] == "[DONE]"


@pytest.mark.parametrize("ask", [ask_chat, ask_text])
async def test_an_answer_that_broke_off_is_an_error_and_no_odd_finish_reason(ask: Any) -> None:
    with pytest.raises(BackendFailed):
        await ask(FakePort(finish=FinishReason.ABORT))


async def test_a_stream_that_broke_off_ends_with_an_error() -> None:
    sent: list[bytes] = []

    async def collect() -> None:
        port = FakePort(finish=FinishReason.ABORT)
        async for item in OpenAIServicer(port).ChatCompletions(body(**chat(stream=True)), FakeContext()):
            sent.append(item.data)

    with pytest.raises(BackendFailed):
        await collect()
    found = events(b"".join(sent))
    assert found[-2]["error"]["type"] == "server_error"
    assert b"abort" not in b"".join(sent)


async def test_an_unexpected_failure_midway_does_not_show_its_message() -> None:
    port = FakePort(error=ValueError("secret prompt"), fail_after=1)
    sent: list[bytes] = []

    async def collect() -> None:
        async for item in OpenAIServicer(port).ChatCompletions(body(**chat(stream=True)), FakeContext()):
            sent.append(item.data)

    with pytest.raises(BackendFailed):
        await collect()
    assert b"secret" not in b"".join(sent)
    assert b"internal error" in b"".join(sent)


async def test_a_failing_prompt_ends_its_siblings() -> None:
    port = FakePort(error=QueueFull("full", retry_after_s=1.0), fail_after=1)
    with pytest.raises(QueueFull):
        await ask_text(port, prompt=["a", "b", "c"])
    assert port.closed == 3


async def test_closing_the_stream_closes_the_generation() -> None:
    port = FakePort(pieces=("x",) * 100)
    replies = OpenAIServicer(port).ChatCompletions(body(**chat(stream=True)), FakeContext())
    await anext(replies)
    await replies.aclose()
    assert port.closed == 1


async def test_closing_a_stream_of_several_prompts_closes_all_generations() -> None:
    port = FakePort(pieces=("x",) * 1000)
    request = body(model="m", prompt=["a", "b"], stream=True)
    replies = OpenAIServicer(port).Completions(request, FakeContext())
    for _ in range(6):
        await anext(replies)
    await replies.aclose()
    assert port.closed == 2


async def test_the_request_id_of_the_caller_reaches_the_engine() -> None:
    port = FakePort()
    replies = OpenAIServicer(port).ChatCompletions(body(**chat()), FakeContext(x_request_id="abc"))
    async for _ in replies:
        pass
    assert port.requests[0].request_id == "abc"


# ----------------------------------------------------------------------- the smaller methods


async def test_embeddings_come_as_numbers_or_as_base64() -> None:
    servicer = OpenAIServicer(FakePort())
    plain = json.loads((await servicer.Embeddings(body(model="m", input=["a", "b"]), FakeContext())).data)
    assert [item["embedding"] for item in plain["data"]] == [[0.5, -0.25, 0.0, 1.0]] * 2
    assert plain["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    coded = await servicer.Embeddings(body(model="m", input=[1, 2], encoding_format="base64"), FakeContext())
    vector = base64.b64decode(json.loads(coded.data)["data"][0]["embedding"])
    assert struct.unpack("<4f", vector) == (0.5, -0.25, 0.0, 1.0)


async def test_embedding_errors_name_the_callers_field() -> None:
    servicer = OpenAIServicer(FakePort(error=InvalidArgument("inputs[1]", "is too long")))
    with pytest.raises(InvalidArgument) as caught:
        await servicer.Embeddings(body(model="m", input=["a", "b"]), FakeContext())
    assert caught.value.field == "input[1]"


async def test_models_are_listed_with_their_context_length() -> None:
    servicer = OpenAIServicer(FakePort())
    listed = json.loads((await servicer.ListModels(pb.ListOpenAIModelsRequest(), FakeContext())).data)
    assert listed["object"] == "list"
    assert [(model["id"], model["max_model_len"]) for model in listed["data"]] == [("m", 100)]
    one = json.loads((await servicer.GetModel(pb.GetOpenAIModelRequest(model="m"), FakeContext())).data)
    assert one == listed["data"][0]
    with pytest.raises(ModelNotFound):
        await servicer.GetModel(pb.GetOpenAIModelRequest(model="x"), FakeContext())


async def test_tokens_are_counted_as_vllm_and_fastchat_do() -> None:
    servicer = OpenAIServicer(FakePort())

    async def ask(method: Any, **values: Any) -> Any:
        reply: HttpBody = await method(body(**values), FakeContext())
        return json.loads(reply.data)

    counted = {"count": 3, "max_model_len": 100, "tokens": [0, 1, 2], "token_strs": None}
    assert await ask(servicer.Tokenize, model="m", prompt="abc") == counted
    assert await ask(servicer.Tokenize, **chat()) == counted
    assert await ask(servicer.Detokenize, model="m", tokens=[5, 6]) == {"prompt": "5-6"}
    prompts = [{"model": "m", "prompt": "abc", "max_tokens": 97}, {"model": "m", "prompt": "abc", "max_tokens": 98}]
    assert await ask(servicer.TokenCheck, prompts=prompts) == {
        "prompts": [
            {"fits": True, "tokenCount": 3, "contextLength": 100},
            {"fits": False, "tokenCount": 3, "contextLength": 100},
        ]
    }
