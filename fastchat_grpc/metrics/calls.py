"""Calls of gRPC under the names of gRFC A66, of servers and of clients.

Recorded where calls pass anyway, without interceptors. An observation is an addition: histograms of the metrics
library take three times as long, and calls are many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fastchat_grpc.core import Distribution
from fastchat_grpc.metrics.histograms import add_distribution
from fastchat_grpc.metrics.labels import OTHER

SECONDS = (
    *(0.0, 0.00001, 0.00005, 0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008),
    *(0.01, 0.013, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4),
    *(0.5, 0.65, 0.8, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
)
SIZES = (0, *(4**power for power in range(5, 17)))
"""From 1 KiB to 4 GiB."""


class MethodCalls:
    """Calls of one method. Implements `rpc.metering.MethodMeter`."""

    __slots__ = ("by_status", "started_count")

    def __init__(self) -> None:
        self.started_count = 0
        self.by_status: dict[str, tuple[Distribution, Distribution]] = {}
        """Seconds and bytes sent, by status."""

    def started(self) -> None:
        """See MethodMeter."""
        self.started_count += 1

    def ended(self, status: str, seconds: float, sent: int) -> None:
        """See MethodMeter."""
        found = self.by_status.get(status)
        if found is None:
            found = self.by_status[status] = (Distribution(SECONDS), Distribution(SIZES))
        found[0].observe(seconds)
        found[1].observe(sent)


class ServerCalls(Collector):
    """Calls of a server. Implements `rpc.metering.Meter`."""

    def __init__(self) -> None:
        self._methods: dict[str, MethodCalls] = {}

    def of(self, method: str) -> MethodCalls:
        """See Meter."""
        return self._methods.setdefault(method.removeprefix("/"), MethodCalls())

    def unknown(self) -> MethodCalls:
        """See Meter."""
        return self.of(OTHER)

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        rows = [((method,), calls) for method, calls in list(self._methods.items())]
        return families(
            rows,
            ("grpc_method",),
            ("grpc_server_call_started", "Calls that came."),
            ("grpc_server_call_duration_seconds", "From when a call came to its end."),
            ("grpc_server_call_sent_total_compressed_message_size_bytes", "Bytes of all answers of a call."),
        )


class ClientCalls(Collector):
    """Attempts of calls to other servers. The target is "other": a fleet has as many as it has workers."""

    def __init__(self) -> None:
        self._methods: dict[str, MethodCalls] = {}

    def of(self, method: str) -> MethodCalls:
        """The attempts of a method."""
        return self._methods.setdefault(method.removeprefix("/"), MethodCalls())

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        rows = [((method, OTHER), calls) for method, calls in list(self._methods.items())]
        return families(
            rows,
            ("grpc_method", "grpc_target"),
            ("grpc_client_attempt_started", "Attempts that were begun."),
            ("grpc_client_attempt_duration_seconds", "From the begin of an attempt to its end."),
            None,
        )


def families(
    rows: Sequence[tuple[Sequence[str], MethodCalls]],
    labels: Sequence[str],
    started: tuple[str, str],
    seconds: tuple[str, str],
    sent: tuple[str, str] | None,
) -> Iterable[Metric]:
    """The families of A66 for some methods; those that nobody has called are left out."""
    begun = CounterMetricFamily(*started, labels=labels)
    took = HistogramMetricFamily(*seconds, labels=(*labels, "grpc_status"))
    size = HistogramMetricFamily(*(sent or ("unused", "")), labels=(*labels, "grpc_status"))
    for values, calls in rows:
        if calls.started_count:
            begun.add_metric(values, calls.started_count)
        for status, (durations, sizes) in list(calls.by_status.items()):
            add_distribution(took, (*values, status), durations)
            add_distribution(size, (*values, status), sizes)
    return [begun, took, *([size] if sent is not None else [])]
