"""The Transformers backend on tiny models that the tests make: every kind of model serves a request."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastchat_grpc.backends.transformers.backend import TransformersBackend, create
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import (
    Capability,
    ChatMessage,
    ChatPrompt,
    Completion,
    Delta,
    EmbedRequest,
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
from tests.unit.engine.tiny import SMALL, greedy_by_generate, save_tiny

GREEDY = SamplingParams(temperature=0)
TEN = StopConditions(max_new_tokens=10, ignore_eos=True)


@asynccontextmanager
async def running(path: Path, options: dict[str, str] | None = None, **model: Any) -> AsyncIterator[tuple[Any, Any]]:
    backend = create(BackendConfig(model=ModelConfig(path=str(path), **model), options=options or {}))
    try:
        yield backend, await backend.start()
    finally:
        await backend.close()


async def generate(backend: TransformersBackend, request: GenerateRequest) -> list[Any]:
    return [event async for event in backend.generate(request)]


def tokens(events: list[Any], index: int = 0) -> list[int]:
    return [t for e in events if isinstance(e, Delta) and e.index == index for t in e.token_ids]


def text(events: list[Any]) -> str:
    return "".join(e.text for e in events if isinstance(e, Delta))


def ask(words: str, **more: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": TextPrompt(words or "-"), "sampling": GREEDY, "stopping": TEN, **more})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, save_tiny(folder)


async def test_a_decoder_says_what_it_is_and_answers_as_generate_does(llama: tuple[Path, Any]) -> None:
    folder, model = llama
    async with running(folder, names=("tiny", "alias")) as (backend, infos):
        assert [info.name for info in infos] == ["tiny", "alias"]
        assert isinstance(infos[0], ModelInfo)
        assert infos[0].context_length == 512
        assert {Capability.GENERATE, Capability.CHAT, Capability.EMBED, Capability.LOGPROBS} <= infos[0].capabilities
        prompt = await backend.tokenize("tiny", TextPrompt("Hello, world"))
        events = await generate(backend, ask("Hello, world", output=OutputOptions(keep_special_tokens=True)))
        assert tokens(events) == greedy_by_generate(model, list(prompt), 10)
        assert text(events) == await backend.detokenize("tiny", tokens(events))
        assert events[-1].finish_reason is FinishReason.LENGTH
        assert events[-1].usage.prompt_tokens == 12
        assert backend.load().processed_tokens == 12 + 9


async def test_chat_goes_through_the_template(llama: tuple[Path, Any]) -> None:
    async with running(llama[0]) as (backend, _):
        chat = ChatPrompt(messages=(ChatMessage(role="user", content="hi"),))
        events = await generate(backend, ask("", prompt=chat, output=OutputOptions(echo=True)))
        assert isinstance(events[0], PromptEcho)
        assert events[0].text == "<user>hi<assistant>"
        assert "messages" in backend.chat_template("any")


async def test_what_does_not_fit_or_makes_no_sense_is_refused_by_field_before_the_first_event(
    llama: tuple[Path, Any], tmp_path: Path
) -> None:
    save_tiny(tmp_path, chat=False)
    async with running(tmp_path, context_length=64) as (backend, infos):
        assert Capability.CHAT not in infos[0].capabilities
        wrong: list[tuple[GenerateRequest, type[Exception]]] = [
            (ask("x" * 64), PromptTooLong),
            (ask("", prompt=ChatPrompt(messages=(ChatMessage(role="user", content="hi"),))), InvalidArgument),
            (ask("", prompt=TokenPrompt((300,))), InvalidArgument),
            (ask("x", sampling=SamplingParams(logit_bias={300: 1.0})), InvalidArgument),
            (ask("x", lora_adapter="none"), AdapterNotFound),
            (ask("x", grammar=Grammar(GrammarKind.JSON_OBJECT)), UnsupportedField),
        ]
        for request, error in wrong:
            with pytest.raises(error):
                await generate(backend, request)
        events = await generate(backend, ask("x" * 63))
        assert len(tokens(events)) == 1
        assert events[-1].finish_reason is FinishReason.LENGTH
        events = await generate(backend, ask("x" * 80, truncate_prompt_tokens=20))
        assert events[-1].usage.prompt_tokens == 20


async def test_closing_the_generator_frees_the_request(llama: tuple[Path, Any]) -> None:
    async with running(llama[0]) as (backend, _):
        events = backend.generate(ask("hello", stopping=StopConditions(max_new_tokens=400, ignore_eos=True)))
        await anext(events)
        assert (backend.load().kv_cache_usage or 0.0) > 0
        await events.aclose()
        await until(lambda: backend.load().kv_cache_usage == 0)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_consumer_that_does_not_read_holds_nobody_up_and_gets_everything_at_once(
    llama: tuple[Path, Any],
) -> None:
    async with running(llama[0]) as (backend, _):
        long = StopConditions(max_new_tokens=60, ignore_eos=True)
        slow = backend.generate(ask("hello", stopping=long))
        first = await anext(slow)
        await generate(backend, ask("hello again", stopping=long))
        await generate(backend, ask("and again", stopping=long))
        rest = [event async for event in slow]
        assert len(rest) <= 3
        assert len(tokens([first, *rest])) == 60


async def test_closing_the_backend_fails_what_runs_and_leaves_no_thread(llama: tuple[Path, Any]) -> None:
    before = set(threading.enumerate())
    async with running(llama[0]) as (backend, _):
        events = backend.generate(ask("hello", stopping=StopConditions(max_new_tokens=400, ignore_eos=True)))
        await anext(events)
        await backend.close()
        with pytest.raises(WorkerUnavailable):
            async for _event in events:
                pass
        with pytest.raises(WorkerUnavailable):
            await generate(backend, ask("hello"))
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "engine"]


async def test_a_closed_backend_gives_its_memory_back(llama: tuple[Path, Any]) -> None:
    async with running(llama[0]) as (backend, _):
        await generate(backend, ask("hello"))
        engine = backend._loaded.engine
        kept = [weakref.ref(x) for x in (engine._runner.model, engine, engine._runner._keys[0])]
        del backend, engine
    # The thread that closed it lets go of it in its own time.
    await until(lambda: gc.collect() >= 0 and not any(ref() is not None for ref in kept))


async def test_lora_adapters_serve_by_field_and_as_models_beside_their_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    base.mkdir()
    save_tiny(base)
    merged = {}
    for name in ("one", "two"):
        from transformers import AutoModelForCausalLM

        torch.manual_seed(len(name) + ord(name[0]))
        config = peft.LoraConfig(
            r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
        )
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(tmp_path / name)
        merged[name] = model.merge_and_unload().eval()
    merged[""] = AutoModelForCausalLM.from_pretrained(base)
    adapters = {name: str(tmp_path / name) for name in ("one", "two")}
    async with running(base, lora_adapters=adapters) as (backend, infos):
        assert [(info.name, info.base_model) for info in infos] == [("base", ""), ("one", "base"), ("two", "base")]
        prompt = list(await backend.tokenize("base", TextPrompt("Hello, world")))
        expected = {name: greedy_by_generate(model, prompt, 10) for name, model in merged.items()}
        assert len({tuple(t) for t in expected.values()}) == 3
        together = await asyncio.gather(
            *(generate(backend, ask("Hello, world", lora_adapter=name)) for name in ("one", "", "two", "one"))
        )
        assert [tokens(events) for events in together] == [expected[name] for name in ("one", "", "two", "one")]
        by_model = await generate(backend, ask("Hello, world", model="two"))
        assert tokens(by_model) == expected["two"]
        vectors = [(await backend.embed(EmbedRequest(inputs=("hello",), model=m))).embeddings for m in ("base", "one")]
        assert vectors[0] != vectors[1]


async def test_an_encoder_decoder_serves_and_says_what_it_cannot(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, T5Config

    torch.manual_seed(1)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, initializer_factor=3.0,
        **{**SMALL, "vocab_size": 258},
    )  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    save_tiny(tmp_path, model)
    async with running(tmp_path) as (backend, _):
        prompt = list(await backend.tokenize("t5", TextPrompt("translate this")))
        events = await asyncio.gather(*(generate(backend, ask("translate this")) for _ in range(3)))
        assert [tokens(e) for e in events] == [greedy_by_generate(model, prompt, 10)] * 3
        with pytest.raises(UnsupportedField):
            await generate(backend, ask("x", output=OutputOptions(prompt_logprobs=1)))


async def test_an_embedding_model_embeds_and_refuses_to_generate(tmp_path: Path) -> None:
    from transformers import AutoModel, BertConfig

    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = AutoModel.from_config(BertConfig(**shape, **{**SMALL, "vocab_size": 258})).eval()
    save_tiny(tmp_path, model, chat=False)
    async with running(tmp_path) as (backend, infos):
        assert infos[0].capabilities == {Capability.EMBED}
        assert infos[0].embedding_size == 32
        request = EmbedRequest(inputs=("hello", "a much longer text to embed", (1, 2, 3)))
        result = await backend.embed(request)
        assert result.prompt_tokens == 5 + 27 + 3
        alone = await backend.embed(EmbedRequest(inputs=request.inputs[:1]))
        assert result.embeddings[0] == pytest.approx(alone.embeddings[0], abs=1e-5)
        assert sum(x * x for x in result.embeddings[1]) == pytest.approx(1, abs=1e-4)
        with pytest.raises(PromptTooLong):
            await backend.embed(EmbedRequest(inputs=("x" * 2000,)))
        cut = await backend.embed(EmbedRequest(inputs=("x" * 2000,), truncate=True))
        assert cut.prompt_tokens == 512
        with pytest.raises(NotSupported):
            await generate(backend, ask("hello"))


async def test_a_cancelled_embedding_ends_and_the_backend_serves_on(llama: tuple[Path, Any]) -> None:
    async with running(llama[0]) as (backend, _):
        request = EmbedRequest(inputs=tuple("x" * 500 for _ in range(400)))
        task: asyncio.Task[Any] = asyncio.create_task(backend.embed(request))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(tokens(await generate(backend, ask("hello")))) == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threads": "many"}, "whole number"),
        ({"prefix_cache": "maybe"}, "on or off"),
        ({"kv_cache_tokens": "0"}, "at least 1"),
        ({"nonsense": "1"}, "no option"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        create(BackendConfig(model=ModelConfig(path="x"), options=options))


async def test_options_bound_the_cache_and_with_it_the_context(llama: tuple[Path, Any]) -> None:
    async with running(llama[0], {"kv_cache_tokens": "64", "prefill_tokens": "16"}) as (backend, infos):
        assert infos[0].context_length == 64
        with pytest.raises(PromptTooLong):
            await generate(backend, ask("x" * 64))
        events = await asyncio.gather(*(generate(backend, ask("x" * (20 + i))) for i in range(6)))
        assert all(len(tokens(e)) == 10 for e in events)


async def test_a_missing_model_is_an_error_that_start_raises(tmp_path: Path) -> None:
    backend = create(BackendConfig(model=ModelConfig(path=str(tmp_path / "nothing"))))
    with pytest.raises(ModelLoadError):
        await backend.start()
    await backend.close()


async def test_seeds_of_requests_without_one_follow_the_workers_seed(llama: tuple[Path, Any]) -> None:
    request = ask("hello", sampling=SamplingParams())
    drawn = []
    for seed in (5, 5, 6):
        async with running(llama[0], seed=seed) as (backend, _):
            drawn.append([tokens(await generate(backend, request)) for _ in range(2)])
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


async def test_ends_carry_times_that_add_up(llama: tuple[Path, Any]) -> None:
    async with running(llama[0]) as (backend, _):
        events = await generate(backend, replace(ask("hello"), output=OutputOptions(n=2)))
    ends = [e for e in events if isinstance(e, Completion)]
    assert len(ends) == 2
    for end in ends:
        assert 0 <= end.timings.queued_s <= end.timings.time_to_first_token_s <= end.timings.total_s
