"""A registry on a clock that tests turn."""

from __future__ import annotations

import itertools
from typing import Any

from fastchat_grpc.config import BreakerConfig, LeaseConfig
from fastchat_grpc.controller.fleet import Worker, WorkerSpec
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.core import Capability, Load, ModelInfo


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def model(name: str = "m", **fields: Any) -> ModelInfo:
    """A model that can be resumed."""
    fields.setdefault("capabilities", frozenset({Capability.GENERATE, Capability.RESUME}))
    return ModelInfo(name=name, context_length=fields.pop("context_length", 100), **fields)


class Fleet:
    """A registry, its clock, and short ways to fill it. It has settled, unless it is to be `young`.

    The default lease has a time to live of 6 s and an interval of 2 s.
    """

    def __init__(
        self, lease: LeaseConfig | None = None, breaker: BreakerConfig | None = None, *, young: bool = False
    ) -> None:
        self.clock = Clock()
        numbers = itertools.count(1)
        self.registry = Registry(
            lease or LeaseConfig(),
            breaker or BreakerConfig(),
            clock=self.clock,
            new_id=lambda: f"lease-{next(numbers)}",
        )
        if not young:
            self.wait(2 * (lease or LeaseConfig()).heartbeat_interval_s)
            self.registry.settle()

    def join(
        self,
        worker_id: str = "a",
        models: str = "m",
        *,
        given: tuple[ModelInfo, ...] = (),
        instance: str = "",
        load: Load | None = None,
        **spec: Any,
    ) -> Worker:
        """Register a worker at an address made of its id."""
        return self.registry.register(
            WorkerSpec(
                worker_id=worker_id,
                instance_id=instance or f"{worker_id}-1",
                address=f"{worker_id}:1",
                models=given or tuple(model(name) for name in models.split(",")),
                **spec,
            ),
            load or Load(),
        )

    def wait(self, seconds: float) -> None:
        """Let time pass, with the looks at the clock that a running controller takes."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(end, self.clock.now + 0.25)
            self.registry.expire()

    def ids(self, model_name: str = "") -> list[str]:
        """Ids of the live workers."""
        return [worker.spec.worker_id for worker in self.registry.workers(model_name)]
