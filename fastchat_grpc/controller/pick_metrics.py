"""Picks of workers, counted and timed: a dispatcher that a controller has only where metrics are asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram

from fastchat_grpc.config import DispatchMethod
from fastchat_grpc.controller.dispatch import Dispatcher, PickRequest
from fastchat_grpc.controller.fleet import Reservation
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.errors import FastChatError
from fastchat_grpc.metrics.labels import OTHER, Names

PICK_S = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1)
UNKNOWN = ("MODEL_NOT_FOUND", "INVALID_ARGUMENT", "STARTING")
"""Reasons with which what a caller wrote need be no model's name: it becomes no label."""


class MeasuredDispatcher(Dispatcher):
    """See Dispatcher.

    Args:
        names: of models, which other metrics share, so that they agree on who is "other".
    """

    def __init__(
        self,
        registry: Registry,
        method: DispatchMethod,
        metrics: CollectorRegistry,
        names: Names,
        rng: random.Random | None = None,
    ) -> None:
        super().__init__(registry, method, rng)
        self._names = names
        self._picks = Counter(
            "fastchat_grpc_picks", "Picks of a worker for a request.", ["model_name", "result"], registry=metrics
        )
        self._seconds = Histogram(
            "fastchat_grpc_pick_duration_seconds", "Time of a pick.", buckets=PICK_S, registry=metrics
        )
        self._resolved: dict[tuple[str, str], Counter] = {}

    def pick(self, request: PickRequest, on_trouble: Callable[[], None] | None = None) -> Reservation:
        """See Dispatcher."""
        began = perf_counter()
        try:
            reservation = super().pick(request, on_trouble)
        except FastChatError as error:
            reason = error.reason
            self._count(OTHER if reason in UNKNOWN else request.pool, reason.lower())
            raise
        self._seconds.observe(perf_counter() - began)
        self._count(request.pool, "ok")
        return reservation

    def _count(self, model: str, result: str) -> None:
        found = self._resolved.get((model, result))
        if found is None:
            labels = (self._names.of(model), result)
            found = self._picks.labels(*labels)
            if labels[0] == model:  # what is "other" need not be remembered, however much there is of it
                self._resolved[labels] = found
        found.inc()
