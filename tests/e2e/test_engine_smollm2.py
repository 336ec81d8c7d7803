"""The engine on a real model, against transformers' generate at batch 1."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from fastchat_grpc.backends.transformers.backend import create
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import (
    ChatMessage,
    ChatPrompt,
    Delta,
    EmbedRequest,
    GenerateRequest,
    Prompt,
    SamplingParams,
    StopConditions,
    TextPrompt,
)
from fastchat_grpc.models.embedded import EMBEDDED_MODEL, embedded_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

CHATS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "List three uses of a paper clip.",
    "Übersetze ins Englische: Guten Morgen!",
]
TEXTS = [
    "The quick brown fox",
    "def fibonacci(n):\n",
    "In 1969, the first human",
    "Once upon a time there was a small robot who",
    "1, 1, 2, 3, 5, 8,",
]
COUNT = 24


def chat(text: str) -> ChatPrompt:
    return ChatPrompt(messages=(ChatMessage(role="user", content=text),))


PROMPTS: list[Prompt] = [*(chat(text) for text in CHATS), *(TextPrompt(text) for text in TEXTS)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend() -> AsyncIterator[Any]:
    backend = create(BackendConfig(model=ModelConfig(path=EMBEDDED_MODEL), options={"kv_cache_tokens": "16384"}))
    await backend.start()
    yield backend
    await backend.close()


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded_model()).eval()


async def run(backend: Any, prompt: Prompt, count: int = COUNT, **sampling: Any) -> tuple[list[int], str]:
    request = GenerateRequest(
        prompt=prompt,
        sampling=SamplingParams(**{"temperature": 0, **sampling}),
        stopping=StopConditions(max_new_tokens=count),
    )
    deltas = [event async for event in backend.generate(request) if isinstance(event, Delta)]
    return [t for d in deltas for t in d.token_ids], "".join(d.text for d in deltas)


async def test_ten_prompts_at_once_get_the_text_of_generate_alone(backend: Any, model: Any) -> None:
    import torch

    answers = await asyncio.gather(*(run(backend, prompt) for prompt in PROMPTS))
    for prompt, (tokens, text) in zip(PROMPTS, answers, strict=True):
        ids = list(await backend.tokenize("", prompt))
        out = await asyncio.to_thread(
            model.generate,
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=COUNT,
            do_sample=False,
        )
        expected = out[0, len(ids) :].tolist()
        assert tokens == expected
        ends = (2,) if expected[-1] == 2 else ()
        assert text == await backend.detokenize("", expected[: len(expected) - len(ends)])


async def test_a_seeded_text_is_the_same_alone_and_among_31_others(backend: Any) -> None:
    """Up to rounding: other rows change sums in their last bits, which moves a draw about once in 10^5 tokens."""

    def ask(i: int) -> Any:
        return run(backend, chat(f"Tell me something about the number {i}."), 16, temperature=0.8, seed=i)

    alone = [await ask(i) for i in range(0, 32, 8)]
    together = await asyncio.gather(*(ask(i) for i in range(32)))
    assert alone == [together[i] for i in range(0, 32, 8)]


async def test_embeddings_say_which_texts_are_alike(backend: Any) -> None:
    texts = ("The cat sat on the mat.", "A cat was sitting on a rug.", "Interest rates rose by two percent.")
    result = await backend.embed(EmbedRequest(inputs=texts))
    first, second, third = result.embeddings

    def cosine(a: Any, b: Any) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert cosine(first, second) > cosine(first, third)
    assert cosine(first, first) == pytest.approx(1, abs=1e-4)
