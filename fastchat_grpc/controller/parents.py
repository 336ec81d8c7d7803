"""A controller as a worker of others: it registers its whole fleet as one worker that serves all its models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from fastchat_grpc import __version__
from fastchat_grpc.config import ControllerConfig
from fastchat_grpc.controller.generation import RelayedGeneration
from fastchat_grpc.controller.presented import MAX_MODELS
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.controller.watch import Watch
from fastchat_grpc.core import ModelInfo
from fastchat_grpc.rpc import convert
from fastchat_grpc.rpc.registration import Registration
from fastchat_grpc.rpc.registrations import Registrations
from fastchat_grpc.rpc.security import bearer
from fastchat_grpc.v1 import registry_pb2 as pb

logger = logging.getLogger(__name__)

GATHER_S = 0.1
"""Changes are gathered this long, so that a fleet's start is not one registration per worker."""


class Parents:
    """Keeps a controller registered with its parents while it has workers. `run` it.

    Args:
        address: host:port that the parents are told.
        on_drain: called with the time left when a parent asks the controller to drain.
    """

    def __init__(
        self,
        config: ControllerConfig,
        registry: Registry,
        generation: RelayedGeneration,
        address: str,
        on_drain: Callable[[float | None], None],
    ) -> None:
        self._config = config
        self._registry = registry
        self._generation = generation
        self._address = address
        self._on_drain = on_drain
        self._warned = False
        self._registrations = Registrations(config.parent_addresses, self._registration)

    def push(self) -> None:
        """Send heartbeats soon: the state has changed."""
        self._registrations.push()

    async def run(self) -> None:
        """Follow the fleet until cancelled; then leave the parents."""
        watch = Watch(self._registry, loads=False)
        try:
            while True:
                if len(self._registry):
                    await self._while_there_are_workers(watch)
                else:
                    await watch.next()
                    await asyncio.sleep(GATHER_S)
        finally:
            watch.close()

    async def _while_there_are_workers(self, watch: Watch) -> None:
        told = self._describe()
        registering = asyncio.create_task(self._registrations.run())
        try:
            while len(self._registry):
                await watch.next()
                await asyncio.sleep(GATHER_S)
                if self._registry.models() and (now := self._describe()) != told:
                    told = now
                    self._registrations.renew()
        finally:
            registering.cancel()
            # Unlike a plain await, this tells a cancel of this task from that of the other.
            await asyncio.gather(registering, return_exceptions=True)

    def _registration(self, parent: str, name: str) -> Registration:
        return Registration(
            parent,
            describe=self._describe,
            load=self._generation.load,
            on_drain=self._on_drain,
            tls=self._config.parent_tls,
            metadata=bearer(self._config.parent_join_token),
            server_name=name,
        )

    def _models(self) -> Sequence[ModelInfo]:
        """The models of the fleet by name, as far as a parent takes them."""
        models = self._generation.models()
        if len(models) > MAX_MODELS and not self._warned:
            self._warned = True
            logger.error(
                "the fleet serves %d models, and parents take %d of one child: they do not hear of those after %s",
                len(models),
                MAX_MODELS,
                models[MAX_MODELS - 1].name,
            )
        return models[:MAX_MODELS]

    def _describe(self) -> pb.RegisterRequest:
        worker_id, instance_id = self._generation.identity
        return pb.RegisterRequest(
            worker_id=worker_id,
            instance_id=instance_id,
            address=self._address,
            models=[convert.model_to_pb(model) for model in self._models()],
            weight=self._generation.weight(),
            version=__version__,
        )
