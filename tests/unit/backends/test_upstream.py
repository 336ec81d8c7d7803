"""The upstream backend before servers that each want it in their own way."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from email.utils import formatdate
from time import time
from typing import Any

import pytest

from fastchat_grpc.backends import registry
from fastchat_grpc.backends.base import Backend
from fastchat_grpc.backends.upstream.answer import finish_reason
from fastchat_grpc.backends.upstream.backend import UpstreamBackend
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import (
    ChatMessage,
    ChatPrompt,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    ModelInfo,
    OutputOptions,
    PromptEcho,
    SamplingParams,
    StopConditions,
    TextPrompt,
)
from fastchat_grpc.errors import InvalidArgument, QueueFull, UnsupportedField, WorkerUnavailable
from fastchat_grpc.openai.chat_request import parse_chat
from fastchat_grpc.rpc.convert import generate_request_from_pb, generate_request_to_pb
from tests.unit.backends.asking import Answers, ask
from tests.unit.backends.upstream_stand_in import Answer, Refusal, UpstreamServer, chat, upstream_server, usage

pytest.importorskip("httpx2")

Start = Callable[..., Awaitable[Backend]]
HI = ChatPrompt(messages=(ChatMessage(role="user", content="hi"),))
CHAT = GenerateRequest(prompt=HI)


@pytest.fixture
async def server() -> AsyncIterator[UpstreamServer]:
    async with upstream_server() as server:
        yield server


@pytest.fixture
async def start(server: UpstreamServer) -> AsyncIterator[Start]:
    """Starts backends of the stand-in; arguments: fields of ModelConfig, and options of the backend."""
    async with AsyncExitStack() as stack:

        async def start(model: dict[str, Any] | None = None, **options: str) -> Backend:
            settings = ModelConfig(path="served", **(model or {}))
            backend = registry.create(
                BackendConfig(name="upstream", model=settings, options={"url": server.url, **options})
            )
            stack.push_async_callback(backend.close)
            await backend.start()
            return backend

        yield start


def served(backend: Backend) -> ModelInfo:
    """The model as the backend offers it."""
    assert isinstance(backend, UpstreamBackend)
    return backend._info("served")


def one(answers: Answers) -> tuple[str, FinishReason]:
    return answers.text, answers.completion.finish_reason


async def test_only_what_the_caller_has_set_is_sent(start: Start, server: UpstreamServer) -> None:
    backend = await start()
    await ask(backend, CHAT)
    assert set(server.bodies[0]) == {"model", "messages", "stream", "stream_options"}
    given = SamplingParams(temperature=1.0, top_p=1.0, presence_penalty=0.5)
    await ask(backend, GenerateRequest(prompt=HI, sampling=given, stopping=StopConditions(max_new_tokens=256)))
    wanted = {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.5, "max_tokens": 256}
    assert {name: server.bodies[1].get(name) for name in wanted} == wanted
    assert set(server.bodies[1]) == {*server.bodies[0], *wanted}


@pytest.mark.parametrize("dialect", ["openai", "vllm"])
async def test_a_chat_without_a_limit_is_not_cut_where_the_context_is_unknown(
    start: Start, server: UpstreamServer, dialect: str
) -> None:
    backend = await start(dialect=dialect)
    model = served(backend)
    assert model.context_length == 0
    body = {"model": "served", "messages": [{"role": "user", "content": "hi"}]}
    asked = parse_chat(body, [model]).generations[0]
    across = generate_request_from_pb(generate_request_to_pb(asked))  # as it reaches a worker
    await ask(backend, across)
    assert not {"max_tokens", "max_completion_tokens"} & set(server.bodies[0])


async def test_a_completion_says_its_limit_as_servers_have_defaults_of_their_own(
    start: Start, server: UpstreamServer
) -> None:
    backend = await start()
    server.answer = lambda path, body: [{"choices": [{"index": 0, "text": "hi", "finish_reason": "stop"}]}, "[DONE]"]
    await ask(backend, GenerateRequest(prompt=TextPrompt("hi")))
    assert server.bodies[0]["max_tokens"] == 256


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/models", {"data": [{"id": "served", "max_model_len": 4096}]}),
        ("/v1/models", {"data": [{"id": "served", "context_length": 4096}]}),
        ("/v1/models", {"data": [{"id": "served", "context_window": 4096}]}),
        ("/props", {"default_generation_settings": {"n_ctx": 4096}}),
        ("/info", {"max_total_tokens": 4096}),
    ],
)
async def test_the_context_length_is_asked_for_wherever_servers_say_it(
    start: Start, server: UpstreamServer, path: str, said: dict[str, Any]
) -> None:
    server.get[path] = said
    backend = await start()
    model = served(backend)
    assert model.context_length == 4096
    assert served(await start({"context_length": 1000})).context_length == 1000


def refuses(name: str, message: str) -> Callable[[str, dict[str, Any]], Answer]:
    def answer(path: str, body: dict[str, Any]) -> Answer:
        if name in body:
            return Refusal(400, {"error": {"message": message, "param": name, "code": "unsupported_parameter"}})
        return [chat("hi", finish="stop"), "[DONE]"]

    return answer


async def test_a_server_that_wants_max_completion_tokens_gets_it_from_then_on(
    start: Start, server: UpstreamServer
) -> None:
    server.answer = refuses(
        "max_tokens",
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    )
    backend = await start()
    limited = GenerateRequest(prompt=HI, stopping=StopConditions(max_new_tokens=9))
    for _ in range(2):
        assert one(await ask(backend, limited)) == ("hi", FinishReason.STOP)
    assert [body.get("max_completion_tokens") for body in server.bodies] == [None, 9, 9]


async def test_a_server_without_stream_options_is_asked_without_and_tokens_are_counted_by_pieces(
    start: Start, server: UpstreamServer
) -> None:
    refusing = refuses("stream_options", "stream_options: extra fields not permitted")
    server.answer = lambda path, body: (
        refusing(path, body) if "stream_options" in body else [chat("a"), chat("b"), chat(finish="stop"), "[DONE]"]
    )
    answers = await ask(await start(), CHAT)
    assert one(answers) == ("ab", FinishReason.STOP)
    assert answers.completion.usage.completion_tokens == 2


async def test_a_refusal_of_what_the_caller_set_is_the_callers(start: Start, server: UpstreamServer) -> None:
    server.answer = refuses("temperature", "temperature does not support 0.3 with this model")
    with pytest.raises(InvalidArgument) as refused:
        await ask(await start(), GenerateRequest(prompt=HI, sampling=SamplingParams(temperature=0.3)))
    assert refused.value.field == "sampling.temperature"
    assert len(server.bodies) == 1


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_reasoning_is_passed_on_before_the_answer_and_counts(
    start: Start, server: UpstreamServer, name: str
) -> None:
    thoughts = [chat(**{name: word}) for word in ("let ", "me ", "see")]
    server.answer = lambda path, body: [*thoughts, chat("42"), chat(finish="stop"), "[DONE]"]
    backend = await start()
    answers = await ask(backend, CHAT)
    assert one(answers) == ("42", FinishReason.STOP)
    assert answers.choices[0].reasoning == "let me see"
    assert answers.completion.usage.completion_tokens == 4
    assert backend.load().processed_tokens == 4
    server.answer = lambda path, body: [*thoughts, chat(finish="length"), "[DONE]"]
    answers = await ask(backend, CHAT)
    assert one(answers) == ("", FinishReason.LENGTH)
    assert answers.choices[0].reasoning == "let me see"


async def test_reasoning_stays_out_of_what_follows_a_grammar(start: Start, server: UpstreamServer) -> None:
    server.answer = lambda path, body: [chat(reasoning="hm"), chat("{}"), chat(finish="stop"), "[DONE]"]
    backend = await start()
    answers = await ask(backend, GenerateRequest(prompt=HI, grammar=Grammar(GrammarKind.JSON_OBJECT)))
    assert one(answers) == ("{}", FinishReason.STOP)
    assert answers.choices[0].reasoning == "hm"
    assert backend.load().processed_tokens == 2


async def test_tokens_of_reasoning_are_told_as_the_server_counts_them(start: Start, server: UpstreamServer) -> None:
    counted = {"prompt_tokens": 3, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 5}}
    ends = [chat("42"), chat(finish="stop"), {"choices": [], "usage": counted}, "[DONE]"]
    server.answer = lambda path, body: [chat(reasoning="hm"), *ends]
    answers = await ask(await start(), CHAT)
    assert answers.completion.usage.reasoning_tokens == 5


@pytest.mark.parametrize("dialect", ["openai", "vllm"])
async def test_what_the_assistant_thought_goes_back_to_the_server(
    start: Start, server: UpstreamServer, dialect: str
) -> None:
    turns = (*HI.messages, ChatMessage(role="assistant", content="42", reasoning="hm"), *HI.messages)
    await ask(await start(dialect=dialect), GenerateRequest(prompt=ChatPrompt(messages=turns)))
    sent = server.bodies[0]["messages"]
    assert sent[1].pop("role") == "assistant"
    assert sent[1] == {"content": "42", "reasoning_content": "hm", **({"reasoning": "hm"} if dialect == "vllm" else {})}
    assert set(sent[0]) == set(sent[2]) == {"role", "content"}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        *[(name, FinishReason.STOP) for name in ("stop", "eos_token", "stop_sequence", "end_turn", "function_call")],
        *[(name, FinishReason.CONTENT_FILTER) for name in ("content_filter", "sensitive")],
        ("length", FinishReason.LENGTH),
        ("max_tokens", FinishReason.LENGTH),
        ("abort", FinishReason.ABORT),
    ],
)
def test_every_servers_word_for_an_end_is_understood(said: str, meant: FinishReason) -> None:
    assert finish_reason(said) is meant


@pytest.mark.parametrize("finish", ["", None])
async def test_an_answer_that_is_marked_as_done_has_ended(
    start: Start, server: UpstreamServer, finish: str | None
) -> None:
    server.answer = lambda path, body: [chat("whole", finish=finish), "[DONE]"]
    assert one(await ask(await start(), CHAT)) == ("whole", FinishReason.STOP)
    server.answer = lambda path, body: [chat("part", finish=finish)]
    with pytest.raises(WorkerUnavailable, match="in the middle"):
        await ask(await start(), CHAT)


async def test_choices_are_one_request_and_share_its_usage(start: Start, server: UpstreamServer) -> None:
    def answer(path: str, body: dict[str, Any]) -> Answer:
        said = [chat("a", index=1), chat("b", index=0), chat("c", index=1), chat(finish="stop", index=1)]
        return [*said, chat(finish="length", index=0), usage(7, 10), "[DONE]"]

    server.answer = answer
    answers = await ask(await start(), GenerateRequest(prompt=HI, output=OutputOptions(n=2)))
    assert [body["n"] for body in server.bodies] == [2]
    assert [answers.choices[i].text for i in range(2)] == ["b", "ac"]
    ends = [answers.choices[i].completion for i in range(2)]
    assert [end.finish_reason for end in ends if end] == [FinishReason.LENGTH, FinishReason.STOP]
    assert sum(end.usage.completion_tokens for end in ends if end) == 10
    assert {end.usage.prompt_tokens for end in ends if end} == {7}


@pytest.mark.parametrize("how", ["refuses", "ignores"])
async def test_a_server_of_one_choice_at_a_time_makes_the_others_by_requests_of_their_own(
    start: Start, server: UpstreamServer, how: str
) -> None:
    refusing = refuses("n", "n: only one completion is supported")
    if how == "refuses":
        server.answer = refusing
    backend = await start()
    for _ in range(2):
        answers = await ask(backend, GenerateRequest(prompt=HI, output=OutputOptions(n=3)))
        assert [answers.choices[i].text for i in range(3)] == ["hi"] * 3
    asked = [body.get("n") for body in server.bodies]
    assert asked[0] == 3
    assert set(asked[1:]) == {None}


async def test_logprobs_come_back_without_token_ids(start: Start, server: UpstreamServer) -> None:
    content = [
        {"token": "hi", "logprob": -0.5, "bytes": [104, 105], "top_logprobs": [{"token": "hi", "logprob": -0.5}]}
    ]
    chunk = chat("hi", finish="stop")
    chunk["choices"][0]["logprobs"] = {"content": content}
    server.answer = lambda path, body: [chunk, "[DONE]"]
    backend = await start()
    answers = await ask(backend, GenerateRequest(prompt=HI, output=OutputOptions(logprobs=1)))
    (entry,) = answers.choices[0].logprobs
    assert (entry.token, entry.token_bytes, entry.logprob, len(entry.top)) == ("hi", b"hi", -0.5, 1)
    assert (server.bodies[0]["logprobs"], server.bodies[0]["top_logprobs"]) == (True, 1)
    lists = {
        "tokens": ["h", "i"],
        "token_logprobs": [-1.0, -2.0],
        "top_logprobs": [{"x": -3.0, "h": -1.0}, {"i": -2.0}],
    }
    choice = {"index": 0, "text": "hi", "logprobs": lists, "finish_reason": "stop"}
    server.answer = lambda path, body: [{"choices": [choice]}, "[DONE]"]
    answers = await ask(backend, GenerateRequest(prompt=TextPrompt("x"), output=OutputOptions(logprobs=2)))
    assert [(e.token, e.logprob) for e in answers.choices[0].logprobs] == [("h", -1.0), ("i", -2.0)]
    assert [top.token for top in answers.choices[0].logprobs[0].top] == ["h", "x"]
    assert server.bodies[1]["logprobs"] == 2


@pytest.mark.parametrize(("status", "error"), [(429, QueueFull), (503, WorkerUnavailable)])
async def test_the_servers_wish_for_a_pause_is_passed_on(
    start: Start, server: UpstreamServer, status: int, error: type[QueueFull | WorkerUnavailable]
) -> None:
    backend = await start()
    for said in ("7", "7.0", formatdate(time() + 8, usegmt=True)):
        server.answer = lambda path, body, said=said: Refusal(status, {}, {"Retry-After": said})  # type: ignore[misc]
        with pytest.raises(error) as raised:
            await ask(backend, CHAT)
        assert raised.value.retry_after_s == pytest.approx(7, abs=1.5)


async def test_a_connection_that_was_closed_while_idle_is_replaced_silently(
    start: Start, server: UpstreamServer
) -> None:
    server.hang_up_after_answer = True
    backend = await start()
    for _ in range(3):
        assert one(await ask(backend, CHAT)) == ("hi", FinishReason.STOP)
    assert len(server.bodies) == 3
    assert server.connections >= 3


async def test_tools_need_no_dialect(start: Start, server: UpstreamServer) -> None:
    """The OpenAI API asks for special tokens to be kept where there are tools, to find calls in the text."""
    body = {
        "model": "served",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "reasoning_effort": "low",
    }
    backend = await start()
    model = served(backend)
    asked = parse_chat(body, [model]).generations[0]
    await ask(backend, asked)
    assert server.bodies[0]["tools"][0]["function"]["name"] == "f"
    assert server.bodies[0]["reasoning_effort"] == "low"
    plain = GenerateRequest(prompt=HI, output=OutputOptions(keep_special_tokens=True))
    with pytest.raises(UnsupportedField, match="keep_special_tokens"):
        await ask(backend, plain)


async def test_a_refused_prompt_is_not_shown_first(start: Start, server: UpstreamServer) -> None:
    backend = await start()
    shown = GenerateRequest(prompt=TextPrompt("hi"), output=OutputOptions(echo=True))
    server.answer = lambda path, body: Refusal(503, {})
    seen = []
    with pytest.raises(WorkerUnavailable):
        async for event in backend.generate(shown):
            seen.append(event)
    assert seen == []  # so that it can be tried elsewhere
    server.answer = lambda path, body: [{"choices": [{"index": 0, "text": "!", "finish_reason": "stop"}]}, "[DONE]"]
    events = [event async for event in backend.generate(shown)]
    assert isinstance(events[0], PromptEcho)


CLOSED = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "dialect", "strict"),
    [(CLOSED, "openai", True), ({"type": "object"}, "openai", None), ({"type": "object"}, "vllm", True)],
)
async def test_a_schema_is_strict_where_the_server_can_take_it_so(
    start: Start, server: UpstreamServer, schema: dict[str, Any], dialect: str, strict: bool | None
) -> None:
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    await ask(await start(dialect=dialect), GenerateRequest(prompt=HI, grammar=grammar))
    assert server.bodies[0]["response_format"]["json_schema"].get("strict") is strict
