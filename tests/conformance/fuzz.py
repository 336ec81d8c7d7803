"""Requests of every shape that the domain allows, for hypothesis: plain, at the bounds, and nasty."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from fastchat_grpc.backends.capabilities import CHECKS, Traits, refuse_unsupported
from fastchat_grpc.core import (
    CHAT_ROLES,
    MAX_CHOICES,
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    Grammar,
    GrammarKind,
    Image,
    OutputOptions,
    ResumedChoice,
    SamplingParams,
    StopConditions,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolCall,
    ToolChoice,
)
from fastchat_grpc.errors import UnsupportedField

INT32_MAX = 2**31 - 1
VOCABULARY = int(os.environ.get("FUZZ_VOCABULARY", "49152"))
"""Tokens of the model under test."""
SCHEMAS: tuple[str, ...] = (
    '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false}',
    '{"type": "string"}',
    '{"enum": ["yes", "no"]}',
    '{"type": "array", "items": {"type": "string"}}',  # may go on for ever
    "{}",
    "true",
    "false",
    "",
    "[]",
    "null",
    "{",
    '{"enum": []}',
    '{"not": {}}',
    '{"type": "no such type"}',
    '{"$ref": "#"}',
    '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}',
    '{"$ref": "#/no/such/place"}',
    '{"$ref": "https://example.com/schema.json"}',
    '{"type": "object", "properties": {"child": {"$ref": "#"}}}',
    '{"type": "integer", "minimum": 5, "maximum": 4}',
    '{"type": "string", "minLength": 5, "maxLength": 4}',
    '{"type": "string", "pattern": "["}',
    '{"type": "string", "pattern": "[a&&b]"}',
    '{"allOf": [{"type": "string"}, {"type": "integer"}]}',
    '{"type": "array", "minItems": 100000}',
    '{"type": "string", "minLength": 1000000000}',
    '{"type": ["string", "null", 5]}',
    '{"properties": 5}',
    '{"required": "a"}',
    '{"anyOf": []}',
    '{"const": "\\u0000"}',
    json.dumps({"type": "object", "properties": {f"p{i}": {"type": "number"} for i in range(60)}}),
)
REGEXES = (
    "yes|no", "[a-z]{1,8}", "(ab)*", ".*", "", "(", "[a&&b]", "[^\\s\\S]", "a{1000000}", "(?=a)b", "(?!a)", "\\",
    "a**", "(a|b|ab)*c", "\\d+", "[\\u0000-\\uffff]+", "x{5,2}", "(?P<n>a)(?P=n)", "^$", "$a", "\U0001f600+", "\\p{L}+",
    "((((((a))))))",
)  # fmt: skip
LARKS = (
    'start: "yes" | "no"',
    'start: start "a" | "b"',
    "start: undefined",
    "start: /[a-z]+/",
    "",
    "start: start",
    'start: "a"*',
    "%import common.WORD\nstart: WORD",
    "start: /(/",
    'start: ""',
    "nonsense {",
)

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=24)
prompts_text = st.one_of(
    st.sampled_from(["The capital of France is", "Hello", " ", "\n", "\x00", "\ufffd\u200d", "{}", "</s><|im_end|>"]),
    texts,
    st.integers(1, 700).map(lambda n: "word " * n),
)


def _values(low: float, high: float, *nasty: float) -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from([low, high, *nasty]), st.floats(low, high, allow_nan=False))


def _rarely(usual: st.SearchStrategy[Any], *rare: Any) -> st.SearchStrategy[Any]:
    """One of the rare values in about one draw of twelve."""
    return st.integers(0, 11).flatmap(lambda n: usual if n else st.sampled_from(rare))


sampling_fields: dict[str, st.SearchStrategy[Any]] = {
    "temperature": _values(0, 100, 1, 0.7, 1e-6, 1e-5, 2),
    "top_p": _values(0, 1, 1e-9, 1e-7, 0.9, 0.999999),
    "top_k": st.sampled_from([-1, 0, 1, 2, 40, VOCABULARY - 1, VOCABULARY, 10**6, INT32_MAX]),
    "min_p": _values(0, 1, 0.05, 1e-30, 0.999999),
    "repetition_penalty": st.one_of(st.sampled_from([0.001, 0.5, 1, 1.1, 2, 1000]), st.floats(0.01, 10)),
    "presence_penalty": _values(-2, 2, 0),
    "frequency_penalty": _values(-2, 2, 0),
    "seed": st.sampled_from([None, 0, 1, -1, 2**32, 2**63 - 1, -(2**63)]),
    "logit_bias": st.dictionaries(
        _rarely(st.sampled_from([0, 1, 2, 97, 255]), VOCABULARY - 1, VOCABULARY, INT32_MAX),
        _values(-100, 100, 0),
        max_size=3,
    ),
}
token_ids = st.lists(st.one_of(st.integers(0, 255), st.sampled_from([0, 2, VOCABULARY - 1])), min_size=1, max_size=12)
wild_token_ids = _rarely(token_ids, [VOCABULARY], [INT32_MAX])
stopping_fields: dict[str, st.SearchStrategy[Any]] = {
    "max_new_tokens": st.one_of(st.integers(1, 12), st.sampled_from([1, 300, 512, INT32_MAX])),
    "min_new_tokens": st.one_of(st.integers(0, 12), st.sampled_from([300, 512, INT32_MAX])),
    "stop": st.lists(st.one_of(st.sampled_from(["a", " ", "\ufffd", "x" * 1024]), texts), max_size=4).map(tuple),
    "stop_token_ids": wild_token_ids.map(tuple),
    "ignore_eos": st.booleans(),
    "include_stop": st.booleans(),
}
output_fields: dict[str, st.SearchStrategy[Any]] = {
    "n": st.one_of(st.integers(1, 4), st.sampled_from([1, 9, MAX_CHOICES])),
    "logprobs": st.sampled_from([None, 0, 1, 5, 20]),
    "prompt_logprobs": st.sampled_from([None, 0, 1, 20]),
    "echo": st.booleans(),
    "stream_interval": st.sampled_from([None, 1, 3, INT32_MAX]),
    "cumulative_text": st.booleans(),
    "keep_special_tokens": st.booleans(),
}


def _some(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the fields, so that both few and many come together."""
    return st.fixed_dictionaries({}, optional=fields)


@st.composite
def _stopping(draw: st.DrawFn) -> StopConditions:
    fields = draw(_some(stopping_fields))
    fields.setdefault("max_new_tokens", draw(st.integers(1, 12)))  # most requests are short
    if "min_new_tokens" in fields:
        fields["min_new_tokens"] = min(fields["min_new_tokens"], fields["max_new_tokens"])
    return StopConditions(**fields)


_parts = _rarely(texts, Image(data=b"\x89PNG"), Image(url="http://127.0.0.1:9/x.png"))
_messages = st.builds(
    ChatMessage,
    role=st.sampled_from(CHAT_ROLES),
    content=st.one_of(st.just(""), prompts_text, st.lists(_parts, max_size=2).map(tuple)),
    name=st.sampled_from(["", "Ada", "\n"]),
    tool_calls=st.sampled_from([(), (ToolCall(id="1", name="f", arguments_json="{"),)]),
    tool_call_id=st.sampled_from(["", "1"]),
)


@st.composite
def _chats(draw: st.DrawFn) -> ChatPrompt:
    messages = tuple(draw(st.lists(_messages, min_size=1, max_size=3)))
    continued = messages[-1].role == "assistant" and draw(st.booleans())
    tools = draw(st.sampled_from([(), (), (Tool(name="f"),), (Tool(name="g", parameters_json=SCHEMAS[0]),)]))
    arguments = draw(_rarely(st.just(""), '{"enable_thinking": false}', '{"messages": 5}', '{"tools": {}}'))
    choice = draw(st.sampled_from([*ToolChoice, *(tool.name for tool in tools)]))
    return ChatPrompt(
        messages=messages,
        tools=tools,
        tool_choice=choice,
        template_arguments_json=arguments,
        continue_final_message=continued,
    )


@st.composite
def _resumes(draw: st.DrawFn, n: int) -> tuple[ResumedChoice, ...] | None:
    if draw(st.integers(0, 4)):
        return None
    return tuple(
        ResumedChoice(
            index=index,
            output_token_ids=draw(st.one_of(st.just(()), _rarely(token_ids.map(tuple), (VOCABULARY,), (97,) * 600))),
            text_length=draw(st.sampled_from([0, 1, 5, INT32_MAX])),
            finished=draw(st.booleans()),
        )
        for index in draw(st.sets(st.integers(0, n - 1), max_size=3))
    )


grammars = st.one_of(
    st.just(Grammar(GrammarKind.JSON_OBJECT)),
    st.sampled_from(SCHEMAS).map(lambda source: Grammar(GrammarKind.JSON_SCHEMA, source)),
    st.sampled_from(REGEXES).map(lambda source: Grammar(GrammarKind.REGEX, source)),
    st.sampled_from(LARKS).map(lambda source: Grammar(GrammarKind.LARK, source)),
)


@st.composite
def requests(draw: st.DrawFn, model: str = "tested") -> GenerateRequest:
    """Any valid request; what a model cannot take is for its backend to refuse."""
    output = OutputOptions(**draw(_some(output_fields)))
    prompt = draw(
        st.one_of(
            prompts_text.map(TextPrompt),
            wild_token_ids.map(lambda ids: TokenPrompt(tuple(ids))),
            _chats(),
        )
    )
    return GenerateRequest(
        prompt=prompt,
        model=model,
        sampling=SamplingParams(**draw(_some(sampling_fields))),
        stopping=draw(_stopping()),
        output=output,
        grammar=draw(st.one_of(st.none(), st.none(), grammars)),
        priority=draw(st.sampled_from([0, 1, -1, INT32_MAX, -(2**31)])),
        lora_adapter=draw(st.sampled_from(["", "", "", "", "no such adapter"])),
        session_key=draw(st.sampled_from(["", "k"])),
        truncate_prompt_tokens=draw(st.sampled_from([None, None, 1, 5, 511, 512, INT32_MAX])),
        resume=draw(_resumes(output.n)),
    )


def supported_part(asked: GenerateRequest, traits: Traits) -> GenerateRequest:
    """The request without the fields that a backend refuses, so that the rest of it is reached."""
    for _ in range(len(CHECKS)):
        try:
            refuse_unsupported(asked, traits)
        except UnsupportedField as error:
            group, _, name = error.field.partition(".")
            if group in ("sampling", "stopping", "output"):
                plain = type(getattr(asked, group))()
                part = replace(getattr(asked, group), **{name: getattr(plain, name)})
                asked = replace(asked, **{group: part})
            elif group == "structured_output":
                asked = replace(asked, grammar=None)
            elif group in ("resume", "truncate_prompt_tokens"):
                asked = replace(asked, **{group: None})
            elif group == "lora_adapter":
                asked = replace(asked, lora_adapter="")
            else:
                asked = replace(asked, prompt=TextPrompt("Hello"))
    return asked
