"""The SGLang backend against a stand-in of SGLang's interface."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest

from fastchat_grpc.backends.sglang import backend as sglang
from fastchat_grpc.backends.sglang.backend import SglangBackend
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import (
    Capability,
    ChatMessage,
    ChatPrompt,
    Delta,
    EmbedRequest,
    FinishReason,
    Grammar,
    GrammarKind,
    PromptEcho,
    ResumedChoice,
    TokenPrompt,
)
from fastchat_grpc.errors import (
    AdapterNotFound,
    ConfigError,
    InvalidArgument,
    ModelLoadError,
    NotSupported,
    PromptTooLong,
    UnsupportedField,
    WorkerUnavailable,
)
from tests.unit.backends import sglang_stand_in
from tests.unit.backends.asking import ask, request
from tests.unit.backends.folders import EOS

Start = Callable[..., Awaitable[SglangBackend]]


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> AsyncIterator[Start]:
    """Starts backends over the stand-in; arguments: options, and fields of ModelConfig."""
    sglang_stand_in.install(monkeypatch)
    async with AsyncExitStack() as stack:

        async def start(options: dict[str, str] | None = None, **model: Any) -> SglangBackend:
            settings = ModelConfig(**{"path": str(model_folder), "names": ("tested",), **model})
            backend = sglang.create(BackendConfig(name="sglang", model=settings, options=options or {}))
            stack.push_async_callback(backend.close)
            await backend.start()
            return backend

        yield start


def engine() -> sglang_stand_in.Engine:
    return sglang_stand_in.ENGINES[-1]


async def test_tokens_become_text_and_end_with_eos(start: Start) -> None:
    backend = await start()
    answers = await ask(backend, request("héllo"))
    assert answers.text == "héllo"
    assert answers.choices[0].token_ids == [*"héllo".encode(), EOS]
    assert answers.completion.finish_reason is FinishReason.STOP
    assert answers.completion.matched is None
    assert answers.completion.usage.prompt_tokens == 6
    assert answers.completion.usage.completion_tokens == 7
    assert answers.completion.usage.cached_tokens == 1


async def test_a_stop_string_ends_the_request_in_the_engine_too(start: Start) -> None:
    backend = await start()
    answers = await ask(backend, request("slow one two three", stop=("two",), max_new_tokens=60))
    assert answers.text == "slow one "
    assert answers.completion.matched == "two"
    assert engine().tokenizer_manager.aborted == [engine().requests[0]["rid"]]


async def test_length_and_stop_tokens_are_told_apart(start: Start) -> None:
    backend = await start()
    cut = await ask(backend, request("abcdef", max_new_tokens=3))
    assert (cut.text, cut.completion.finish_reason) == ("abc", FinishReason.LENGTH)
    stopped = await ask(backend, request("abcdef", stop_token_ids=(ord("c"),)))
    assert (stopped.text, stopped.completion.matched) == ("ab", ord("c"))
    assert engine().tokenizer_manager.aborted == []


async def test_every_sampling_field_reaches_the_engine(start: Start) -> None:
    backend = await start({"enable_deterministic_inference": "true"})
    await ask(
        backend,
        request(
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            min_p=0.1,
            repetition_penalty=1.2,
            presence_penalty=0.3,
            frequency_penalty=-0.4,
            logit_bias={5: 2.0},
            seed=11,
            min_new_tokens=2,
            stop_token_ids=(9,),
        ),
    )
    assert engine().requests[0]["sampling_params"] == {
        "max_new_tokens": 16,
        "min_new_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "stop_token_ids": [9, EOS],
        "ignore_eos": False,
        "logit_bias": {"5": 2.0},
        "sampling_seed": 11,
    }


async def test_choices_have_seeds_of_their_own(start: Start) -> None:
    backend = await start({"enable_deterministic_inference": "true"})
    await ask(backend, request(temperature=1.0, seed=5, n=3))
    seeds = [r["sampling_params"]["sampling_seed"] for r in engine().requests]
    assert {type(value) for value in engine().requests[0]["sampling_params"].values()} <= {bool, int, float, list}
    assert len(set(seeds)) == 3
    assert 5 in seeds


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"seed": 1, "temperature": 1.0}, "sampling.seed"),
        ({"repetition_penalty": 2.5}, "sampling.repetition_penalty"),
        ({"logprobs": 0, "presence_penalty": 1.0}, "output.logprobs"),
        ({"logprobs": 0, "logit_bias": {1: 1.0}}, "output.logprobs"),
        ({"grammar": Grammar(GrammarKind.LARK, "start: /a/")}, "structured_output.lark"),
        (
            {"presence_penalty": 1.0, "resume": (ResumedChoice(index=0, output_token_ids=(97,), text_length=1),)},
            "resume",
        ),
    ],
)
async def test_what_it_cannot_honour_it_refuses_by_name(start: Start, fields: dict[str, Any], path: str) -> None:
    backend = await start()
    with pytest.raises(UnsupportedField) as raised:
        await ask(backend, request(**fields))
    assert raised.value.field == path
    assert engine().requests == []


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        (Grammar(GrammarKind.JSON_OBJECT), {"json_schema": '{"type": "object"}'}),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "string"}'), {"json_schema": '{"type": "string"}'}),
        (Grammar(GrammarKind.REGEX, "a+"), {"regex": "a+"}),
    ],
)
async def test_grammars_are_passed_on(start: Start, grammar: Grammar, expected: dict[str, str]) -> None:
    backend = await start()
    await ask(backend, request(grammar=grammar))
    assert expected.items() <= engine().requests[0]["sampling_params"].items()


async def test_log_probabilities_of_output_and_prompt(start: Start) -> None:
    backend = await start()
    answers = await ask(backend, request("abc", logprobs=2, prompt_logprobs=1, n=2))
    assert isinstance(answers.events[0], PromptEcho)
    assert [entry.logprob for entry in answers.events[0].logprobs] == [None, -1.0, -1.0]
    assert [len(entry.top) for entry in answers.events[0].logprobs] == [0, 1, 1]
    for choice in answers.choices.values():
        assert [entry.token_id for entry in choice.logprobs] == choice.token_ids
        assert choice.logprobs[0].logprob == pytest.approx(math.log(0.5))
        assert [other.token_id for other in choice.logprobs[0].top] == [0, 1]
    assert [r["logprob_start_len"] for r in engine().requests] == [0, -1]


async def test_closing_a_stream_aborts_it_in_the_engine(start: Start) -> None:
    backend = await start()
    asked = request("slow", ignore_eos=True, max_new_tokens=100)
    async with asyncio.timeout(5), aclosing(backend.generate(asked)) as events:
        assert isinstance(await anext(events), Delta)
    manager = engine().tokenizer_manager
    assert manager.running == set()
    assert manager.aborted == [engine().requests[0]["rid"]]


async def test_a_prompt_that_does_not_fit_is_refused_before_the_engine_sees_it(start: Start) -> None:
    backend = await start(context_length=8)
    with pytest.raises(PromptTooLong):
        await ask(backend, request("12345678"))
    with pytest.raises(InvalidArgument, match="vocabulary"):
        await ask(backend, request(whole_prompt=TokenPrompt((5, 99999))))
    assert engine().requests == []


async def test_refusals_and_losses_of_the_engine_have_their_own_errors(start: Start) -> None:
    backend = await start()
    with pytest.raises(InvalidArgument, match="bad schema"):
        await ask(backend, request("refuse"))
    with pytest.raises(InvalidArgument, match=r"structured_output\.regex"):
        await ask(backend, request("grammar", grammar=Grammar(GrammarKind.REGEX, r"[^\s\S]")))
    with pytest.raises(WorkerUnavailable):
        await ask(backend, request("lose"))


async def test_a_resumed_choice_goes_on_from_its_tokens(start: Start) -> None:
    backend = await start()
    resume = (ResumedChoice(index=0, output_token_ids=tuple(b"ab"), text_length=1),)
    answers = await ask(backend, request("abcd", resume=resume, max_new_tokens=4))
    assert engine().requests[0]["input_ids"] == list(b"abcdab")
    assert engine().requests[0]["sampling_params"]["max_new_tokens"] == 2
    assert answers.text == "bab"
    assert answers.completion.usage.completion_tokens == 4


async def test_adapters_are_models_and_are_named_to_the_engine(start: Start, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    backend = await start(lora_adapters={"poet": str(tmp_path)})
    assert engine().settings["lora_paths"] == {"poet": str(tmp_path)}
    await ask(backend, request(lora_adapter="poet"))
    await ask(backend, request(model="poet"))
    await ask(backend, request(model="tested"))
    assert [r["lora_path"] for r in engine().requests] == ["poet", "poet", None]
    with pytest.raises(AdapterNotFound):
        await ask(backend, request(lora_adapter="painter"))


async def test_an_embedding_model_embeds_and_does_not_generate(start: Start) -> None:
    backend = await start({"is_embedding": "true"})
    result = await backend.embed(EmbedRequest(inputs=("abc", tuple(b"hello"))))
    assert [vector[0] for vector in result.embeddings] == [3.0, 5.0]
    assert result.prompt_tokens == 8
    with pytest.raises(UnsupportedField):
        await backend.embed(EmbedRequest(inputs=("abc",), normalize=False))
    with pytest.raises(NotSupported):
        await ask(backend, request())


async def test_a_generating_model_has_no_embeddings(start: Start) -> None:
    backend = await start()
    with pytest.raises(NotSupported):
        await backend.embed(EmbedRequest(inputs=("abc",)))


async def test_the_worker_keeps_its_signal_handlers(start: Start) -> None:
    loop, calls = asyncio.get_running_loop(), []
    loop.add_signal_handler(signal.SIGTERM, lambda: calls.append("ours"))
    try:
        backend = await start()
        await ask(backend, request())
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            while not calls:
                await asyncio.sleep(0.01)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
    assert calls == ["ours"]


async def test_closing_while_busy_ends_what_runs(start: Start) -> None:
    backend = await start()
    events = backend.generate(request("slow", ignore_eos=True, max_new_tokens=100))
    await anext(events)
    await backend.close()
    with pytest.raises(WorkerUnavailable):
        async for _ in events:
            pass
    assert engine().shut_down == 1
    await backend.close()
    with pytest.raises(WorkerUnavailable):
        await ask(backend, request())


async def test_options_are_read_as_the_engine_reads_them(start: Start) -> None:
    await start({"mem-fraction-static": "0.5", "attention_backend": "triton"}, num_gpus=2, dtype="bfloat16", seed=3)
    settings = engine().settings
    assert settings["mem_fraction_static"] == 0.5
    assert settings["attention_backend"] == "triton"
    assert (settings["tp_size"], settings["dtype"], settings["random_seed"]) == (2, "bfloat16", 3)
    assert settings["max_running_requests"] == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_such": "1"}, "no option 'no_such'"),
        ({"tp_size": "2"}, "--num-gpus"),
        ({"log_requests": "true"}, "prompts"),
        ({"mem_fraction_static": "many"}, "mem-fraction-static"),
    ],
)
async def test_wrong_options_are_one_line(start: Start, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        await start(options)
    assert "\n" not in str(raised.value)


async def test_settings_that_mean_nothing_here_are_refused(start: Start) -> None:
    with pytest.raises(ConfigError, match="--load-8bit"):
        await start(load_8bit=True)


async def test_a_model_that_does_not_load_is_one_line(start: Start, model_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.symlink_to(model_folder)
    with pytest.raises(ModelLoadError, match=r"no such weights$"):
        await start(path=str(broken))


async def test_it_says_what_it_serves(start: Start) -> None:
    backend = await start(context_length=64)
    (info,) = backend._served.infos()
    assert (info.name, info.context_length, info.backend) == ("tested", 64, "sglang")
    assert {Capability.GENERATE, Capability.CHAT, Capability.LOGPROBS} <= info.capabilities
    chat = ChatPrompt(messages=(ChatMessage(role="user", content="hi"),))
    assert await backend.detokenize("tested", await backend.tokenize("tested", chat)) == "user: hi\nassistant: "
