"""The worker process: one backend, one server, one lease per controller."""

from __future__ import annotations

import asyncio
import logging
import uuid

from fastchat_grpc import __version__
from fastchat_grpc.backends import registry
from fastchat_grpc.config import WorkerConfig
from fastchat_grpc.core import WorkerState
from fastchat_grpc.openai.servicer import OpenAIServicer
from fastchat_grpc.rpc import convert
from fastchat_grpc.rpc.registration import Registration
from fastchat_grpc.rpc.registrations import Registrations
from fastchat_grpc.rpc.security import bearer
from fastchat_grpc.rpc.server import RpcServer
from fastchat_grpc.rpc.supervise import Supervisor
from fastchat_grpc.v1 import generation_pb2_grpc, openai_pb2_grpc
from fastchat_grpc.v1 import registry_pb2 as pb
from fastchat_grpc.worker.admission import Admission
from fastchat_grpc.worker.generation import LocalGeneration
from fastchat_grpc.worker.monitor import Monitor
from fastchat_grpc.worker.servicer import GenerationServicer

logger = logging.getLogger(__name__)


async def run(config: WorkerConfig, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, by a signal or by a controller's order to drain; then drain and leave.

    Raises ConfigError if the worker cannot listen or load its model.
    """
    app = WorkerApp(config, stop)
    try:
        await app.start()
        await stop.wait()
    finally:
        await app.stop()


class WorkerApp:
    """The parts of a worker, wired. `start` once, `stop` once."""

    def __init__(self, config: WorkerConfig, stop: asyncio.Event | None = None) -> None:
        self._config = config
        self._stop = stop or asyncio.Event()
        self._drain_timeout_s = config.drain_timeout_s
        self._backend = registry.create(config.backend)
        self._generation = LocalGeneration(self._backend)
        self._monitor = Monitor(self._backend, self._generation, config.stall_timeout_s, self._load_changed)
        self.instance_id = uuid.uuid4().hex
        self._server: RpcServer | None = None
        self._registrations = Registrations(config.controller_addresses, self._registration)
        self._supervisor = Supervisor()

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
    def registered(self) -> bool:
        """Whether every controller knows this worker."""
        return self._registrations.registered

    async def start(self) -> None:
        """Listen, load, then register: callers never meet a worker that cannot answer."""
        await self._listen()
        models = await self._backend.start()
        self._generation.open(models, self._admission())
        self._monitor.set_state(WorkerState.SERVING)
        assert self._server is not None
        await self._server.set_serving(True)
        served = ", ".join(f"{model.name} ({model.backend})" for model in models)
        logger.info("worker %s serves %s", self.worker_id, served)
        self._supervisor.spawn("registrations", self._registrations.run)
        self._supervisor.spawn("monitor", self._monitor.run)

    async def stop(self) -> None:
        """Drain, then free everything. What still runs when the time is over ends with UNAVAILABLE."""
        if self._server is not None:
            await self._drain(self._server)
        await self._supervisor.close()
        if self._server is not None:
            await self._server.stop(grace_s=1.0)
        await self._backend.close()
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
                lambda s: openai_pb2_grpc.add_OpenAIServiceServicer_to_server(OpenAIServicer(self._generation), s),
            ),
        ]
        server = RpcServer(self._config.listen, services)
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

    def _load_changed(self) -> None:
        self._registrations.push()

    def _drain_ordered(self, timeout_s: float | None) -> None:
        if timeout_s is not None:
            self._drain_timeout_s = timeout_s
        if not self._stop.is_set():
            logger.info("a controller asked this worker to drain")
            self._stop.set()

    async def _drain(self, server: RpcServer) -> None:
        """Take nothing new, let what runs end, and evict what has not ended in time."""
        await server.set_serving(False)
        if not self._generation.opened:  # its model did not load
            return
        admission = self._generation.admission
        admission.close()
        self._monitor.set_state(WorkerState.DRAINING)
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                await admission.idle()
        except TimeoutError:
            logger.warning("drain timeout: %d requests are evicted", admission.running + admission.waiting)
            self._generation.evict()
