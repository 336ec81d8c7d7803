"""The metrics of a worker, wired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastchat_grpc.backends.base import Backend
from fastchat_grpc.config import WorkerConfig
from fastchat_grpc.core import ModelInfo
from fastchat_grpc.worker.generation import LocalGeneration
from fastchat_grpc.worker.monitor import Monitor

if TYPE_CHECKING:
    from fastchat_grpc.metrics.calls import ServerCalls
    from fastchat_grpc.metrics.exposition import Exposition


class WorkerMetrics:
    """What a worker counts and tells. Make it with `of`; `start` it, `open` it with the models, `stop` it."""

    def __init__(self, exposition: Exposition, backend: Backend, generation: LocalGeneration, monitor: Monitor) -> None:
        from fastchat_grpc.metrics.calls import ServerCalls

        self._exposition = exposition
        self._calls = ServerCalls()
        self._backend = backend
        self._generation = generation
        self._monitor = monitor

    @staticmethod
    def of(
        config: WorkerConfig, backend: Backend, generation: LocalGeneration, monitor: Monitor
    ) -> WorkerMetrics | None:
        """Those that a worker is to have; None: it counts nothing."""
        if config.metrics.port is None:
            return None
        from fastchat_grpc.metrics.exposition import Exposition

        return WorkerMetrics(Exposition(config.metrics, "worker"), backend, generation, monitor)

    @property
    def calls(self) -> ServerCalls:
        """Counts the calls of the worker's server."""
        return self._calls

    @property
    def address(self) -> str:
        """host:port where they are."""
        return self._exposition.address

    def start(self) -> None:
        """Tell what is known before the models are. Raises ConfigError where the port cannot be had."""
        from fastchat_grpc.worker.engine_metrics import WorkerCollector

        self._exposition.registry.register(WorkerCollector(self._monitor))
        self._exposition.registry.register(self._calls)
        self._exposition.start()

    def open(self, models: Sequence[ModelInfo]) -> None:
        """The models are loaded: note their requests from now on."""
        from fastchat_grpc.worker.engine_metrics import EngineCollector
        from fastchat_grpc.worker.request_metrics import RequestMetrics

        load = self._backend.load()
        parts = load.parts or ((models[0].name, load),)
        engines = {name: part.prefix_cache for name, part in parts}
        requests = RequestMetrics(self._exposition.registry, models, engines)
        adapters = sum(bool(model.base_model) for model in models)
        series = list(requests.engines.values())
        self._exposition.registry.register(EngineCollector(series, self._monitor, adapters))
        self._generation.records = requests

    def stop(self) -> None:
        """Tell nothing more."""
        self._exposition.stop()
