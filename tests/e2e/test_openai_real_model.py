"""The OpenAI API over a real model: through Envoy, a controller and a worker with the Transformers engine."""

from __future__ import annotations

import json

import pytest

from fastchat_grpc.config import BackendConfig, ListenConfig, ModelConfig, WorkerConfig
from tests.conftest import eventually, running_worker
from tests.e2e.gateway_site import content, running_site

pytestmark = pytest.mark.slow

YES_OR_NO = {
    "type": "object",
    "properties": {"answer": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}
NONSENSE = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}


async def test_a_real_model_answers_streams_and_follows_a_schema() -> None:
    pytest.importorskip("torch")
    from fastchat_grpc.models.embedded import embedded_model

    async with running_site(workers=[]) as site:
        config = WorkerConfig(
            backend=BackendConfig(
                name="transformers", model=ModelConfig(path=str(embedded_model()), names=("smol",), device="cpu")
            ),
            listen=ListenConfig(),
            controller_addresses=(site.controller.address,),
            drain_timeout_s=0.0,
        )
        async with running_worker(config) as worker:
            await eventually(lambda: worker.registered)
            greedy = {"model": "smol", "temperature": 0, "max_tokens": 12}
            question = "What is the capital of France?"
            whole = (await site.chat(question, **greedy)).json()
            text = whole["choices"][0]["message"]["content"]
            assert "Paris" in text
            assert whole["choices"][0]["finish_reason"] == "stop"
            assert content([event async for event in site.stream(question, **greedy)]) == text

            wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": YES_OR_NO}}
            reply = (await site.chat("Is fire hot?", response_format=wanted, **greedy)).json()
            assert json.loads(reply["choices"][0]["message"]["content"])["answer"] in ("yes", "no")
            refused = await site.chat("x", response_format=NONSENSE, **greedy)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "response_format.json_schema.schema"

            scored = {"model": "smol", "prompt": "Paris is in", "max_tokens": 0, "echo": True, "logprobs": 1}
            choice = (await site.http.post("/v1/completions", json=scored)).json()["choices"][0]
            assert choice["text"] == "Paris is in"
            assert choice["logprobs"]["token_logprobs"][0] is None
            assert all(value < 0 for value in choice["logprobs"]["token_logprobs"][1:])
