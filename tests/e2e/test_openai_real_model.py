"""The OpenAI API over a real model: through Envoy, a controller and a worker with the Transformers engine."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack

import pytest

from fastchat_grpc.config import BackendConfig, DispatchMethod, ListenConfig, ModelConfig, WorkerConfig
from tests.conftest import eventually, running_worker
from tests.e2e.gateway_site import Site, content, running_site
from tests.e2e.processes import running_cli, wait_for_workers

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


@pytest.mark.timeout(400)
async def test_a_stream_of_the_sdk_outlives_its_killed_worker() -> None:
    """Streamed and in one piece; the SDK is as it comes."""
    pytest.importorskip("torch")
    from openai import AsyncOpenAI

    from fastchat_grpc.models.embedded import embedded_model

    async with AsyncExitStack() as stack:
        by_weight = {"dispatch": DispatchMethod.LOTTERY}
        site = await stack.enter_async_context(running_site(workers=[], controller=by_weight))
        model = ("--model-path", str(embedded_model()), "--model-names", "smol", "--device", "cpu")
        share = ("--backend-option", "threads=1", "--backend-option", "kv_cache_tokens=4096")  # two on one machine
        at = ("--backend", "transformers", *share, "--port", "0", "--controller-address", site.controller.address)
        victim, _ = [
            await stack.enter_async_context(running_cli("worker", *model, *at, "--weight", weight))
            for weight in ("1000000", "1")
        ]
        await wait_for_workers(site.controller.address, 2, timeout_s=200)
        await _gateway_knows(site, 2)
        favoured = max(site.controller.registry.workers(), key=lambda worker: worker.weight)
        client = await stack.enter_async_context(AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0))
        messages = [{"role": "user", "content": "Tell me about the sea."}]
        asked = {"model": "smol", "messages": messages, "temperature": 0, "max_tokens": 48}
        undisturbed = (await client.chat.completions.create(**asked)).choices[0]

        await eventually(lambda: favoured.reserved_count == 0)
        whole = asyncio.ensure_future(client.chat.completions.create(**asked))
        await eventually(lambda: favoured.reserved_count == 1)
        chunks = []
        async for chunk in await client.chat.completions.create(**asked, stream=True):
            chunks.append(chunk)
            if len(chunks) == 8:
                assert favoured.reserved_count == 2
                victim.kill()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == undisturbed.message.content
        assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
        assert [chunk.choices[0].delta.role for chunk in chunks].count("assistant") == 1
        assert chunks[-1].choices[0].finish_reason == undisturbed.finish_reason
        assert (await whole).choices[0] == undisturbed


async def _gateway_knows(site: Site, count: int) -> None:
    assert site.controller.bridge is not None
    gateways = site.controller.bridge.endpoints._gateways
    await eventually(lambda: any(len(gateway.acked or ()) == count for gateway in gateways.values()))
