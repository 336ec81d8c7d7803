"""The metrics of a controller after requests that the test knows: relayed ones, with keys, and a lost worker."""

from __future__ import annotations

import asyncio

import pytest

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import ApiKeyConfig, MetricsConfig
from fastchat_grpc.errors import FastChatError
from tests.conftest import StartWorker, eventually
from tests.integration.controllers import in_use, running_controller, vanish
from tests.scrape import scrape

METRICS = MetricsConfig(port=0)
KEYS = ApiKeyConfig(keys=(("alice", "sk-of-alice"), ("bob", "sk-of-bob")))


async def test_each_counter_says_what_was_done_and_whose_key_it_was(start_worker: StartWorker) -> None:
    async with running_controller(metrics=METRICS, api_keys=KEYS, insecure_join=True) as controller:
        worker = await start_worker("echo", controllers=(controller.address,), metrics=METRICS)
        await eventually(lambda: worker.registered)
        for key, count in (("sk-of-alice", 2), ("sk-of-bob", 1)):
            async with AsyncClient(controller.address, api_key=key) as client:
                for _ in range(count):
                    await client.complete("hello", model="echo")
        async with AsyncClient(controller.address, api_key="sk-of-nobody") as client:
            with pytest.raises(FastChatError):
                await client.complete("hello", model="echo")
        told = await scrape(controller.metrics_address)
        assert told.get("fastchat_grpc_picks_total", model_name="echo", result="ok") == 3
        assert told.get("fastchat_grpc_pick_duration_seconds_count") == 3
        assert told.get("fastchat_grpc_attempts_total", evidence="good") == 3
        assert told.get("fastchat_grpc_attempts_total") == 3
        assert told.get("fastchat_grpc_api_key_uses_total", client="alice") == 2
        assert told.get("fastchat_grpc_api_key_uses_total", client="bob") == 1
        assert told.get("fastchat_grpc_workers", model_name="echo", state="ready") == 1
        assert told.get("fastchat_grpc_workers_registered_total") == 1
        assert told.get("fastchat_grpc_controller_serving") == 1
        assert told.get("fastchat_grpc_relayed_requests") == 0
        generate = {"grpc_method": "fastchat_grpc.v1.GenerationService/Generate"}
        assert told.get("grpc_server_call_started_total", **generate) == 4
        ended = "grpc_server_call_duration_seconds_count"
        assert told.get(ended, grpc_status="OK", **generate) == 3
        assert told.get(ended, grpc_status="UNAUTHENTICATED", **generate) == 1
        assert told.get("grpc_client_attempt_started_total", grpc_target="other", **generate) == 3
        assert told.get("grpc_client_attempt_duration_seconds_count", grpc_status="OK", **generate) == 3
        register = "fastchat_grpc.v1.ControllerService/Register"
        assert told.get(ended, grpc_method=register, grpc_status="OK") == 1
        at_worker = await scrape(worker.metrics_address)
        assert at_worker.get("fastchat_grpc_usage_requests_total", client="alice", model_name="echo") == 2
        assert at_worker.get("fastchat_grpc_usage_generation_tokens_total", client="bob") == 6


async def test_a_stream_that_lost_its_worker_is_counted_on_both_sides(start_worker: StartWorker) -> None:
    async with running_controller(metrics=METRICS) as controller:
        workers = [
            await start_worker("echo", controllers=(controller.address,), metrics=METRICS, options={"delay_ms": "20"})
            for _ in range(2)
        ]
        await eventually(lambda: len(controller.registry) == 2)
        text = "a stream that goes on at another worker"
        async with AsyncClient(controller.address) as client:
            task = asyncio.create_task(client.complete(text, model="echo", stream_interval=1))
            address = await in_use(controller)
            lost, other = sorted(workers, key=lambda worker: worker.address != address)
            await eventually(lambda: lost._generation.output_tokens > 3)
            await vanish(lost)
            assert (await task).text == text
        told = await scrape(controller.metrics_address)
        assert told.get("fastchat_grpc_resumes_total") == 1
        assert told.get("fastchat_grpc_attempts_total", evidence="lost") == 1
        assert told.get("fastchat_grpc_attempts_total", evidence="good") == 1
        assert told.get("fastchat_grpc_picks_total", result="ok") == 2
        generate = {"grpc_method": "fastchat_grpc.v1.GenerationService/Generate"}
        ended = "grpc_client_attempt_duration_seconds_count"
        assert told.get(ended, grpc_status="UNAVAILABLE", **generate) == 1
        assert told.get(ended, grpc_status="OK", **generate) == 1
        resumed = await scrape(other.metrics_address)
        assert resumed.get("fastchat_grpc_resumed_requests_total", model_name="echo") == 1
        assert 0 < resumed.get("vllm:generation_tokens_total", model_name="echo") < len(text)
