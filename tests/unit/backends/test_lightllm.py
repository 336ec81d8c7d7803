"""The LightLLM backend against a stand-in of LightLLM's server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from fastchat_grpc.backends.lightllm import backend as lightllm
from fastchat_grpc.backends.lightllm.backend import LightllmBackend
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import Capability, EmbedRequest, FinishReason, Grammar, GrammarKind, ResumedChoice
from fastchat_grpc.errors import (
    ConfigError,
    InvalidArgument,
    ModelLoadError,
    NotSupported,
    PromptTooLong,
    UnsupportedField,
    WorkerUnavailable,
)
from tests.unit.backends.asking import ask, request
from tests.unit.backends.folders import EOS
from tests.unit.backends.lightllm_stand_in import LightllmServer, lightllm_server

pytest.importorskip("httpx2")


def make(folder: Path, url: str, options: dict[str, str] | None = None, **model: Any) -> LightllmBackend:
    settings = ModelConfig(path=str(folder), names=("tested",), **model)
    return lightllm.create(BackendConfig(name="lightllm", model=settings, options={"url": url, **(options or {})}))


@pytest.fixture
async def server() -> AsyncIterator[LightllmServer]:
    async with lightllm_server() as server:
        yield server


@pytest.fixture
async def backend(server: LightllmServer, model_folder: Path) -> AsyncIterator[LightllmBackend]:
    backend = make(model_folder, server.url)
    await backend.start()
    yield backend
    await backend.close()


async def test_tokens_become_text_and_end_with_eos(backend: LightllmBackend) -> None:
    answers = await ask(backend, request("héllo"))
    assert answers.text == "héllo"
    assert answers.choices[0].token_ids == [*"héllo".encode(), EOS]
    assert answers.completion.finish_reason is FinishReason.STOP
    assert answers.completion.usage.completion_tokens == 7


async def test_length_stop_tokens_and_stop_strings(backend: LightllmBackend) -> None:
    cut = await ask(backend, request("abcdef", max_new_tokens=3))
    assert (cut.text, cut.completion.finish_reason) == ("abc", FinishReason.LENGTH)
    by_token = await ask(backend, request("abcdef", stop_token_ids=(ord("c"),)))
    assert (by_token.text, by_token.completion.matched) == ("ab", ord("c"))
    by_text = await ask(backend, request("abcdef", stop=("de",)))
    assert (by_text.text, by_text.completion.matched) == ("abc", "de")


async def test_every_sampling_field_reaches_the_server(backend: LightllmBackend, server: LightllmServer) -> None:
    await ask(backend, request(temperature=0.5, top_p=0.9, top_k=7, repetition_penalty=1.2, min_new_tokens=2))
    assert server.requests[0] == {
        "inputs": list(b"abc"),
        "parameters": {
            "do_sample": True,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "repetition_penalty": 1.2,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "input_penalty": True,
            "max_new_tokens": 16,
            "min_new_tokens": 3,
            "ignore_eos": False,
            "add_special_tokens": False,
            "skip_special_tokens": False,
        },
    }


async def test_penalties_of_the_output_do_not_count_the_prompt(
    backend: LightllmBackend, server: LightllmServer
) -> None:
    await ask(backend, request(presence_penalty=0.5, frequency_penalty=0.25))
    sent = server.requests[0]["parameters"]
    assert (sent["presence_penalty"], sent["frequency_penalty"], sent["input_penalty"]) == (0.5, 0.25, False)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"seed": 1}, "sampling.seed"),
        ({"temperature": 1.0, "min_p": 0.1}, "sampling.min_p"),
        ({"logit_bias": {1: 1.0}}, "sampling.logit_bias"),
        ({"presence_penalty": -1.0}, "sampling.presence_penalty"),
        ({"frequency_penalty": 1.0, "repetition_penalty": 1.1}, "sampling.repetition_penalty"),
        ({"logprobs": 1}, "output.logprobs"),
        ({"logprobs": 0, "temperature": 0.7}, "output.logprobs"),
        ({"prompt_logprobs": 0}, "output.prompt_logprobs"),
        ({"repetition_penalty": 0.9}, "sampling.repetition_penalty"),
        ({"grammar": Grammar(GrammarKind.REGEX, "a")}, "structured_output.regex"),
    ],
)
async def test_what_it_cannot_honour_it_refuses_by_name(
    backend: LightllmBackend, server: LightllmServer, fields: dict[str, Any], path: str
) -> None:
    with pytest.raises(UnsupportedField) as raised:
        await ask(backend, request(**fields))
    assert raised.value.field == path
    assert server.requests == []


@pytest.mark.parametrize(
    ("mode", "grammar", "sent"),
    [
        ("outlines", Grammar(GrammarKind.REGEX, "a|b"), {"regular_constraint": "a|b"}),
        ("xgrammar", Grammar(GrammarKind.JSON_SCHEMA, "{}"), {"guided_json": "{}"}),
        ("xgrammar", Grammar(GrammarKind.JSON_OBJECT), {"guided_json": '{"type": "object"}'}),
        ("outlines", Grammar(GrammarKind.JSON_OBJECT), None),
        ("xgrammar", Grammar(GrammarKind.LARK, 'start: "a"'), None),
    ],
)
async def test_grammars_reach_a_server_that_was_started_for_them(
    server: LightllmServer, model_folder: Path, mode: str, grammar: Grammar, sent: dict[str, str] | None
) -> None:
    backend = make(model_folder, server.url, {"constraints": mode})
    (model,) = await backend.start()
    try:
        assert (Capability.STRUCTURED_OUTPUT in model.capabilities) == (mode == "xgrammar")
        if sent is None:
            with pytest.raises(UnsupportedField, match="structured_output"):
                await ask(backend, request(grammar=grammar))
        else:
            await ask(backend, request(grammar=grammar))
            assert sent.items() <= server.requests[0]["parameters"].items()
    finally:
        await backend.close()


async def test_log_probabilities_of_the_chosen_tokens(backend: LightllmBackend) -> None:
    answers = await ask(backend, request("abc", logprobs=0))
    assert [entry.token_id for entry in answers.choices[0].logprobs] == answers.choices[0].token_ids
    assert answers.choices[0].logprobs[0].logprob == pytest.approx(math.log(0.5))


async def test_each_choice_is_a_stream_and_the_prompt_is_shown_once(
    backend: LightllmBackend, server: LightllmServer
) -> None:
    answers = await ask(backend, request("abc", n=3, echo=True))
    assert answers.echo is not None
    assert answers.echo.text == "abc"
    assert [choice.text for choice in answers.choices.values()] == ["abc"] * 3
    assert len(server.requests) == 3


async def test_closing_a_stream_closes_its_connection(backend: LightllmBackend, server: LightllmServer) -> None:
    async with aclosing(backend.generate(request("slow", ignore_eos=True, max_new_tokens=100))) as events:
        await anext(events)
    async with asyncio.timeout(1):
        await server.aborted.wait()


async def test_a_resumed_choice_goes_on_from_its_tokens(backend: LightllmBackend, server: LightllmServer) -> None:
    resume = (ResumedChoice(index=0, output_token_ids=tuple(b"ab"), text_length=2),)
    await ask(backend, request("abcd", resume=resume, max_new_tokens=4))
    assert server.requests[0]["inputs"] == list(b"abcdab")
    assert server.requests[0]["parameters"]["max_new_tokens"] == 2


async def test_a_prompt_that_does_not_fit_is_refused_here(backend: LightllmBackend, server: LightllmServer) -> None:
    with pytest.raises(PromptTooLong):
        await ask(backend, request("x" * 200))
    assert server.requests == []


async def test_a_refusal_of_the_server_is_the_callers(model_folder: Path) -> None:
    async with lightllm_server(max_req_total_len=10) as server:
        backend = make(model_folder, server.url)
        await backend.start()
        with pytest.raises(InvalidArgument, match="max_new_tokens > 10"):
            await ask(backend, request("abcdef", max_new_tokens=16))
        await backend.close()


async def test_a_server_lost_in_the_middle_is_unavailable(backend: LightllmBackend) -> None:
    with pytest.raises(WorkerUnavailable):
        await ask(backend, request("lose"))


async def test_closing_while_busy_ends_what_runs(backend: LightllmBackend) -> None:
    events = backend.generate(request("slow", ignore_eos=True, max_new_tokens=100))
    await anext(events)
    await backend.close()
    with pytest.raises(WorkerUnavailable):
        async for _ in events:
            pass
    await backend.close()


async def test_there_are_no_embeddings(backend: LightllmBackend) -> None:
    with pytest.raises(NotSupported):
        await backend.embed(EmbedRequest(inputs=("abc",)))


async def test_a_missing_or_sick_server_is_one_line(server: LightllmServer, model_folder: Path) -> None:
    server.healthy = False
    sick = make(model_folder, server.url)
    with pytest.raises(ModelLoadError, match="not healthy"):
        await sick.start()
    await sick.close()
    missing = make(model_folder, "http://127.0.0.1:1")
    with pytest.raises(ModelLoadError, match="no LightLLM server answers"):
        await missing.start()
    await missing.close()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_a_wrong_url_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="url"):
        make(tmp_path, url)
