"""What a worker tells of its engines and of itself: read when somebody asks, so that nothing is kept up to date."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fastchat_grpc.backends.base import BackendLoad
from fastchat_grpc.core import WorkerState
from fastchat_grpc.metrics.histograms import add_distribution
from fastchat_grpc.worker.monitor import Monitor
from fastchat_grpc.worker.request_metrics import ENGINE, LABELS, ModelSeries


class EngineCollector(Collector):
    """Collects in the thread of whoever asks; reads figures that the event loop and the engine's thread write.

    Args:
        monitor: knows the loads.
        adapters: how many LoRA adapters are loaded; 0: none can be asked for.
    """

    def __init__(self, series: Sequence[ModelSeries], monitor: Monitor, adapters: int) -> None:
        self._series = series
        self._monitor = monitor
        self._adapters = adapters

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        yield from self._requests()
        load = self._monitor.backend_load
        parts = load.parts or ((self._series[0].name, load),)
        yield from _cache(parts)
        yield from _steps(parts)

    def _requests(self) -> Iterable[Metric]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Requests that have a slot.", labels=LABELS)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait for one.", labels=LABELS)
        by_reason = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason", "The same, by what they wait for.", labels=(*LABELS, "reason")
        )
        generated = CounterMetricFamily("vllm:generation_tokens", "Tokens generated.", labels=LABELS)
        gaps = HistogramMetricFamily("vllm:inter_token_latency_seconds", "From token to token.", labels=LABELS)
        for series in self._series:
            labels = (series.name, ENGINE)
            running.add_metric(labels, series.running)
            waiting.add_metric(labels, series.waiting)
            by_reason.add_metric((*labels, "capacity"), series.waiting)
            generated.add_metric(labels, series.generated)
            add_distribution(gaps, labels, series.token_gaps)
        yield from (running, waiting, by_reason, generated, gaps)
        if self._adapters:
            yield self._adapters_in_use()

    def _adapters_in_use(self) -> Metric:
        """As vLLM has it, for gateways that route by adapter: names in labels, and the time as the value."""
        names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        family = GaugeMetricFamily("vllm:lora_requests_info", "LoRA adapters that requests use now.", labels=names)
        running = sorted({name for series in self._series for name in list(series.running_adapters)})
        waiting = sorted({name for series in self._series for name in list(series.waiting_adapters)})
        family.add_metric((str(self._adapters), ",".join(running), ",".join(waiting)), time.time())
        return family


class WorkerCollector(Collector):
    """What a worker tells of itself, from its start on."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        load = self._monitor.last_load()
        states = GaugeMetricFamily("fastchat_grpc_worker_state", "1 for the state that it is in.", labels=("state",))
        for state in WorkerState:
            states.add_metric((state.value,), float(load.state is state))
        yield states
        capacity = GaugeMetricFamily(
            "fastchat_grpc_worker_capacity", "Sequences that run, and requests that wait, at most.", labels=("kind",)
        )
        capacity.add_metric(("running",), load.max_running)
        capacity.add_metric(("waiting",), load.max_waiting)
        yield capacity
        yield GaugeMetricFamily(
            "fastchat_grpc_worker_tokens_per_second", "Tokens sent, of the last seconds.", load.tokens_per_second
        )


def _cache(parts: Sequence[tuple[str, BackendLoad]]) -> Iterable[Metric]:
    usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Used part of the KV cache, 0 to 1.", labels=LABELS)
    info = GaugeMetricFamily(
        "vllm:cache_config_info", "Blocks of the KV cache.", labels=(*LABELS, "block_size", "num_gpu_blocks")
    )
    preemptions = CounterMetricFamily("vllm:num_preemptions", "Sequences that lost their place.", labels=LABELS)
    for name, load in parts:
        labels = (name, ENGINE)
        if load.kv_cache_usage is not None:
            usage.add_metric(labels, load.kv_cache_usage)
        if load.kv_block_size:
            info.add_metric((*labels, str(load.kv_block_size), str(load.kv_block_count)), 1)
        if load.preemptions is not None:
            preemptions.add_metric(labels, load.preemptions)
    return [family for family in (usage, info, preemptions) if family.samples]


def _steps(parts: Sequence[tuple[str, BackendLoad]]) -> Iterable[Metric]:
    seconds = HistogramMetricFamily("fastchat_grpc_engine_step_seconds", "Time of a step.", labels=LABELS)
    sequences = HistogramMetricFamily("fastchat_grpc_engine_batch_size", "Sequences of a step.", labels=LABELS)
    tokens = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of a step, of prompts too.", labels=LABELS)
    failures = CounterMetricFamily(
        "fastchat_grpc_engine_failures", "Steps that failed, after which the engine began anew.", labels=LABELS
    )
    for name, load in parts:
        if load.steps is None:
            continue
        labels = (name, ENGINE)
        failures.add_metric(labels, load.steps.failures)
        told = ((seconds, load.steps.seconds), (sequences, load.steps.sequences), (tokens, load.steps.tokens))
        for family, distribution in told:
            if distribution.count:
                add_distribution(family, labels, distribution)
    return [family for family in (seconds, sequences, tokens, failures) if family.samples]
