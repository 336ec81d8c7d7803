"""Distributions as histograms of Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from fastchat_grpc.core import Distribution


def add_distribution(family: HistogramMetricFamily, labels: Sequence[str], distribution: Distribution) -> None:
    """Add a distribution to a family: Prometheus counts all values up to each bound."""
    total, buckets = 0, []
    for bound, count in zip((*distribution.bounds, float("inf")), list(distribution.counts), strict=True):
        total += count
        buckets.append((str(floatToGoString(bound)), float(total)))  # type: ignore[no-untyped-call]
    family.add_metric(labels, buckets, distribution.total)
