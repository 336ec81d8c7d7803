"""From OpenAI's JSON to the domain: what is honoured, what is refused, and how refusals name the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat_grpc.core import (
    Capability,
    ChatPrompt,
    GrammarKind,
    Image,
    ModelInfo,
    TextPrompt,
    TokenPrompt,
)
from fastchat_grpc.errors import InvalidArgument, ModelNotFound, UnsupportedField
from fastchat_grpc.openai.chat_request import parse_chat
from fastchat_grpc.openai.completion_request import parse_completion
from fastchat_grpc.openai.embeddings import parse_embeddings
from fastchat_grpc.openai.jsonio import MAX_DEPTH, parse_object
from fastchat_grpc.openai.tokens import parse_detokenize, parse_token_check, parse_tokenize
from fastchat_grpc.rpc import convert
from fastchat_grpc.v1 import generation_pb2 as pb
from tests.unit.openai.fakes import MODEL, chat

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def one_chat(**values: Any) -> Any:
    return parse_chat(chat(**values), [MODEL]).generations[0]


def one_text(**values: Any) -> Any:
    return parse_completion({"model": "m", "prompt": "p", **values}, [MODEL]).generations[0]


def test_every_setting_of_a_chat_reaches_the_domain() -> None:
    request = one_chat(
        temperature=0.25,
        top_p=0.5,
        top_k=7,
        min_p=0.125,
        n=3,
        stop=["a", "b"],
        seed=-5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={"12": -100, "13": 1.5},
        max_completion_tokens=9,
        min_tokens=2,
        stop_token_ids=[4, 5],
        ignore_eos=True,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        logprobs=True,
        top_logprobs=4,
        priority=-3,
        prompt_cache_key="session",
        truncate_prompt_tokens=50,
        request_id="mine",
        reasoning_effort="low",
        chat_template_kwargs={"enable_thinking": False},
    )
    sampling, stopping, output = request.sampling, request.stopping, request.output
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.25, 0.5, 7, 0.125)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.5)
    assert (sampling.seed, sampling.logit_bias) == (-5, {12: -100.0, 13: 1.5})
    assert (stopping.max_new_tokens, stopping.min_new_tokens, stopping.stop) == (9, 2, ("a", "b"))
    assert (stopping.stop_token_ids, stopping.ignore_eos, stopping.include_stop) == ((4, 5), True, True)
    assert (output.n, output.logprobs, output.keep_special_tokens) == (3, 4, True)
    assert (request.priority, request.session_key, request.truncate_prompt_tokens) == (-3, "session", 50)
    assert request.request_id == "mine"
    assert request.prompt.template_arguments() == {"enable_thinking": False, "reasoning_effort": "low"}


def test_defaults_are_those_of_the_openai_api() -> None:
    assert one_chat().stopping.max_new_tokens == MODEL.context_length
    assert one_text().stopping.max_new_tokens == 16
    assert one_chat().sampling.temperature == 1.0
    assert one_chat().output.logprobs is None
    assert one_chat(logprobs=True).output.logprobs == 0


def test_null_means_unset_for_every_optional_field() -> None:
    names = ["temperature", "n", "stop", "seed", "logit_bias", "tools", "tool_choice", "response_format", "functions"]
    names += ["stream", "stream_options", "logprobs", "top_logprobs", "max_tokens", "user", "audio", "min_tokens"]
    assert one_chat(**dict.fromkeys(names)) == one_chat()


def test_ignored_fields_change_nothing() -> None:
    plain = one_chat()
    assert one_chat(user="u", metadata={"a": "b"}, store=True, service_tier="auto", safety_identifier="x") == plain
    # Whatever they hold: LiteLLM and the like attach objects of their own.
    assert one_chat(user=5, metadata={"a": {"b": [1]}}, store="yes", service_tier="standard_only") == plain


def test_text_parts_become_text_and_images_stay_parts() -> None:
    seeing = ModelInfo(name="v", context_length=10, capabilities=frozenset({Capability.VISION}))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert one_chat(messages=[{"role": "user", "content": parts}]).prompt.messages[0].content == "a\nb"
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAEC", "detail": "low"}}
    call = parse_chat({"model": "v", "messages": [{"role": "user", "content": [*parts, image]}]}, [seeing])
    prompt = call.generations[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages[0].content == ("a", "b", Image(data=b"\x00\x01\x02", media_type="image/png"))


def test_an_assistant_message_of_ours_can_be_sent_back() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "weather?", "name": "ada"},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
            "tool_calls": [call],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    parsed = one_chat(messages=messages).prompt.messages
    assert [message.role for message in parsed] == ["developer", "user", "assistant", "tool"]
    assert parsed[2].tool_calls[0].arguments_json == '{"city":"Oslo"}'
    assert parsed[3].tool_call_id == "call_1"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", [TextPrompt("text")]),
        ([1, 2], [TokenPrompt((1, 2))]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([[1], [2, 3]], [TokenPrompt((1,)), TokenPrompt((2, 3))]),
    ],
)
def test_a_prompt_is_text_or_token_ids_or_a_list_of_either(prompt: Any, expected: Any) -> None:
    call = parse_completion({"prompt": prompt, "model": "m"}, [MODEL], "rid")
    assert [generation.prompt for generation in call.generations] == expected
    assert len({generation.request_id for generation in call.generations}) == len(expected)


def test_a_prompt_can_be_scored_without_an_answer() -> None:
    call = parse_completion({"prompt": "p", "max_tokens": 0, "echo": True, "logprobs": 2}, [MODEL])
    assert call.reply.without_output
    assert call.reply.model == "m"
    assert call.generations[0].output.prompt_logprobs == 2


@pytest.mark.parametrize(
    ("values", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, GrammarKind.JSON_OBJECT, ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
            GrammarKind.JSON_SCHEMA,
            '{"type": "object"}',
        ),
        ({"structured_outputs": {"regex": "[a-z]+"}}, GrammarKind.REGEX, "[a-z]+"),
        ({"structured_outputs": {"choice": ["yes.", "no"]}}, GrammarKind.REGEX, r"(yes\.)|(no)"),
        ({"guided_grammar": "start: A"}, GrammarKind.LARK, "start: A"),
        ({"guided_json": '{"type": "object"}'}, GrammarKind.JSON_SCHEMA, '{"type": "object"}'),
    ],
)
def test_structured_output_becomes_a_grammar(values: dict[str, Any], kind: GrammarKind, source: str) -> None:
    grammar = one_chat(**values).grammar
    assert (grammar.kind, grammar.source) == (kind, source)


def test_a_forced_call_becomes_a_grammar_of_its_arguments_or_of_a_list_of_calls() -> None:
    parameters = {"properties": {"at": {"$ref": "#/$defs/Point"}}, "$defs": {"Point": {"type": "number"}}}
    tool = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    named = one_chat(tools=[TOOL, tool], tool_choice={"type": "function", "function": {"name": "go"}})
    schema = json.loads(named.grammar.source)
    assert schema["$defs"] == {"Point": {"type": "number"}}
    assert schema["properties"] == {"at": {"$ref": "#/$defs/Point"}}
    required = one_chat(tools=[TOOL, tool], tool_choice="required", parallel_tool_calls=False)
    schema = json.loads(required.grammar.source)
    assert schema["maxItems"] == 1
    assert [item["properties"]["name"]["enum"] for item in schema["items"]["anyOf"]] == [["weather"], ["go"]]


def test_tools_are_kept_from_the_model_where_tool_choice_is_none() -> None:
    assert one_chat(tools=[TOOL], tool_choice="none").prompt.tools == ()
    assert one_chat(tools=[TOOL]).prompt.tools[0].name == "weather"
    assert one_chat(tools=[TOOL]).output.keep_special_tokens


IMAGE = {"type": "image_url", "image_url": {"url": "https://x/y.png"}}
BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "video", "x": 1}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages[0].name"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": 10**30}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": -2}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop[1]"),
    ({"stop": [None]}, "stop[0]"),
    ({"stop": ["x" * 1025]}, "stop[0]"),
    ({"stop": [str(i) for i in range(65)]}, "stop"),
    ({"stop_token_ids": [1, "x"]}, "stop_token_ids[1]"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"logit_bias": {"bad1": 1}}, "logit_bias[bad1]"),
    ({"reasoning_effort": "bogus"}, "reasoning_effort"),
    ({"max_new_tokens": 5}, "max_new_tokens"),
    ({"repeat_penalty": 1.5}, "repeat_penalty"),
    ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
    ({"logit_bias": {"5": "x"}}, "logit_bias[5]"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"tools": [{"type": "custom"}]}, "tools[0].type"),
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"request_id": "x" * 129}, "request_id"),
    ({"model": 5}, "model"),
]


@pytest.mark.parametrize(("values", "field"), BAD_CHATS, ids=lambda value: str(value)[:60])
def test_a_bad_chat_is_refused_by_the_name_of_its_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_chat({**chat(), **values}, [MODEL])
    assert caught.value.field == field
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt[0]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [1, 2**31]}, "prompt[1]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
    ],
    ids=str,
)
def test_a_bad_text_completion_is_refused_by_the_name_of_its_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_completion({"model": "m", "prompt": "p", **values}, [MODEL])
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", 5]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_embeddings_are_refused_by_the_name_of_their_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_embeddings({"model": "m", **values}, [MODEL])
    assert caught.value.field == field


def test_an_image_for_a_text_model_is_refused_before_the_engine() -> None:
    with pytest.raises(UnsupportedField, match="reads text only"):
        one_chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}])


def test_a_misspelled_field_is_answered_with_the_right_one() -> None:
    with pytest.raises(InvalidArgument, match="did you mean temperature"):
        parse_chat(chat(temprature=1), [MODEL], strict=True)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"  ",
        b"{",
        b"nul",
        b"[1]",
        b'"x"',
        b"5",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"\x00",
        b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"a":' + b"[" * 70 + b"]" * 70 + b"}",
        b"x" * (16 * 1024 * 1024 + 1),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_body_that_is_no_sound_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_object(text)
    assert caught.value.field == "body"
    assert len(caught.value.message) < 200


def test_the_deepest_accepted_parameters_survive_the_wire() -> None:
    deep: dict[str, Any] = {}
    for _ in range(MAX_DEPTH - 4):
        deep = {"a": deep}
    tools = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
    parse_object(json.dumps({"tools": tools}).encode())
    with pytest.raises(InvalidArgument):
        parse_object(json.dumps({"tools": [{"a": tools[0]}]}).encode())
    request = one_chat(tools=tools)
    data = convert.generate_request_to_pb(request).SerializeToString()
    assert convert.generate_request_from_pb(pb.GenerateRequest.FromString(data)) == request


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted({name for values, _ in BAD_CHATS for name in values} | {"prompt", "input", "echo", "tokens", "prompts"})
PLAUSIBLE = st.sampled_from(
    [1, 0, -1, 0.5, True, False, "auto", "x", ["x"], [1], {}, {"type": "json_object"}, {"type": "function"}, None]
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), PLAUSIBLE | JSON, max_size=6))
def test_any_json_is_parsed_or_refused_as_the_callers_mistake(values: dict[str, Any]) -> None:
    base = {"messages": [{"role": "user", "content": "x"}], "model": "m"}
    for parse, start in (
        (lambda v: parse_chat(v, [MODEL]), base),
        (lambda v: parse_chat(v, [MODEL]), {}),
        (lambda v: parse_completion(v, [MODEL]), {"prompt": "p"}),
        (lambda v: parse_embeddings(v, [MODEL]), {"input": "p"}),
        (parse_tokenize, {}),
        (parse_detokenize, {}),
        (lambda v: parse_token_check(v, [MODEL]), {}),
    ):
        try:
            call = parse({**start, **values})
        except (InvalidArgument, ModelNotFound) as error:
            named = getattr(error, "field", "model")
        else:
            named = "nothing"
            for generation in getattr(call, "generations", ()):
                convert.generate_request_to_pb(generation).SerializeToString()
        assert named


@pytest.mark.parametrize("one", [b"[],", b"{},", b'[{"a":[]}],'])
def test_millions_of_lists_and_objects_are_refused_before_they_are_made(one: bytes) -> None:
    body = b'{"model":"m","x":[' + one * (8_000_000 // len(one)) + b"0]}"
    with pytest.raises(InvalidArgument, match="lists and objects"):
        parse_object(body)


@pytest.mark.parametrize("text", ["[{" * 500_000, '\\"[' * 400_000, "\\\\[" * 400_000])
def test_brackets_of_a_text_are_none(text: str) -> None:
    body = json.dumps({"prompt": text}).encode()
    assert parse_object(body) == {"prompt": text}


@pytest.mark.parametrize("body", [b'"' + b'\\"' * 400_000 + b"[" * 200_000, b'{"a": "' + b"[" * 200_000 + b"\\"])
def test_a_text_that_does_not_end_is_looked_at_once(body: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"not valid JSON|lists and objects"):
        parse_object(body)
