"""What is noted of one request, by a clock that the test sets."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from fastchat_grpc.backends.base import BackendLoad, Steps
from fastchat_grpc.core import (
    Completion,
    Delta,
    EmbedRequest,
    EmbedResult,
    FinishReason,
    GenerateRequest,
    Load,
    ModelInfo,
    OutputOptions,
    ResumedChoice,
    StopConditions,
    TextPrompt,
    Timings,
    Usage,
)
from fastchat_grpc.errors import BackendFailed, Draining, InvalidArgument, QueueFull
from fastchat_grpc.worker.engine_metrics import EngineCollector
from fastchat_grpc.worker.request_metrics import RequestMetrics
from tests.scrape import Scrape

REQUEST = GenerateRequest(prompt=TextPrompt("hello"), model="m", stopping=StopConditions(max_new_tokens=50))


class Site:
    """Metrics of a worker, with a clock of their own."""

    def __init__(self, *, caches: bool = True) -> None:
        self.now = 1000.0
        self.registry = CollectorRegistry()
        models = [
            ModelInfo(name="m", context_length=100),
            ModelInfo(name="alias", context_length=100),
            ModelInfo(name="adapter", context_length=100, base_model="m"),
            ModelInfo(name="second", context_length=100),
        ]
        engines = {"m": caches, "second": False}
        self.metrics = RequestMetrics(self.registry, models, engines, clock=lambda: self.now)
        self.load = BackendLoad(max_running=4)
        self.collector = EngineCollector(list(self.metrics.engines.values()), self, 1)  # type: ignore[arg-type]
        self.registry.register(self.collector)

    @property
    def backend_load(self) -> BackendLoad:
        return self.load

    def last_load(self) -> Load:
        return Load()

    def begin(self, request: GenerateRequest | EmbedRequest = REQUEST, client: str = ""):
        return self.metrics.begin(request, client)

    def told(self) -> Scrape:
        from prometheus_client import generate_latest

        return Scrape(generate_latest(self.registry).decode())


def delta(tokens: int, index: int = 0, cached: int = 0) -> Delta:
    return Delta(
        index=index,
        text="x",
        token_ids=(),
        usage=Usage(prompt_tokens=10, completion_tokens=tokens, cached_tokens=cached),
    )


def completion(tokens: int, index: int = 0, timings: Timings = Timings(), cached: int = 0) -> Completion:  # noqa: B008
    usage = Usage(prompt_tokens=10, completion_tokens=tokens, cached_tokens=cached)
    return Completion(index=index, finish_reason=FinishReason.STOP, usage=usage, timings=timings)


def run_one(site: Site) -> None:
    """Waits 2 s, is prepared for 1 s, queued in the engine for 3 s, prefilled for 4 s; a token comes each 0.5 s."""
    with site.begin(client="alice") as record:
        site.now += 2
        record.admitted()
        site.now += 8
        for made in range(1, 5):
            record.event(delta(made, cached=6))
            site.now += 0.5
        timings = Timings(prepared_s=1, queued_s=4, time_to_first_token_s=8, total_s=10)
        record.event(completion(5, timings=timings, cached=6))
        site.now += 0.25


def test_the_times_of_a_request_are_split_as_vllm_splits_them() -> None:
    site = Site()
    run_one(site)
    told = site.told()

    def seconds(name: str) -> float:
        assert told.get(f"{name}_count", model_name="m", engine="0") == 1
        return told.get(f"{name}_sum", model_name="m")

    assert seconds("vllm:time_to_first_token_seconds") == 10
    assert seconds("vllm:request_queue_time_seconds") == 2 + 3
    assert seconds("vllm:request_prefill_time_seconds") == 4
    assert seconds("vllm:request_decode_time_seconds") == 2
    assert seconds("vllm:request_inference_time_seconds") == 6
    assert seconds("vllm:e2e_request_latency_seconds") == 12.25
    assert seconds("vllm:request_time_per_output_token_seconds") == 0.5
    assert seconds("fastchat_grpc_request_overhead_seconds") == pytest.approx(12.25 - 2 - 9)
    assert told.get("vllm:inter_token_latency_seconds_count", model_name="m") == 4
    assert told.get("vllm:inter_token_latency_seconds_sum", model_name="m") == 2


def test_tokens_are_counted_where_they_came_from_and_for_whom() -> None:
    site = Site()
    run_one(site)
    told = site.told()
    for name, value in {
        "vllm:prompt_tokens_total": 10,
        "vllm:prompt_tokens_cached_total": 6,
        "vllm:prefix_cache_queries_total": 10,
        "vllm:prefix_cache_hits_total": 6,
        "vllm:generation_tokens_total": 5,
        "vllm:request_prefill_kv_computed_tokens_sum": 4,
        "vllm:request_params_max_tokens_sum": 50,
        "vllm:request_params_n_sum": 1,
        "vllm:request_max_num_generation_tokens_sum": 5,
    }.items():
        assert told.get(name, model_name="m") == value, name
    assert told.get("vllm:prompt_tokens_by_source_total", model_name="m", source="local_compute") == 4
    assert told.get("vllm:prompt_tokens_by_source_total", model_name="m", source="local_cache_hit") == 6
    assert told.get("fastchat_grpc_usage_requests_total", client="alice", model_name="m") == 1
    assert told.get("fastchat_grpc_usage_prompt_tokens_total", client="alice", model_name="m") == 10
    assert told.get("fastchat_grpc_usage_generation_tokens_total", client="alice", model_name="m") == 5


def test_what_an_engine_cannot_tell_is_absent() -> None:
    site = Site(caches=False)
    with site.begin() as record:
        record.admitted()
        record.event(completion(3))
    told = site.told()
    assert told.get("vllm:request_queue_time_seconds_count", model_name="m") == 1
    for name in ("vllm:prefix_cache_hits_total", "vllm:kv_cache_usage_perc", "vllm:num_preemptions_total"):
        assert not told.has(name), name
    for name in ("vllm:request_decode_time_seconds_count", "fastchat_grpc_request_overhead_seconds_count"):
        assert told.get(name, model_name="m") == 0, name


def test_aliases_and_adapters_count_under_the_first_name_of_their_engine() -> None:
    site = Site()
    for model in ("alias", "adapter", "second"):
        with site.begin(replace(REQUEST, model=model)) as record:
            record.admitted()
            record.event(completion(3))
    told = site.told()
    assert told.get("vllm:generation_tokens_total", model_name="m") == 6
    assert told.get("vllm:generation_tokens_total", model_name="second") == 3
    assert told.get("fastchat_grpc_usage_generation_tokens_total", model_name="adapter") == 3


def test_adapters_in_use_are_told_as_gateways_read_them() -> None:
    site = Site()
    running, waiting = site.begin(replace(REQUEST, model="adapter")), site.begin(replace(REQUEST, lora_adapter="other"))
    with running, waiting:
        running.admitted()
        told = site.told()
        assert told.get("vllm:lora_requests_info", running_lora_adapters="adapter", waiting_lora_adapters="other") > 1e9
        assert told.get("vllm:num_requests_running", model_name="m") == 1
        assert told.get("vllm:num_requests_waiting", model_name="m") == 1
        assert told.get("vllm:num_requests_waiting_by_reason", reason="capacity", model_name="m") == 1
        waiting.admitted()
        running.event(completion(1))
        waiting.event(completion(1))
    told = site.told()
    assert told.has("vllm:lora_requests_info", running_lora_adapters="", waiting_lora_adapters="")
    assert told.get("vllm:num_requests_running", model_name="m") == 0


@pytest.mark.parametrize(("error", "reason"), [(QueueFull("full"), "queue_full"), (Draining("drains"), "draining")])
def test_who_is_not_let_in_is_counted_as_that_and_nothing_else(error: Exception, reason: str) -> None:
    site = Site()
    with pytest.raises(type(error)), site.begin():
        raise error
    told = site.told()
    assert told.get("vllm:admission_rejections_total", reason=reason, model_name="m") == 1
    assert told.get("vllm:request_success_total") == 0
    assert told.get("vllm:num_requests_waiting") == 0


@pytest.mark.parametrize(
    ("error", "cut", "finish"),
    [
        (asyncio.CancelledError(), "caller", "abort"),
        (GeneratorExit(), "caller", "abort"),
        (Draining("evicted"), "eviction", "abort"),
        (BackendFailed("broke"), "error", "error"),
    ],
)
def test_a_request_that_is_cut_short_says_why(error: BaseException, cut: str, finish: str) -> None:
    site = Site()
    with pytest.raises(type(error)), site.begin() as record:
        record.admitted()
        record.event(delta(1))
        raise error
    told = site.told()
    assert told.get("fastchat_grpc_aborted_requests_total", reason=cut) == 1
    assert told.get("vllm:request_success_total", finished_reason=finish) == 1
    assert told.get("vllm:e2e_request_latency_seconds_count") == 0
    assert told.get("vllm:num_requests_running") == 0


def test_a_request_that_is_wrong_in_itself_is_no_failure() -> None:
    site = Site()
    with pytest.raises(InvalidArgument), site.begin() as record:
        record.admitted()
        raise InvalidArgument("prompt", "too long")
    told = site.told()
    assert told.get("fastchat_grpc_aborted_requests_total") == 0
    assert told.get("vllm:request_success_total") == 0


def test_a_caller_who_leaves_with_everything_has_left_nothing_behind() -> None:
    site = Site()
    with pytest.raises(GeneratorExit), site.begin() as record:
        record.admitted()
        record.event(completion(2))
        raise GeneratorExit
    told = site.told()
    assert told.get("vllm:request_success_total", finished_reason="stop") == 1
    assert told.get("vllm:e2e_request_latency_seconds_count", model_name="m") == 1
    assert told.get("fastchat_grpc_aborted_requests_total") == 0


def test_a_resumed_request_counts_the_tokens_that_are_made_here() -> None:
    site = Site()
    resume = (ResumedChoice(index=0, output_token_ids=(1, 2, 3)), ResumedChoice(index=1, finished=True))
    with site.begin(replace(REQUEST, resume=resume, output=OutputOptions(n=2))) as record:
        record.admitted()
        record.event(delta(4))
        record.event(completion(6))
    told = site.told()
    assert told.get("vllm:generation_tokens_total", model_name="m") == 3
    assert told.get("fastchat_grpc_resumed_requests_total", model_name="m") == 1


def test_a_clock_that_jumps_back_makes_no_negative_time() -> None:
    site = Site()
    with site.begin() as record:
        site.now -= 100
        record.admitted()
        record.event(delta(1))
        site.now -= 100
        record.event(delta(2))
        record.event(completion(3, timings=Timings(prepared_s=5, queued_s=3, time_to_first_token_s=1, total_s=0.5)))
    told = site.told()
    sums = [value for (name, _), value in told.samples.items() if name.endswith("_sum")]
    assert all(value >= 0 for value in sums)
    assert told.get("vllm:request_queue_time_seconds_count", model_name="m") == 1


def test_a_hundred_thousand_keys_make_a_bounded_number_of_series() -> None:
    site = Site()
    for i in range(100_000):
        site.metrics._usage.of(f"key-{i}", "m")
    assert len(site.metrics._usage.counts) == 1001


def test_embeddings_count_their_tokens() -> None:
    site = Site()
    with site.begin(EmbedRequest(inputs=("a", "b"), model="second")) as record:
        record.admitted()
        record.embedded(EmbedResult(embeddings=[], prompt_tokens=7))
    told = site.told()
    assert told.get("vllm:prompt_tokens_total", model_name="second") == 7
    assert told.get("vllm:e2e_request_latency_seconds_count", model_name="second") == 1


def test_an_engine_tells_of_its_cache_and_its_steps() -> None:
    site = Site()
    steps = Steps()
    steps.seconds.observe(0.02)
    steps.tokens.observe(100)
    steps.sequences.observe(3)
    part = BackendLoad(
        max_running=4, kv_cache_usage=0.5, kv_block_size=16, kv_block_count=64, preemptions=2, steps=steps
    )
    site.load = BackendLoad(max_running=4, parts=(("m", BackendLoad(max_running=4)), ("second", part)))
    told = site.told()
    assert told.get("vllm:kv_cache_usage_perc", model_name="second") == 0.5
    assert not told.has("vllm:kv_cache_usage_perc", model_name="m")
    assert told.get("vllm:cache_config_info", model_name="second", block_size="16", num_gpu_blocks="64") == 1
    assert told.get("vllm:num_preemptions_total", model_name="second") == 2
    assert told.get("fastchat_grpc_engine_step_seconds_sum", model_name="second") == 0.02
    assert told.get("vllm:iteration_tokens_total_bucket", le="128.0", model_name="second") == 1
    assert told.get("vllm:iteration_tokens_total_bucket", le="64.0", model_name="second") == 0
    assert told.get("fastchat_grpc_engine_batch_size_count", model_name="second") == 1
