"""The upstream backend against a server that refuses, fails, and goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("httpx2")

from fastchat_grpc.backends import registry
from fastchat_grpc.backends.base import Backend
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import (
    ChatMessage,
    ChatPrompt,
    Completion,
    Delta,
    GenerateRequest,
    Grammar,
    GrammarKind,
    StopConditions,
    TextPrompt,
    Tool,
    ToolChoice,
)
from fastchat_grpc.errors import (
    BackendFailed,
    ConfigError,
    FastChatError,
    InvalidArgument,
    ModelLoadError,
    ModelNotFound,
    NotSupported,
    QueueFull,
    UnsupportedField,
    WorkerUnavailable,
)
from tests.conformance.openai_server import KEY, OpenAIServer, openai_server


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCHAT_GRPC_UPSTREAM_API_KEY", KEY)


@asynccontextmanager
async def upstream(url: str, settings: dict[str, Any] | None = None, **options: str) -> AsyncIterator[Backend]:
    """A started backend of the server at `url`."""
    model = ModelConfig(path="served", **(settings or {}))
    backend = registry.create(BackendConfig(name="upstream", model=model, options={"url": url, **options}))
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()


async def text(backend: Backend, request: GenerateRequest) -> str:
    async with aclosing(backend.generate(request)) as events:
        return "".join([event.text async for event in events if isinstance(event, Delta)])


HELLO = GenerateRequest(prompt=TextPrompt("hello"), stopping=StopConditions(max_new_tokens=5))


async def eventually_idle(server: OpenAIServer) -> None:
    async with asyncio.timeout(5):
        while server.running:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, InvalidArgument),
        (401, BackendFailed),
        (404, ModelNotFound),
        (429, QueueFull),
        (500, BackendFailed),
        (503, WorkerUnavailable),
    ],
)
async def test_answers_of_the_server_become_domain_errors(status: int, expected: type[FastChatError]) -> None:
    async with openai_server() as (server, url), upstream(url) as backend:
        server.failures.append((status, json.dumps({"error": {"message": "no", "param": "top_p"}}).encode()))
        with pytest.raises(expected):
            await text(backend, HELLO)
        assert await text(backend, HELLO) == "hello"  # the next request is served


async def test_a_refused_field_is_named_in_the_words_of_the_contract() -> None:
    async with openai_server() as (server, url), upstream(url) as backend:
        server.failures.append((400, b'{"error": {"message": "top_p: too hot", "param": "top_p"}}'))
        with pytest.raises(InvalidArgument) as refused:
            await text(backend, HELLO)
        assert refused.value.field == "sampling.top_p"
        assert refused.value.description == "refused by the upstream server: too hot"


@pytest.mark.parametrize("in_band", [False, True])
async def test_a_grammar_at_which_vllm_gives_up_is_the_callers_error(in_band: bool) -> None:
    """vLLM's answer to a regular expression that its check has passed and its engine cannot compile."""
    error = json.dumps({"error": {"message": "Internal server error", "type": "InternalServerError", "code": 500}})
    answer = (200, f"data: {error}\n\n".encode()) if in_band else (500, error.encode())
    asked = replace(HELLO, grammar=Grammar(GrammarKind.REGEX, r"[^\s\S]"))
    async with openai_server() as (server, url), upstream(url, dialect="vllm") as backend:
        server.failures.append(answer)
        with pytest.raises(InvalidArgument) as refused:
            await text(backend, asked)
        assert refused.value.field == "structured_output.regex"
        server.failures.append(answer)
        with pytest.raises(BackendFailed):
            await text(backend, HELLO)
        server.failures.append((500, b'{"error": {"message": "EngineCore encountered an issue."}}'))
        with pytest.raises(BackendFailed):
            await text(backend, asked)


async def test_a_server_that_breaks_off_is_unavailable_and_not_an_end() -> None:
    async with openai_server() as (server, url), upstream(url) as backend:
        server.cut_after = 1
        with pytest.raises(WorkerUnavailable):
            await text(backend, HELLO)


async def test_a_client_that_leaves_frees_the_server() -> None:
    async with openai_server(delay_ms="20") as (server, url), upstream(url) as backend:
        request = GenerateRequest(prompt=TextPrompt("x" * 100), stopping=StopConditions(max_new_tokens=400))
        async with aclosing(backend.generate(request)) as events:
            async for _ in events:
                assert server.running == 1
                break
        await eventually_idle(server)


async def test_a_server_that_is_gone_is_unavailable() -> None:
    async with openai_server() as (_, url):
        pass
    with pytest.raises(ModelLoadError, match="no server answers"):
        async with upstream(url):
            pass


async def test_a_wrong_key_is_said_at_the_start_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCHAT_GRPC_UPSTREAM_API_KEY", "secret-but-wrong")
    async with openai_server() as (_, url):
        with pytest.raises(ModelLoadError, match="HTTP 401") as failed:
            async with upstream(url):
                pass
        assert "secret" not in str(failed.value)


async def test_a_model_that_the_server_lacks_is_named_with_those_it_has() -> None:
    async with openai_server() as (_, url):
        with pytest.raises(ModelLoadError, match="no model other; it has served"):
            async with upstream(url, model="other"):
                pass


async def test_models_can_be_served_under_other_names_and_adapters_are_models_of_the_server() -> None:
    settings = {"names": ("ours", "also"), "lora_adapters": {"tuned": "served"}}
    async with openai_server() as (server, url), upstream(url, settings) as backend:
        assert await text(backend, GenerateRequest(prompt=TextPrompt("hi"), model="also")) == "hi"
        assert await text(backend, GenerateRequest(prompt=TextPrompt("hi"), lora_adapter="tuned")) == "hi"
        assert [body["model"] for body in server.bodies] == ["served", "served"]


async def test_the_plain_dialect_sends_no_field_that_openai_does_not_know() -> None:
    async with openai_server() as (server, url), upstream(url) as backend:
        await text(backend, HELLO)
        known = {"model", "prompt", "stream", "stream_options", "max_tokens"}
        assert set(server.bodies[0]) == known
        assert server.bodies[0]["stream_options"] == {"include_usage": True}
        with pytest.raises(UnsupportedField, match=r"stopping\.include_stop"):
            stopping = StopConditions(stop=("l",), include_stop=True)
            await text(backend, GenerateRequest(prompt=TextPrompt("hello"), stopping=stopping))
        with pytest.raises(NotSupported):
            await backend.tokenize("served", TextPrompt("hello"))


CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris", "days": [1, 2]}}</tool_call>'
WEATHER = Tool(name="weather", description="Tells the weather", parameters_json='{"type": "object"}')


def asks_for_tools(content: str, **fields: Any) -> GenerateRequest:
    chat = ChatPrompt(messages=(ChatMessage(role="user", content=content),), tools=(WEATHER,), **fields)
    return GenerateRequest(prompt=chat)


@pytest.mark.parametrize("said", [CALL, CALL + CALL.replace("Paris", "Rome"), "no call"])
async def test_calls_that_the_server_finds_come_back_as_text(said: str) -> None:
    """The server, an echo, writes the text of calls; its API takes it apart, and the backend puts it together."""
    async with openai_server() as (server, url), upstream(url) as backend:
        assert await text(backend, asks_for_tools(said)) == said
    function = {"name": "weather", "description": "Tells the weather", "parameters": {"type": "object"}}
    assert server.bodies[0]["tools"] == [{"type": "function", "function": function}]
    assert server.bodies[0]["tool_choice"] == "auto"


async def test_a_choice_of_tool_reaches_the_server() -> None:
    async with openai_server() as (server, url), upstream(url) as backend:
        for choice in (ToolChoice.NONE, ToolChoice.REQUIRED, "weather"):
            with suppress(InvalidArgument):  # an echo follows no grammar, which a forced call needs
                await text(backend, asks_for_tools("hi", tool_choice=choice))
    sent = [body.get("tool_choice") for body in server.bodies]
    assert sent == [None, "required", {"type": "function", "function": {"name": "weather"}}]


async def test_usage_is_exact_for_each_choice() -> None:
    from fastchat_grpc.core import OutputOptions

    request = GenerateRequest(prompt=TextPrompt("hello"), output=OutputOptions(n=3))
    async with openai_server() as (_, url), upstream(url) as backend, aclosing(backend.generate(request)) as events:
        ends = [event async for event in events if isinstance(event, Completion)]
    assert sorted(end.index for end in ends) == [0, 1, 2]
    assert {(end.usage.prompt_tokens, end.usage.completion_tokens) for end in ends} == {(5, 6)}  # and the end token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "url="),
        ({"url": "ftp://x"}, "url="),
        ({"url": "http://x/v1", "dialect": "french"}, "dialect"),
        ({"url": "http://x/v1", "api_key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE"),
        ({"url": "http://x/v1", "timeout_s": "-1"}, "timeout_s"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.create(BackendConfig(name="upstream", model=ModelConfig(path="m"), options=options))


@pytest.mark.parametrize(
    ("message", "tokens", "context"),
    [
        ("the prompt has 900 tokens, but the context of 512 tokens must hold the prompt", 900, 512),
        (
            "This model's maximum context length is 2048 tokens. However, there are 3000 input tokens.",
            3000,
            2048,
        ),
        (
            "This model's maximum context length is 4097 tokens. However, you requested 5000 tokens "
            "(4900 in the messages, 100 in the completion).",
            4900,
            4097,
        ),
        ("the request (5000 tokens) exceeds the available context size (4096 tokens)", 5000, 4096),
    ],
)
def test_prompts_that_are_too_long_are_known_by_the_words_of_several_servers(
    message: str, tokens: int, context: int
) -> None:
    from fastchat_grpc.backends.upstream.http import to_error
    from fastchat_grpc.errors import PromptTooLong

    error = to_error(400, json.dumps({"error": {"message": message}}).encode(), {})
    assert isinstance(error, PromptTooLong)
    assert (error.token_count, error.context_length) == (tokens, context)
