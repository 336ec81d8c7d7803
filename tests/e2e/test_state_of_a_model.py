"""A reply of a model that computes goes on elsewhere as if nothing had happened, wherever it breaks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import torch

from fastchat_grpc.backends import registry
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.openai.servicer import OpenAIServicer
from fastchat_grpc.worker.admission import Admission
from fastchat_grpc.worker.generation import LocalGeneration
from tests.e2e.tiny_models import write_llama
from tests.unit.openai.carried import check_every_break, rounded, still

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 9}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "look"}}
MESSAGES = [{"role": "user", "content": "The quick brown fox"}]
STREAM = {"stream": True}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"prompt": ["The quick", "def add"], "logprobs": 0, "temperature": 0, "max_tokens": 5, **STREAM},
    "drawn": {"prompt": ["The quick", "The quick"], "n": 2, "max_tokens": 4, **STREAM},
    "drawn_and_whole": {"prompt": ["The quick", "The quick"], "logprobs": 0, "max_tokens": 20},
    "drawn_by_a_seed": {"prompt": "The quick", "seed": 5, "temperature": 0.9, "max_tokens": 8, **STREAM},
    "penalized": {"prompt": "a a a", "temperature": 0, "frequency_penalty": 1.5, "max_tokens": 8, **STREAM},
    "chat": {"messages": MESSAGES, "logprobs": True, "max_tokens": 8, **STREAM},
    "json": {"messages": MESSAGES, "response_format": {"type": "json_object"}, "max_tokens": 8, **STREAM},
    "calls": {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "required", "max_tokens": 40, **STREAM},
    "call": {"messages": MESSAGES, "tools": [TOOL], "tool_choice": NAMED, "max_tokens": 24},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[OpenAIServicer]]:
    """Two workers of one small model: they share an engine, and know nothing of each other's requests."""
    path = write_llama(tmp_path_factory.mktemp("models") / "llama", torch.float32)
    # More threads than one wait for each other where the machine does other work beside.
    config = BackendConfig(name="transformers", model=ModelConfig(path=str(path)), options={"threads": "1"})
    backend = registry.create(config)
    models = await registry.start(backend, config)
    found = []
    for _ in range(2):
        generation = LocalGeneration(backend)
        generation.open(models, Admission(max_running=8, max_waiting=8))
        found.append(OpenAIServicer(generation, worker_id=lambda: "w"))
    yield found
    await backend.close()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("case", CASES)
async def test_a_reply_goes_on_from_every_break(
    workers: list[OpenAIServicer], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    still(monkeypatch)
    name = "ChatCompletions" if "messages" in CASES[case] else "Completions"
    await check_every_break(workers, name, CASES[case], rounded, step=4 if case == "calls" else 1)
