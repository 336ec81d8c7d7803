"""The metrics of a controller, wired."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastchat_grpc.config import ControllerConfig
from fastchat_grpc.controller.dispatch import Dispatcher
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.controller.relay import Relay
from fastchat_grpc.rpc.api_keys import ApiKeys

if TYPE_CHECKING:
    from fastchat_grpc.controller.envoy.services import EnvoyServices
    from fastchat_grpc.metrics.exposition import Exposition


class ControllerMetrics:
    """What a controller counts and tells. Make it with `of`; take its dispatcher; `start` and `stop` it."""

    def __init__(self, exposition: Exposition) -> None:
        from fastchat_grpc.metrics.calls import ClientCalls, ServerCalls
        from fastchat_grpc.metrics.labels import Names

        self._exposition = exposition
        self._names = Names()
        self.calls = ServerCalls()
        """Counts the calls of the controller's server."""
        self.attempts = ClientCalls()
        """Counts what it asks of workers for others."""

    @staticmethod
    def of(config: ControllerConfig) -> ControllerMetrics | None:
        """Those that a controller is to have; None: it counts nothing."""
        if config.metrics.port is None:
            return None
        from fastchat_grpc.metrics.exposition import Exposition

        return ControllerMetrics(Exposition(config.metrics, "controller"))

    @property
    def address(self) -> str:
        """host:port where they are."""
        return self._exposition.address

    def dispatcher(self, registry: Registry, config: ControllerConfig) -> Dispatcher:
        """A dispatcher whose picks are counted."""
        from fastchat_grpc.controller.pick_metrics import MeasuredDispatcher

        return MeasuredDispatcher(registry, config.dispatch, self._exposition.registry, self._names)

    def start(self, relay: Relay, keys: ApiKeys, bridge: EnvoyServices | None, serving: Callable[[], bool]) -> None:
        """Tell. Raises ConfigError where the port cannot be had."""
        from fastchat_grpc.controller.fleet_metrics import FleetCollector, WorkerLines

        self._exposition.registry.register(FleetCollector(relay, keys, bridge, self._names, serving))
        self._exposition.registry.register(self.calls)
        self._exposition.registry.register(self.attempts)
        self._exposition.add(WorkerLines(relay.dispatcher.registry))
        self._exposition.start()

    def stop(self) -> None:
        """Tell nothing more."""
        self._exposition.stop()
