"""What a worker counts of its requests, under vLLM's names and by vLLM's definitions (docs/operating.md).

A model counts under the first name of its engine, as in vLLM: aliases and adapters share an engine, and so a label.
All intervals are differences of one monotonic clock.
"""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic
from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from fastchat_grpc.core import (
    Completion,
    Delta,
    Distribution,
    EmbedRequest,
    EmbedResult,
    Event,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    Timings,
)
from fastchat_grpc.errors import Code, Draining, FastChatError, QueueFull, ReaderTooSlow
from fastchat_grpc.metrics.labels import (
    CHOICES,
    FIRST_TOKEN_S,
    LATENCY_S,
    NOBODY,
    OVERHEAD_S,
    TOKEN_S,
    Names,
    token_bounds,
)

ENGINE = "0"
"""vLLM numbers its engines; here each has the name of its model."""
LABELS = ("model_name", "engine")
FINISHES = (*(reason.value for reason in FinishReason), "error")
CUTS = ("caller", "eviction", "slow_reader", "error")
REFUSALS: Mapping[type[FastChatError], str] = {QueueFull: "queue_full", Draining: "draining"}


class Families:
    """The metrics, without their labels' values."""

    def __init__(self, registry: CollectorRegistry, context_length: int) -> None:
        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, (*LABELS, *more), registry=registry)

        def histogram(name: str, text: str, bounds: Sequence[float]) -> Histogram:
            return Histogram(name, text, LABELS, buckets=bounds, registry=registry)

        tokens = token_bounds(context_length)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts, cached ones included.")
        self.by_source = counter("vllm:prompt_tokens_by_source", "Tokens of prompts by where they came from.", "source")
        self.cached = counter("vllm:prompt_tokens_cached", "Tokens of prompts that came from a cache.")
        self.queries = counter(
            "vllm:prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache."
        )
        self.hits = counter("vllm:prefix_cache_hits", "Tokens of prompts that were found there.")
        self.success = counter("vllm:request_success", "Choices that have ended, by why.", "finished_reason")
        self.rejections = counter("vllm:admission_rejections", "Requests that were not let in, by why.", "reason")
        self.first_token = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_S)
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to end.", LATENCY_S)
        self.queued = histogram("vllm:request_queue_time_seconds", "Time in queues, ours and the engine's.", LATENCY_S)
        self.inference = histogram("vllm:request_inference_time_seconds", "First scheduled to last token.", LATENCY_S)
        self.prefill = histogram("vllm:request_prefill_time_seconds", "First scheduled to first token.", LATENCY_S)
        self.decode = histogram("vllm:request_decode_time_seconds", "First token to last token.", LATENCY_S)
        self.per_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time from token to token of a choice.", TOKEN_S
        )
        self.request_prompt = histogram("vllm:request_prompt_tokens", "Tokens of a request's prompt.", tokens)
        self.computed = histogram("vllm:request_prefill_kv_computed_tokens", "Those of them that no cache had.", tokens)
        self.request_generated = histogram("vllm:request_generation_tokens", "Tokens of a choice.", tokens)
        self.longest = histogram(
            "vllm:request_max_num_generation_tokens", "Tokens of the longest choice of a request.", tokens
        )
        self.n = histogram("vllm:request_params_n", "Choices that a request asks for.", CHOICES)
        self.max_tokens = histogram("vllm:request_params_max_tokens", "Tokens that a request allows.", tokens)
        self.overhead = histogram(
            "fastchat_grpc_request_overhead_seconds",
            "Time of a request at the worker that it spent neither in the engine nor waiting for its slot.",
            OVERHEAD_S,
        )
        self.resumed = counter("fastchat_grpc_resumed_requests", "Requests that go on with what another worker began.")
        self.aborted = counter("fastchat_grpc_aborted_requests", "Requests that were cut short, by why.", "reason")


class ModelSeries:
    """The series of one engine, with its labels resolved, and what is counted without them."""

    def __init__(self, families: Families, name: str, *, caches: bool) -> None:
        labels = (name, ENGINE)
        self.name = name
        self.waiting = 0
        """Requests that wait for a slot."""
        self.running = 0
        """Requests that have one."""
        self.generated = 0
        """Tokens; this and their gaps are counted at each of them, and so without locks."""
        self.token_gaps = Distribution(TOKEN_S)
        self.running_adapters: Tally[str] = Tally()
        self.waiting_adapters: Tally[str] = Tally()
        self.prompt_tokens = families.prompt_tokens.labels(*labels)
        self.success = {reason: families.success.labels(*labels, reason) for reason in FINISHES}
        self.rejections = {kind: families.rejections.labels(*labels, reason) for kind, reason in REFUSALS.items()}
        self.first_token = families.first_token.labels(*labels)
        self.e2e = families.e2e.labels(*labels)
        self.queued = families.queued.labels(*labels)
        self.inference = families.inference.labels(*labels)
        self.prefill = families.prefill.labels(*labels)
        self.decode = families.decode.labels(*labels)
        self.per_token = families.per_token.labels(*labels)
        self.request_prompt = families.request_prompt.labels(*labels)
        self.request_generated = families.request_generated.labels(*labels)
        self.longest = families.longest.labels(*labels)
        self.n = families.n.labels(*labels)
        self.max_tokens = families.max_tokens.labels(*labels)
        self.overhead = families.overhead.labels(*labels)
        self.resumed = families.resumed.labels(*labels)
        self.aborted = {why: families.aborted.labels(*labels, why) for why in CUTS}
        self._cache = CacheSeries(families, labels) if caches else None

    def prompt(self, tokens: int, cached: int) -> None:
        """A prompt was taken in."""
        self.prompt_tokens.inc(tokens)
        self.request_prompt.observe(tokens)
        if self._cache is not None:
            self._cache.prompt(tokens, cached)


class CacheSeries:
    """The series of a prefix cache; an engine that has none, or does not tell, has none of them."""

    def __init__(self, families: Families, labels: tuple[str, str]) -> None:
        self._computed = families.by_source.labels(*labels, "local_compute")
        self._looked_up = families.queries.labels(*labels)
        self._request_computed = families.computed.labels(*labels)
        self._found = (
            families.by_source.labels(*labels, "local_cache_hit"),
            families.cached.labels(*labels),
            families.hits.labels(*labels),
        )

    def prompt(self, tokens: int, cached: int) -> None:
        """A prompt was taken in."""
        self._computed.inc(tokens - cached)
        self._looked_up.inc(tokens)
        self._request_computed.observe(tokens - cached)
        for counter in self._found:
            counter.inc(cached)


class UsageCounts:
    """Of one client and one model."""

    __slots__ = ("generated", "prompt", "requests")

    def __init__(self) -> None:
        self.requests = self.prompt = self.generated = 0


class Usage(Collector):
    """Requests and tokens by who asked for them and of which model."""

    def __init__(self) -> None:
        self._clients = Names()
        self.counts: dict[tuple[str, str], UsageCounts] = {}

    def of(self, client: str, model: str) -> UsageCounts:
        """The counts of a client, by the name of its key, and a model that is served."""
        key = (self._clients.of(client) if client else NOBODY, model)
        found = self.counts.get(key)
        if found is None:
            found = self.counts[key] = UsageCounts()
        return found

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        texts = ("Requests, by the name of the caller's key.", "Tokens of their prompts.", "Tokens generated for them.")
        names = ("requests", "prompt_tokens", "generation_tokens")
        families = [
            CounterMetricFamily(f"fastchat_grpc_usage_{name}", text, labels=("client", "model_name"))
            for name, text in zip(names, texts, strict=True)
        ]
        for key, counts in list(self.counts.items()):
            for family, value in zip(families, (counts.requests, counts.prompt, counts.generated), strict=True):
                family.add_metric(key, value)
        return families


class RequestMetrics:
    """Implements `records.Records`. Made when the models are loaded; used on the event loop.

    Args:
        engines: the models whose engines count apart, each with what tells whether it caches prefixes.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        models: Sequence[ModelInfo],
        engines: Mapping[str, bool],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        families = Families(registry, max((model.context_length for model in models), default=1))
        self._clock = clock
        self._usage = Usage()
        registry.register(self._usage)
        self._adapters = {model.name for model in models if model.base_model}
        self.engines = {name: ModelSeries(families, name, caches=caches) for name, caches in engines.items()}
        self.by_model: dict[str, ModelSeries] = {}
        owner = next(iter(self.engines))
        for model in models:  # those of an engine follow one another
            owner = model.name if model.name in self.engines else owner
            self.by_model[model.name] = self.engines[owner]

    def begin(self, request: GenerateRequest | EmbedRequest, client: str) -> RequestRecord:
        """See Records."""
        adapter = getattr(request, "lora_adapter", "") or (request.model if request.model in self._adapters else "")
        series = self.by_model[request.model]
        return RequestRecord(series, self._usage.of(client, request.model), request, adapter, self._clock)


class _Choice:
    """Tokens of a choice so far, and when the last of them came; 0: none has."""

    __slots__ = ("last", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self.last = 0.0


class RequestRecord:
    """Notes of one request. Implements `records.Record`."""

    __slots__ = (
        "_adapter",
        "_admitted",
        "_arrival",
        "_choices",
        "_clock",
        "_longest",
        "_open",
        "_request",
        "_series",
        "_timings",
        "_told",
        "_usage",
    )

    def __init__(
        self,
        series: ModelSeries,
        usage: UsageCounts,
        request: GenerateRequest | EmbedRequest,
        adapter: str,
        clock: Callable[[], float],
    ) -> None:
        self._series = series
        self._usage = usage
        self._request = request
        self._adapter = adapter
        self._clock = clock
        self._arrival = clock()
        self._admitted: float | None = None
        self._choices: dict[int, _Choice] = {}
        self._open = 0
        self._longest = 0
        self._told = False
        self._timings: Timings | None = None

    def __enter__(self) -> RequestRecord:
        self._series.waiting += 1
        if self._adapter:
            self._series.waiting_adapters[self._adapter] += 1
        if isinstance(self._request, GenerateRequest):
            resume = self._request.resume
            self._open = self._request.output.n - sum(choice.finished for choice in resume or ())
            if resume is not None:
                self._series.resumed.inc()
        return self

    def admitted(self) -> None:
        """See Record."""
        self._admitted = self._clock()
        self._leave_queue()
        self._series.running += 1
        if self._adapter:
            self._series.running_adapters[self._adapter] += 1
        self._usage.requests += 1

    def event(self, event: Event) -> None:
        """See Record."""
        if isinstance(event, Delta):
            usage = event.usage
            self._tokens(event.index, usage.completion_tokens)
            if not self._told:
                self._prompt(usage.prompt_tokens, usage.cached_tokens)
        elif isinstance(event, Completion):
            self._completed(event)

    def embedded(self, result: EmbedResult) -> None:
        """See Record."""
        self._prompt(result.prompt_tokens, 0)
        self._series.e2e.observe(self._since(self._arrival))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        series = self._series
        if self._admitted is None:
            self._leave_queue()
            refusal = series.rejections.get(kind) if kind is not None else None  # type: ignore[arg-type]
            if refusal is not None:
                refusal.inc()
                return
        else:
            series.running -= 1
            _less(series.running_adapters, self._adapter)
        if error is None:
            self._ended()
        else:
            self._broke(error)

    def _leave_queue(self) -> None:
        self._series.waiting -= 1
        _less(self._series.waiting_adapters, self._adapter)

    def _tokens(self, index: int, total: int) -> None:
        """A choice has so many tokens by now. Called for each event, and so in as few steps as may be."""
        choice = self._choices.get(index) or self._begin(index)
        made = total - choice.total
        if made <= 0:
            return
        now, series = self._clock(), self._series
        if choice.last:
            gap = (now - choice.last) / made
            series.token_gaps.observe(gap if gap > 0.0 else 0.0, made)
        else:
            self._first(now, made)
        choice.total, choice.last = total, now
        series.generated += made
        self._usage.generated += made

    def _begin(self, index: int) -> _Choice:
        assert isinstance(self._request, GenerateRequest)
        before = len(self._request.resumed_choice(index).output_token_ids) if self._request.resume else 0
        choice = self._choices[index] = _Choice(before)
        return choice

    def _first(self, now: float, made: int) -> None:
        """The first tokens of a choice are here."""
        if not any(other.last for other in self._choices.values()):
            self._series.first_token.observe(max(0.0, now - self._arrival))
        if made > 1:  # they came together, as far as can be seen from here
            self._series.token_gaps.observe(0.0, made - 1)

    def _prompt(self, tokens: int, cached: int) -> None:
        self._told = True
        self._series.prompt(tokens, min(cached, tokens))
        self._usage.prompt += tokens

    def _completed(self, event: Completion) -> None:
        series, usage, timings = self._series, event.usage, event.timings
        self._tokens(event.index, usage.completion_tokens)
        if not self._told:
            self._prompt(usage.prompt_tokens, usage.cached_tokens)
        self._open -= 1
        series.success[event.finish_reason.value].inc()
        series.request_generated.observe(usage.completion_tokens)
        self._longest = max(self._longest, usage.completion_tokens)
        if timings.total_s:
            self._timings = timings
            gaps = usage.completion_tokens - 1
            decode_s = max(0.0, timings.total_s - timings.time_to_first_token_s)
            series.per_token.observe(decode_s / gaps if gaps > 0 else 0.0)

    def _ended(self) -> None:
        """All its choices are there, or its embeddings."""
        request, series = self._request, self._series
        if not isinstance(request, GenerateRequest):
            return
        assert self._admitted is not None, "it has answers"
        e2e_s, waited_s = self._since(self._arrival), max(0.0, self._admitted - self._arrival)
        series.e2e.observe(e2e_s)
        series.longest.observe(self._longest)
        series.n.observe(request.output.n)
        series.max_tokens.observe(request.stopping.max_new_tokens)
        timings = self._timings
        if timings is None:
            series.queued.observe(waited_s)
            return
        scheduled_s = max(timings.queued_s, timings.prepared_s)
        first_s = max(timings.time_to_first_token_s, scheduled_s)
        total_s = max(timings.total_s, first_s)
        series.queued.observe(waited_s + scheduled_s - timings.prepared_s)
        series.prefill.observe(first_s - scheduled_s)
        series.decode.observe(total_s - first_s)
        series.inference.observe(total_s - scheduled_s)
        series.overhead.observe(max(0.0, e2e_s - waited_s - (total_s - timings.prepared_s)))

    def _broke(self, error: BaseException) -> None:
        """It ended before its end."""
        left = isinstance(error, (GeneratorExit, asyncio.CancelledError))
        if left and self._choices and not self._open:
            self._ended()  # its caller has everything, and did not wait for the end of the stream
            return
        if isinstance(error, FastChatError) and error.code in (Code.INVALID_ARGUMENT, Code.NOT_FOUND):
            return  # nothing began
        why = "caller" if left else _WHY.get(type(error), "error")
        self._series.aborted[why].inc()
        self._series.success["error" if why == "error" else "abort"].inc(max(self._open, 1))

    def _since(self, then: float) -> float:
        return max(0.0, self._clock() - then)


_WHY: Mapping[type[BaseException], str] = {Draining: "eviction", ReaderTooSlow: "slow_reader"}


def _less(adapters: Tally[str], name: str) -> None:
    """One request less of an adapter."""
    if name:
        adapters[name] -= 1
        if not adapters[name]:
            del adapters[name]
