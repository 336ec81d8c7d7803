"""The worker process: one backend, one server, one lease per controller."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Coroutine
from time import monotonic
from typing import Any

from fastchat_grpc import __version__
from fastchat_grpc.backends import registry
from fastchat_grpc.config import WorkerConfig
from fastchat_grpc.core import WorkerState
from fastchat_grpc.openai.servicer import OpenAIServicer
from fastchat_grpc.rpc import convert, descriptors
from fastchat_grpc.rpc.access import Access
from fastchat_grpc.rpc.registration import Registration
from fastchat_grpc.rpc.registrations import Registrations
from fastchat_grpc.rpc.security import JoinToken, bearer
from fastchat_grpc.rpc.server import RpcServer
from fastchat_grpc.rpc.supervise import Supervisor
from fastchat_grpc.v1 import generation_pb2_grpc, openai_pb2_grpc
from fastchat_grpc.v1 import registry_pb2 as pb
from fastchat_grpc.worker.admission import Admission
from fastchat_grpc.worker.generation import LocalGeneration
from fastchat_grpc.worker.metrics import WorkerMetrics
from fastchat_grpc.worker.monitor import Monitor
from fastchat_grpc.worker.servicer import GenerationServicer

logger = logging.getLogger(__name__)

ABANDON_S = 1.0
"""Time that a backend has to give up loading when the worker is stopped meanwhile."""
CLOSE_ABANDONED_S = 5.0
"""And to end what it has started by then, such as processes of its own."""


async def run(config: WorkerConfig, stop: asyncio.Event) -> None:
    """Serve until `stop` is set by a signal, or a controller's order to drain is carried out; then leave.

    Raises ConfigError if the worker cannot listen or load its model.
    """
    app = WorkerApp(config, stop)
    try:
        if await app.start_unless_stopped():
            await app.serve()
    finally:
        await app.stop()


class WorkerApp:
    """The parts of a worker, wired. `start` once, `stop` once."""

    def __init__(self, config: WorkerConfig, stop: asyncio.Event | None = None) -> None:
        self._config = config
        self._stop = stop or asyncio.Event()
        self._ordered = asyncio.Event()  # a controller wants this worker to drain
        self._withdrawn = asyncio.Event()  # and no longer wants it
        self._abandoned = False  # stopped while it was loading
        self._draining = False
        self._draining_since = 0.0
        self._drain_timeout_s = config.drain_timeout_s
        self._backend = registry.create(config.backend)
        self._generation = LocalGeneration(self._backend)
        self._monitor = Monitor(
            self._backend, self._generation, config.stall_timeout_s, self._load_changed, config.send_timeout_s
        )
        self.instance_id = uuid.uuid4().hex
        self._server: RpcServer | None = None
        self._metrics = WorkerMetrics.of(config, self._backend, self._generation, self._monitor)
        self._registrations = Registrations(config.controller_addresses, self._registration)
        self._supervisor = Supervisor(self._set_healthy)

    @property
    def address(self) -> str:
        """host:port that callers are told."""
        assert self._server is not None, "start first"
        return self._config.advertised_address or self._server.address

    @property
    def worker_id(self) -> str:
        """Stable identity."""
        return self._config.worker_id or self.address

    @property
    def metrics_address(self) -> str:
        """host:port of the metrics; empty where there are none."""
        return self._metrics.address if self._metrics is not None else ""

    @property
    def registered(self) -> bool:
        """Whether every controller knows this worker."""
        return self._registrations.registered

    async def start_unless_stopped(self) -> bool:
        """As `start`; False if the signal to stop came first, and loading was given up."""
        starting = asyncio.create_task(self.start())
        try:
            if await any_of(self._stop.wait(), asyncio.wait([starting])) and not starting.done():
                logger.info("stopped while loading the model")
                self._abandoned = True
                return False
            await starting  # raises what went wrong
            return True
        finally:
            starting.cancel()
            # A backend that does not give up loading is left behind: its threads end with the process.
            await asyncio.wait([starting], timeout=ABANDON_S)

    async def start(self) -> None:
        """Listen, load, then register: callers never meet a worker that cannot answer."""
        descriptors.raise_limit()
        if self._metrics is not None:
            self._metrics.start()
        await self._listen()
        models = await registry.start(self._backend, self._config.backend)
        if self._metrics is not None:
            self._metrics.open(models)
        self._generation.open(models, self._admission())
        self._monitor.set_state(WorkerState.SERVING)
        assert self._server is not None
        await self._server.set_serving(True)
        served = ", ".join(f"{model.name} ({model.backend})" for model in models)
        logger.info("worker %s serves %s", self.worker_id, served)
        self._supervisor.spawn("registrations", self._registrations.run)
        self._supervisor.spawn("monitor", self._monitor.run)

    async def serve(self) -> None:
        """Return when the worker shall leave: at the signal to stop, or drained by order of a controller.

        An order that is withdrawn before it is carried out opens the worker again.
        """
        while True:
            await any_of(self._stop.wait(), self._ordered.wait())
            if self._stop.is_set():
                return
            await self._close_admission()
            idle = self._generation.admission.idle()
            waits = (self._stop.wait(), self._withdrawn.wait(), idle)
            await any_of(*waits, timeout_s=self._drain_timeout_s)
            if self._stop.is_set() or not self._withdrawn.is_set():
                return
            await self._reopen()

    async def stop(self) -> None:
        """Drain, then free everything. What still runs when the time is over ends with UNAVAILABLE."""
        if self._server is not None:
            await self._drain()
        await self._supervisor.close()
        if self._server is not None:
            await self._server.stop(grace_s=1.0)
        try:
            async with asyncio.timeout(CLOSE_ABANDONED_S if self._abandoned else None):
                await self._backend.close()
        except TimeoutError:
            logger.warning("the backend does not give up loading and is left behind")
        if self._metrics is not None:
            self._metrics.stop()
        if self._generation.opened:
            logger.info("worker %s stopped", self.worker_id)

    async def _listen(self) -> None:
        # The servicer names the worker, and a worker without a name of its own is named by its port.
        services = [
            (
                "fastchat_grpc.v1.GenerationService",
                lambda s: generation_pb2_grpc.add_GenerationServiceServicer_to_server(
                    GenerationServicer(
                        self._generation, lambda: (self.worker_id, self.instance_id), self._monitor.load
                    ),
                    s,
                ),
            ),
            (
                "fastchat_grpc.v1.OpenAIService",
                lambda s: openai_pb2_grpc.add_OpenAIServiceServicer_to_server(
                    OpenAIServicer(
                        self._generation,
                        strict_fields=self._config.strict_fields,
                        ping_s=self._config.sse_ping_s,
                        worker_id=lambda: self.worker_id,
                    ),
                    s,
                ),
            ),
        ]
        access = Access(join_token=JoinToken(self._config.join_token), told_clients=self._metrics is not None)
        server = RpcServer(
            self._config.listen, services, access, meter=self._metrics.calls if self._metrics is not None else None
        )
        await server.start()
        self._server = server

    def _admission(self) -> Admission:
        limits = self._config.admission
        return Admission(limits.max_running or self._backend.load().max_running, limits.max_waiting)

    def _registration(self, controller_address: str, name: str) -> Registration:
        return Registration(
            controller_address,
            describe=self._describe,
            load=self._monitor.load,
            on_drain=self._drain_ordered,
            on_undrain=self._undrain_ordered,
            interval_s=self._config.heartbeat_interval_s,
            heartbeats=self._config.check_heartbeat,
            tls=self._config.controller_tls,
            metadata=bearer(self._config.join_token),
            server_name=name,
        )

    def _describe(self) -> pb.RegisterRequest:
        return pb.RegisterRequest(
            worker_id=self.worker_id,
            instance_id=self.instance_id,
            address=self.address,
            models=[convert.model_to_pb(model) for model in self._generation.models()],
            weight=self._config.weight,
            labels=dict(self._config.labels),
            check_heartbeat=self._config.check_heartbeat,
            version=__version__,
        )

    def _load_changed(self, urgent: bool) -> None:
        self._registrations.push(urgent=urgent)

    async def _set_healthy(self, healthy: bool) -> None:
        """Health follows the background tasks."""
        if self._server is not None and not self._draining:
            await self._server.set_serving(healthy)

    def _drain_ordered(self, timeout_s: float | None) -> None:
        """A controller's heartbeat answer asks for it; each does, as long as the order stands."""
        if timeout_s is not None:
            self._drain_timeout_s = timeout_s
        if not self._ordered.is_set() and not self._stop.is_set():
            logger.info("a controller asked this worker to drain")
            self._withdrawn.clear()
            self._ordered.set()

    def _undrain_ordered(self) -> None:
        if self._ordered.is_set() and not self._stop.is_set():
            logger.info("a controller withdrew its order to drain")
            self._ordered.clear()
            self._withdrawn.set()

    async def _close_admission(self) -> None:
        """Take nothing new."""
        self._draining = True
        self._draining_since = monotonic()
        assert self._server is not None
        await self._server.set_serving(False)
        if self._generation.opened:  # its model did load
            self._generation.admission.close()
            self._monitor.set_state(WorkerState.DRAINING)

    async def _reopen(self) -> None:
        """Take requests again."""
        self._draining = False
        self._generation.admission.reopen()
        self._monitor.set_state(WorkerState.SERVING)
        assert self._server is not None
        await self._server.set_serving(self._supervisor.healthy)

    async def _drain(self) -> None:
        """Let what runs end, and evict what has not ended in time."""
        # What an order has begun goes on with the time that it has left.
        drained_for_s = monotonic() - self._draining_since if self._draining else 0.0
        if not self._draining:
            await self._close_admission()
        if not self._generation.opened:
            return
        admission = self._generation.admission
        if not await any_of(admission.idle(), timeout_s=max(self._drain_timeout_s - drained_for_s, 0)):
            logger.warning("drain timeout: %d requests are evicted", admission.running + admission.waiting)
            self._generation.evict()


async def any_of(*waits: Coroutine[Any, Any, object], timeout_s: float | None = None) -> bool:
    """Wait until one of them is over; False if the time is over first. The others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for task in tasks:
            task.cancel()
