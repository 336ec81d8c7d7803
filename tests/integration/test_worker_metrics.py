"""The metrics of a worker after requests that the test knows, read over HTTP."""

from __future__ import annotations

import asyncio

import pytest

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import MetricsConfig
from fastchat_grpc.errors import FastChatError, QueueFull
from tests.conftest import StartWorker, eventually
from tests.scrape import scrape

VLLM_BOARD = {
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:generation_tokens_total",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:inter_token_latency_seconds_count",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:prompt_tokens_total",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_max_num_generation_tokens_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:time_to_first_token_seconds_count",
    "vllm:time_to_first_token_seconds_sum",
}
"""What the board that vLLM ships asks for, but `vllm:kv_cache_usage_perc`: the echo backend has no KV cache."""
METRICS = MetricsConfig(port=0)


async def test_each_counter_says_what_was_done(start_worker: StartWorker) -> None:
    worker = await start_worker("echo", metrics=METRICS, max_running=4)
    prompts = ["hello", "a longer prompt", "x" * 50]
    async with AsyncClient(worker.address) as client:
        done = [await client.complete(prompt, model="echo") for prompt in prompts]
        short = await client.complete("never ends", model="echo", max_new_tokens=3)
        with pytest.raises(FastChatError):
            await client.complete("hello", model="no such model")
        with pytest.raises(FastChatError):
            await client.complete("y" * 5000, model="echo")
    results = [*done, short]
    told = await scrape(worker.metrics_address)
    assert told.names() >= VLLM_BOARD
    assert told.get("vllm:request_success_total", finished_reason="stop", model_name="echo", engine="0") == 3
    assert told.get("vllm:request_success_total", finished_reason="length") == 1
    assert told.get("vllm:request_success_total") == 4
    sent = sum(len(prompt) for prompt in [*prompts, "never ends"])
    made = sum(result.choices[0].usage.completion_tokens for result in results)
    assert made == sum(len(prompt) + 1 for prompt in prompts) + 3
    assert told.get("vllm:prompt_tokens_total") == told.get("vllm:request_prompt_tokens_sum") == sent
    assert told.get("vllm:generation_tokens_total") == told.get("vllm:request_generation_tokens_sum") == made
    assert told.get("vllm:inter_token_latency_seconds_count") == made - len(results)
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert told.get(f"vllm:{name}_seconds_count") == len(results), name
    assert told.get("fastchat_grpc_request_overhead_seconds_count") == len(results)
    assert told.get("fastchat_grpc_usage_requests_total", client="none") == len(results) + 1  # one was too long
    assert told.get("fastchat_grpc_usage_generation_tokens_total", client="none") == made
    assert told.get("fastchat_grpc_worker_state", state="serving") == 1
    assert told.get("fastchat_grpc_worker_capacity", kind="running") == 4
    assert not told.has("vllm:kv_cache_usage_perc")
    generate = "fastchat_grpc.v1.GenerationService/Generate"
    assert told.get("grpc_server_call_started_total", grpc_method=generate) == len(results) + 2
    for status, count in (("OK", len(results)), ("NOT_FOUND", 1), ("INVALID_ARGUMENT", 1)):
        name = "grpc_server_call_duration_seconds_count"
        assert told.get(name, grpc_method=generate, grpc_status=status) == count, status
    name = "grpc_server_call_sent_total_compressed_message_size_bytes_sum"
    assert told.get(name, grpc_method=generate, grpc_status="OK") > made


async def test_what_runs_and_waits_and_is_refused_is_told_while_it_does(start_worker: StartWorker) -> None:
    options = {"hang_after": "1"}
    worker = await start_worker("echo", metrics=METRICS, max_running=1, max_waiting=1, options=options)
    async with AsyncClient(worker.address) as client:
        tasks = []
        for waiting in (0, 1):
            tasks.append(asyncio.create_task(client.complete("hello", model="echo")))
            await eventually(lambda waiting=waiting: worker._generation.admission.waiting == waiting)
            await eventually(lambda: worker._generation.admission.running == 1)
        with pytest.raises(QueueFull):
            await client.complete("hello", model="echo")
        told = await scrape(worker.metrics_address)
        assert told.get("vllm:num_requests_running", model_name="echo") == 1
        assert told.get("vllm:num_requests_waiting", model_name="echo") == 1
        assert told.get("vllm:admission_rejections_total", reason="queue_full") == 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await eventually(lambda: worker._generation.admission.running == 0)
    told = await scrape(worker.metrics_address)
    assert told.get("vllm:num_requests_running") == told.get("vllm:num_requests_waiting") == 0
    assert told.get("fastchat_grpc_aborted_requests_total", reason="caller") == 2
    assert told.get("vllm:request_success_total", finished_reason="abort") == 2


async def test_a_worker_that_is_not_asked_to_count_has_no_metrics(start_worker: StartWorker) -> None:
    worker = await start_worker("echo")
    assert worker.metrics_address == ""
