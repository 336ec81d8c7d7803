"""The main job on the real model: a client, a controller, a worker, and the very text of transformers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from fastchat_grpc import errors
from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import BackendConfig, ListenConfig, ModelConfig, WorkerConfig
from fastchat_grpc.core import ChatMessage, Delta, FinishReason
from fastchat_grpc.models.resolve import resolve
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import eventually, running_worker
from tests.e2e.test_grpcurl import grpcurl, json_objects
from tests.integration.controllers import running_controller

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

MODEL = "smollm2-135m-instruct"
NEW_TOKENS = 32
PLAIN = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4,",
    "Grüße aus München! Das Wetter ist",
]
CHAT = [
    "What is the boiling point of water?",
    "Write a haiku about autumn.",
    "Name three colours.",
    "Translate 'good morning' into French.",
    "Why is the sky blue? 🌤",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve(MODEL)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """Text of transformers itself: a function of the token ids of a prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    class Reference:
        def plain(self, text: str) -> str:
            return self._generate(tokenizer(text, return_tensors="pt").input_ids)

        def chat(self, text: str) -> str:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids
            return self._generate(ids)

        def _generate(self, ids: Any) -> str:
            with torch.inference_mode():
                output = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
                )
            return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

    return Reference()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker() -> AsyncIterator[WorkerApp]:
    config = WorkerConfig(
        backend=BackendConfig(name="transformers", model=ModelConfig(path=MODEL)),
        listen=ListenConfig(),
        controller_addresses=(),
        drain_timeout_s=0,
    )
    async with running_worker(config) as app:
        yield app


async def test_greedy_text_equals_that_of_transformers(worker: WorkerApp, reference: Any) -> None:
    expected = await asyncio.to_thread(
        lambda: [reference.plain(prompt) for prompt in PLAIN] + [reference.chat(prompt) for prompt in CHAT]
    )
    async with AsyncClient(worker.address) as client:
        options = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS}
        prompts: list[Any] = [*PLAIN, *([ChatMessage(role="user", content=prompt)] for prompt in CHAT)]
        one_by_one = [(await client.complete(prompt, **options)).text for prompt in prompts]
        together = await asyncio.gather(*(client.complete(prompt, **options) for prompt in prompts))
    assert one_by_one == expected
    assert [result.text for result in together] == expected, "the batch changed a text"


async def test_a_chat_streams_through_the_controller(worker: WorkerApp) -> None:
    async with running_controller() as controller:
        registering = asyncio.create_task(worker._registration(controller.address, "").run())
        await eventually(lambda: len(controller.registry.workers()) == 1)
        async with AsyncClient(controller.address) as client:
            messages = [{"role": "user", "content": "Count from one to ten."}]
            events = [e async for e in client.generate(messages, model=MODEL, temperature=0.0, max_new_tokens=24)]
            deltas = [event for event in events if isinstance(event, Delta)]
            assert len(deltas) > 5, "it must stream, not answer at once"
            assert sum(len(delta.token_ids) for delta in deltas) == deltas[-1].usage.completion_tokens
        registering.cancel()
        await asyncio.gather(registering, return_exceptions=True)


async def test_grpcurl_streams_a_generation_of_the_model(worker: WorkerApp) -> None:
    body = '{"prompt": "The capital of France is", "sampling": {"temperature": 0}, "stopping": {"max_new_tokens": 8}}'
    status, out, err = await grpcurl("-d", body, worker.address, "fastchat_grpc.v1.GenerationService/Generate")
    assert status == 0, err
    text = "".join(event["delta"].get("text", "") for event in json_objects(out) if "delta" in event)  # type: ignore[attr-defined]
    assert "Paris" in text


async def test_the_same_seed_gives_the_same_text_alone_and_in_a_crowd(worker: WorkerApp) -> None:
    async with AsyncClient(worker.address) as client:
        options = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 16}
        alone = await client.complete("The meaning of life is", seed=11, **options)
        crowd = await asyncio.gather(
            client.complete("The meaning of life is", seed=11, **options),
            *(client.complete(f"Number {i} is", seed=i, **options) for i in range(7)),
        )
    assert crowd[0].text == alone.text
    assert len({result.text for result in crowd}) == len(crowd)


async def test_limits_of_the_model_are_refused_with_numbers(worker: WorkerApp) -> None:
    async with AsyncClient(worker.address) as client:
        info = (await client.model_info()).model
        with pytest.raises(errors.PromptTooLong, match=f"context of {info.context_length} tokens"):
            await client.complete([1] * info.context_length)
        with pytest.raises(errors.InvalidArgument, match=f"below the vocabulary size of {info.vocabulary_size}"):
            await client.complete([info.vocabulary_size])


async def test_stop_strings_and_length_on_real_text(worker: WorkerApp) -> None:
    async with AsyncClient(worker.address) as client:
        full = await client.complete("1, 2, 3, 4,", temperature=0.0, max_new_tokens=16)
        assert full.choices[0].finish_reason is FinishReason.LENGTH
        assert full.choices[0].usage.completion_tokens == 16
        stop = full.text[5:9]
        cut = await client.complete("1, 2, 3, 4,", temperature=0.0, max_new_tokens=16, stop=[stop])
        assert cut.text == full.text[: full.text.index(stop)]
        assert (cut.choices[0].finish_reason, cut.choices[0].completion.matched) == (FinishReason.STOP, stop)
