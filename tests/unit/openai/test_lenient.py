"""What clients, agents and gateways add or send back: taken where it changes nothing, told where it is unknown."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.core import GrammarKind, ModelInfo, UnsetInt
from fastchat_grpc.errors import InvalidArgument, PromptTooLong, QueueFull, UnsupportedField
from fastchat_grpc.openai.chat_request import parse_chat
from fastchat_grpc.openai.completion_request import parse_completion
from fastchat_grpc.openai.embeddings import parse_embeddings
from fastchat_grpc.openai.servicer import OpenAIServicer
from fastchat_grpc.rpc import convert
from fastchat_grpc.v1 import generation_pb2 as pb
from tests.unit.openai.fakes import MODEL, FakeContext, FakePort, ask_text, body, chat

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
HEADER = "x-fastchat-grpc-ignored"


def one_chat(**values: Any) -> Any:
    return parse_chat(chat(**values), [MODEL]).generations[0]


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None},
        {"content": None, "tool_calls": []},
        {},
        {"content": None, "refusal": None, "reasoning_content": "thoughts"},
        {"content": ""},
        {"content": []},
        {"content": None, "tool_calls": None, "function_call": None, "audio": None},
    ],
    ids=str,
)
def test_an_assistants_turn_may_be_empty(turn: dict[str, Any]) -> None:
    asked = {"role": "user", "content": "a"}
    messages = one_chat(messages=[asked, {"role": "assistant", **turn}, asked]).prompt.messages
    assert [message.content for message in messages] == ["a", "", "a"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_what_an_assistant_thought_is_kept_for_the_template(name: str) -> None:
    turns = [{"role": "assistant", "content": None, name: "thoughts"}, {"role": "user", "content": "x", name: "y"}]
    request = one_chat(messages=turns)
    assert [message.reasoning for message in request.prompt.messages] == ["thoughts", ""]
    message = convert.generate_request_to_pb(request).SerializeToString()
    assert convert.generate_request_from_pb(pb.GenerateRequest.FromString(message)) == request
    with pytest.raises(InvalidArgument, match=name):
        one_chat(messages=[{"role": "assistant", name: 5}])


@pytest.mark.parametrize(
    ("thoughts", "kept"),
    [
        ({"type": "thinking", "thinking": "hm", "signature": "s"}, "hm"),
        ({"type": "thinking", "thinking": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "a\nb"),
        ({"type": "redacted_thinking", "data": "x"}, ""),
    ],
    ids=str,
)
def test_thoughts_may_come_back_as_parts(thoughts: dict[str, Any], kept: str) -> None:
    asked = {"role": "user", "content": [{"type": "input_text", "text": "q"}]}
    turn = {"role": "assistant", "content": [thoughts, {"type": "output_text", "text": "said"}]}
    messages = one_chat(messages=[asked, turn]).prompt.messages
    assert [(message.content, message.reasoning) for message in messages] == [("q", ""), ("said", kept)]
    with pytest.raises(InvalidArgument) as caught:  # nobody else thinks aloud
        one_chat(messages=[{"role": "user", "content": [thoughts]}])
    assert caught.value.field == "messages[0].content[0].type"


def test_a_tool_may_have_nothing_to_say() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    told = {"role": "tool", "tool_call_id": "c", "content": None}
    messages = one_chat(messages=[{"role": "assistant", "tool_calls": [call]}, told]).prompt.messages
    assert messages[1].content == ""


MEMBERS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi", "id": "m1"}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}
        ]
    },
    {"tools": [], "tool_choice": "auto"},
    {"tools": [], "tool_choice": "none"},
    {"tools": None, "tool_choice": "none"},
    {"tool_choice": "none"},
    {"tools": [], "parallel_tool_calls": True},
    {"stop": ""},
    {"stop": [""]},
    {"stop": []},
    {"max_tokens": -1},
    {"max_completion_tokens": -1, "max_tokens": 5},
    {"functions": [], "function_call": "auto"},
    {"verbosity": "medium"},
    {"repeat_penalty": 1.0},
    {"options": {}},
    {"prediction": {"type": "content", "content": "x"}},
    {"stream_options": None, "extra_headers": None},
]


@pytest.mark.parametrize("values", MEMBERS, ids=lambda values: json.dumps(values)[:60])
def test_members_that_change_nothing_change_nothing(values: dict[str, Any]) -> None:
    call = parse_chat({**chat(), **values}, [MODEL], strict=True)
    assert call.generations[0] == one_chat()


def test_members_of_other_servers_in_a_reply_can_be_sent_back() -> None:
    function = {"name": "weather", "arguments": "{}", "strict": None}
    call = {"id": "c", "type": "function", "function": function, "index": 0, "provider_specific_fields": {}}
    turn = {
        "role": "assistant",
        "content": "x",
        "tool_calls": [call],
        "provider_specific_fields": {"refusal": None},
        "reasoning_details": [],
        "thinking_blocks": [],
        "annotations": [],
    }
    tool = {**TOOL, "cache_control": {"type": "ephemeral"}}
    parsed = parse_chat(chat(messages=[turn, chat()["messages"][0]], tools=[tool]), [MODEL])
    assert parsed.ignored == ()
    assert parsed.generations[0].prompt.messages[0].tool_calls[0].name == "weather"


@pytest.mark.parametrize(
    ("name", "value", "whole"), [("max_tokens", 7.0, 7), ("n", 2.0, 2), ("seed", 42.0, 42), ("top_k", 4e1, 40)]
)
def test_whole_numbers_may_be_written_as_floats(name: str, value: float, whole: int) -> None:
    for parse in (parse_chat, parse_completion):
        values = {**chat(prompt="x"), name: value}
        values.pop("prompt" if parse is parse_chat else "messages")
        asked, expected = parse(values, [MODEL]).generations[0], parse({**values, name: whole}, [MODEL]).generations[0]
        assert asked == expected
        with pytest.raises(InvalidArgument):
            parse({**values, name: 40.5}, [MODEL])
        with pytest.raises(InvalidArgument):
            parse({**values, name: "512"}, [MODEL])


def test_a_seed_of_minus_one_is_none() -> None:
    for parse, values in ((parse_chat, chat()), (parse_completion, {"model": MODEL.name, "prompt": "x"})):
        assert parse({**values, "seed": -1}, [MODEL]) == parse(values, [MODEL])
        assert parse({**values, "seed": -2}, [MODEL]).generations[0].sampling.seed == -2


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert one_chat(max_tokens=5, max_completion_tokens=7).stopping.max_new_tokens == 7
    assert one_chat(max_tokens=5).stopping.max_new_tokens == 5


def test_no_limit_is_the_end_of_the_context_or_nobodys_number() -> None:
    unknown = ModelInfo(name="m", context_length=0)
    for asked in (chat(), chat(max_tokens=-1)):
        assert parse_chat(asked, [MODEL]).generations[0].stopping.max_new_tokens == MODEL.context_length
        assert isinstance(parse_chat(asked, [unknown]).generations[0].stopping.max_new_tokens, UnsetInt)
    text = parse_completion({"model": "m", "prompt": "p", "max_tokens": -1}, [MODEL])
    assert text.generations[0].stopping.max_new_tokens == MODEL.context_length


def test_json_mode_takes_a_schema_under_the_name_of_other_servers() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}}}
    grammar = one_chat(response_format={"type": "json_object", "schema": schema}).grammar
    assert grammar.kind is GrammarKind.JSON_SCHEMA
    assert json.loads(grammar.source) == schema
    assert one_chat(response_format={"type": "json_object", "schema": None}).grammar.kind is GrammarKind.JSON_OBJECT


def test_thinking_is_the_chat_templates() -> None:
    for values in ({"enable_thinking": False}, {"thinking": {"type": "disabled"}}):
        assert one_chat(**values).prompt.template_arguments() == {"enable_thinking": False}
    with pytest.raises(UnsupportedField) as caught:
        one_chat(thinking={"type": "enabled", "budget_tokens": 5})
    assert caught.value.field == "thinking.budget_tokens"


@pytest.mark.parametrize(
    ("name", "value", "harmless"),
    [
        ("n_predict", 3, None),
        ("min_new_tokens", 3, None),
        ("stop_sequences", ["x"], None),
        ("regex", "a+", None),
        ("format", "json", None),
        ("reasoning", {"effort": "low"}, None),
        ("typical_p", 0.9, 1.0),
        ("mirostat", 2, 0),
        ("xtc_probability", 0.5, 0.0),
        ("top_n_sigma", 1.5, -1),
        ("top_n_sigma", 1.5, 0),
        ("do_sample", False, True),
        ("use_beam_search", True, False),
        ("use_beam_search", 1, False),
        ("repeat_penalty", 1.1, 1),
        ("length_penalty", True, 1.0),
        ("best_of", 2, 1.0),
    ],
)
def test_what_other_servers_would_sample_by_is_refused_by_name_unless_it_is_off(
    name: str, value: Any, harmless: Any
) -> None:
    for parse, values in ((parse_chat, chat()), (parse_completion, {"model": MODEL.name, "prompt": "x"})):
        with pytest.raises(UnsupportedField) as caught:
            parse({**values, name: value}, [MODEL])
        assert caught.value.field == name
        assert parse({**values, name: harmless}, [MODEL], strict=True) == parse(values, [MODEL])


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 7, "max_new_tokens": 7, "n_predict": 7, "num_predict": 7},
        {"repetition_penalty": 1.2, "repeat_penalty": 1.2},
        {"stop": ["\n"], "stop_sequences": ["\n"]},
        {"min_tokens": 2, "min_new_tokens": 2},
        {"seed": 3, "random_seed": 3},
        {"temperature": 0, "do_sample": False},
        {"temperature": 0.5, "do_sample": True, "grammar": "", "regex": "", "stop_sequences": []},
    ],
)
def test_one_setting_under_the_names_of_several_servers_is_taken(values: dict[str, Any]) -> None:
    ours = ("max_tokens", "repetition_penalty", "stop", "min_tokens", "seed", "temperature")
    kept = {name: value for name, value in values.items() if name in ours}
    for parse, least in ((parse_chat, chat()), (parse_completion, {"model": MODEL.name, "prompt": "x"})):
        assert parse({**least, **values}, [MODEL], strict=True) == parse({**least, **kept}, [MODEL])


def test_one_setting_under_two_names_must_be_one() -> None:
    with pytest.raises(UnsupportedField, match="max_tokens"):
        one_chat(max_tokens=7, n_predict=8)
    with pytest.raises(UnsupportedField, match="temperature"):
        one_chat(temperature=0.5, do_sample=False)


@pytest.mark.parametrize("name", ["prompt", "input", "system"])
def test_what_a_chat_says_elsewhere_than_in_its_messages_is_not_lost(name: str) -> None:
    with pytest.raises(UnsupportedField, match="message") as caught:
        one_chat(**{name: "hi"})
    assert caught.value.field == name
    assert one_chat(**{name: ""}) == one_chat()


@pytest.mark.parametrize("name", ["prefix", "partial"])
def test_a_prefilled_turn_of_other_servers_is_not_taken_for_a_finished_one(name: str) -> None:
    turn = {"role": "assistant", "content": "The answer is"}
    with pytest.raises(UnsupportedField, match="continue_final_message") as caught:
        one_chat(messages=[chat()["messages"][0], {**turn, name: True}])
    assert caught.value.field == f"messages[1].{name}"
    assert one_chat(messages=[{**turn, name: False}]) == one_chat(messages=[turn])


@pytest.mark.parametrize("name", ["input_type", "task", "output_dimension"])
def test_embeddings_that_would_be_others_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedField) as caught:
        parse_embeddings({"input": "x", name: "query"}, [MODEL])
    assert caught.value.field == name


@pytest.mark.parametrize("arguments", ["", None, "null", " "])
def test_a_call_without_arguments_has_an_empty_object_for_the_template(arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "ping", "arguments": arguments}}
    message = one_chat(messages=[{"role": "assistant", "tool_calls": [call]}]).prompt.messages[0]
    assert message.tool_calls[0].arguments_json == "{}"


@pytest.mark.parametrize("arguments", ['{"a": 1', "[1]", '"x"', "NaN", '{"a": NaN}'])
def test_broken_arguments_of_the_history_are_named(arguments: str) -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "ping", "arguments": text}} for text in ("{}", arguments)
    ]
    with pytest.raises(InvalidArgument) as caught:
        one_chat(messages=[chat()["messages"][0], {"role": "assistant", "tool_calls": calls}])
    assert caught.value.field == "messages[1].tool_calls[1].function.arguments"


def test_arguments_keep_their_order_and_their_integers() -> None:
    text = '{"z": 1, "a": 12345678901234567890}'
    call = {"id": "1", "type": "function", "function": {"name": "ping", "arguments": text}}
    message = one_chat(messages=[{"role": "assistant", "tool_calls": [call]}]).prompt.messages[0]
    assert message.tool_calls[0].arguments_json == text


@pytest.mark.parametrize("name", ["github/create_issue", "x" * 70, "a:b", "größe"])
def test_one_bad_tool_name_among_many_is_named(name: str) -> None:
    tools = [{"type": "function", "function": {"name": f"t{i}"}} for i in range(17)]
    with pytest.raises(InvalidArgument, match="1 to 64 letters") as caught:
        one_chat(tools=[*tools, {"type": "function", "function": {"name": name}}])
    assert caught.value.field == "tools[17].function.name"


def test_too_many_tools_are_counted() -> None:
    tools = [{"type": "function", "function": {"name": f"t{i}"}} for i in range(200)]
    with pytest.raises(InvalidArgument, match="at most 128 tools, got 200"):
        one_chat(tools=tools)


# --------------------------------------------------------------------------- unknown members


async def ask(servicer: OpenAIServicer, context: FakeContext, **values: Any) -> list[HttpBody]:
    return [item async for item in servicer.ChatCompletions(body(**chat(**values)), context)]  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [False, True])
async def test_unknown_members_are_ignored_and_named_in_a_header(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    servicer, context = OpenAIServicer(FakePort()), FakeContext()
    with caplog.at_level(logging.WARNING):
        await ask(servicer, context, stream=stream, session_id="secret", keep_alive="5m")
        await ask(servicer, FakeContext(), stream=stream, session_id="secret")
    assert context.initial_metadata[HEADER] == "session_id, keep_alive"
    assert caplog.text.count("session_id") == 1
    assert "secret" not in caplog.text


async def test_a_request_that_is_known_whole_gets_no_header() -> None:
    context = FakeContext()
    await ask(OpenAIServicer(FakePort()), context, temperature=0)
    assert HEADER not in context.initial_metadata


async def test_the_header_can_be_no_attack() -> None:
    context = FakeContext()
    names = {f"a\r\nset-cookie: x{i}é" + "y" * 1000: 1 for i in range(100)}
    await ask(OpenAIServicer(FakePort()), context, **names)
    value = context.initial_metadata[HEADER]
    assert len(value) < 1000
    assert value.isascii()
    assert value.isprintable()
    assert "\n" not in value


async def test_a_refusal_comes_before_the_header_so_that_it_can_be_tried_elsewhere() -> None:
    for stream in (False, True):
        context = FakeContext()
        with pytest.raises(QueueFull):
            await ask(OpenAIServicer(FakePort(error=QueueFull("full"), fail_after=0)), context, stream=stream, x=1)
        assert context.initial_metadata == {}


async def test_strict_servers_refuse_unknown_members_by_name() -> None:
    servicer = OpenAIServicer(FakePort(), strict_fields=True)
    with pytest.raises(InvalidArgument) as caught:
        await ask(servicer, FakeContext(), session_id="s")
    assert caught.value.field == "session_id"
    requests = [(servicer.Embeddings, {"input": "a"}), (servicer.Tokenize, {"prompt": "a"})]
    requests += [(servicer.Detokenize, {"tokens": [1]})]
    for method, values in requests:
        with pytest.raises(InvalidArgument, match="session_id"):
            await method(body(model="m", session_id="s", **values), FakeContext())


async def test_the_other_methods_name_what_they_ignore_too() -> None:
    servicer = OpenAIServicer(FakePort())
    for method, values in (
        (servicer.Embeddings, {"input": "a"}),
        (servicer.Tokenize, {"prompt": "a"}),
        (servicer.Detokenize, {"tokens": [1]}),
    ):
        context = FakeContext()
        await method(body(model="m", session_id="s", **values), context)
        assert context.initial_metadata[HEADER] == "session_id"


# ---------------------------------------------------------------------- errors that name a place


@pytest.mark.parametrize(
    ("prompt", "field"), [([5, 999999], "prompt[1]"), ([[1], [5, 999999]], "prompt[1][1]"), ("x", "prompt[1]")]
)
async def test_a_token_outside_the_vocabulary_is_named_by_its_place(prompt: Any, field: str) -> None:
    port = FakePort(pieces=(), error=InvalidArgument("prompt_token_ids.ids[1]", "is not below the vocabulary size"))
    if isinstance(prompt[0], list):
        working = FakePort.generate

        async def generate(request: Any) -> Any:
            port.error = None if request.prompt.token_ids == (1,) else InvalidArgument("prompt_token_ids.ids[1]", "x")
            async for event in working(port, request):
                yield event

        port.generate = generate  # type: ignore[method-assign]
    with pytest.raises(InvalidArgument) as caught:
        await ask_text(port, prompt=prompt)
    assert caught.value.field == field
    assert not isinstance(caught.value, PromptTooLong)
