"""ControllerService: the registry and the dispatcher over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from fastchat_grpc.config import MAX_SECONDS
from fastchat_grpc.controller.dispatch import Dispatcher, PickRequest
from fastchat_grpc.controller.fleet import ChangeKind, LeaseTerms, WorkerSpec
from fastchat_grpc.controller.history import History
from fastchat_grpc.controller.listing import change_batches, models_page, worker_to_pb, workers_page
from fastchat_grpc.controller.picks import Picks
from fastchat_grpc.controller.presented import capabilities_asked, excluded, spec_from_pb
from fastchat_grpc.controller.refresh import Refresh
from fastchat_grpc.controller.watch import Watch
from fastchat_grpc.errors import InvalidArgument, NotSupported, WorkerIdInUse
from fastchat_grpc.rpc import convert
from fastchat_grpc.rpc.pool import ChannelPool
from fastchat_grpc.rpc.security import AllowedNetworks
from fastchat_grpc.v1 import registry_pb2 as pb
from fastchat_grpc.v1 import registry_pb2_grpc

if TYPE_CHECKING:
    from fastchat_grpc.controller.envoy.going_on import GoingOn

Context = grpc.aio.ServicerContext[Any, Any]

WATCH_PAUSE_S = 0.1
"""Changes are gathered this long before they are sent, so that a large fleet's loads come in batches."""


class ControllerServicer(registry_pb2_grpc.ControllerServiceServicer):
    """Messages in, messages out. The border lets callers in, and makes statuses of errors."""

    def __init__(
        self, dispatcher: Dispatcher, pool: ChannelPool, networks: AllowedNetworks, going_on: GoingOn | None = None
    ) -> None:
        self._going_on = going_on
        self._dispatcher = dispatcher
        self._registry = dispatcher.registry
        self._refresh = Refresh(self._registry, pool)
        self._networks = networks
        self._terms: LeaseTerms | None = None
        self._confirmation = pb.HeartbeatResponse()
        self._watches: set[Watch] = set()
        self._history = History(self._registry)
        self._picks = Picks()
        self._pick_ttl = convert.duration(self._picks.ttl_s)

    def close(self) -> None:
        """End the watches, which would not end by themselves, and the picks."""
        for watch in self._watches:
            watch.close()
        self._picks.close()

    async def Register(self, request: pb.RegisterRequest, context: Context) -> pb.RegisterResponse:
        spec = spec_from_pb(request)
        await self._networks.check(spec.address)
        await self._check_id(spec)
        worker = self._registry.register(spec, convert.load_from_pb(request.load))
        return pb.RegisterResponse(
            lease_id=worker.lease_id,
            time_to_live=convert.duration(worker.terms.time_to_live_s),
            heartbeat_interval=convert.duration(worker.terms.heartbeat_interval_s),
        )

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatResponse:
        worker = self._registry.heartbeat(request.lease_id, convert.load_from_pb(request.load))
        confirmation = self._confirm(worker.terms)
        drain = worker.health.drain
        if drain is None:
            if not worker.health.undrain:
                return confirmation
            response = pb.HeartbeatResponse(undrain=True)
            response.MergeFrom(confirmation)
            return response
        response = pb.HeartbeatResponse(drain=pb.DrainOrder())
        response.MergeFrom(confirmation)
        if drain.timeout_s is not None:
            response.drain.timeout.CopyFrom(convert.duration(drain.timeout_s))
        return response

    async def Deregister(self, request: pb.DeregisterRequest, context: Context) -> pb.DeregisterResponse:
        self._registry.deregister(request.lease_id)
        return pb.DeregisterResponse()

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Context) -> pb.ListWorkersResponse:
        return await workers_page(self._registry, request)

    async def GetWorker(self, request: pb.GetWorkerRequest, context: Context) -> pb.GetWorkerResponse:
        return pb.GetWorkerResponse(worker=worker_to_pb(self._registry.worker(request.worker_id), self._registry))

    async def WatchWorkers(
        self, request: pb.WatchWorkersRequest, context: Context
    ) -> AsyncIterator[pb.WatchWorkersResponse]:
        missed = self._history.since(request.resume_version) if request.resume_version else None
        watch = Watch(self._registry, request.model, loads=not request.exclude_load, resumed=missed)
        self._watches.add(watch)
        version = self._history.version
        try:
            if missed is None:
                snapshot = [(ChangeKind.ADDED, worker) for worker in watch.initial]
                for message in change_batches(snapshot, self._registry, version, snapshot=True):
                    yield message
            else:
                yield pb.WatchWorkersResponse(version=request.resume_version)  # it stands; nothing is forgotten
            while changes := await watch.next():
                for message in change_batches(changes, self._registry, self._history.version):
                    yield message
                await asyncio.sleep(WATCH_PAUSE_S)
        finally:
            self._watches.discard(watch)
            watch.close()

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return await models_page(self._registry.catalogue(), request)

    async def PickWorker(self, request: pb.PickWorkerRequest, context: Context) -> pb.PickWorkerResponse:
        reservation = self._dispatcher.pick(
            PickRequest(
                model=request.model,
                adapter=request.lora_adapter,
                key=request.session_key,
                prefers=capabilities_asked(request.capabilities),
                excluded=excluded(request.excluded_worker_ids),
            )
        )
        spec = reservation.worker.spec
        return pb.PickWorkerResponse(
            address=spec.address,
            worker_id=spec.worker_id,
            instance_id=spec.instance_id,
            pick_id=self._picks.hold(reservation),
            time_to_live=self._pick_ttl,
        )

    async def ReleasePick(self, request: pb.ReleasePickRequest, context: Context) -> pb.ReleasePickResponse:
        self._picks.release(request.pick_id)
        return pb.ReleasePickResponse()

    async def ContinueStream(self, request: pb.ContinueStreamRequest, context: Context) -> pb.ContinueStreamResponse:
        if self._going_on is None:
            raise NotSupported("this controller picks for no gateways: the extra `gateway` is not installed")
        return await self._going_on.answer(request)

    async def DrainWorker(self, request: pb.DrainWorkerRequest, context: Context) -> pb.DrainWorkerResponse:
        timeout_s = convert.seconds(request.timeout) if request.HasField("timeout") else None
        if timeout_s is not None and not 0 <= timeout_s <= MAX_SECONDS:
            raise InvalidArgument("timeout", f"must be from 0 to {MAX_SECONDS:g} s, got {timeout_s:g}")
        worker = self._registry.drain(request.worker_id, timeout_s)
        return pb.DrainWorkerResponse(running_count=max(worker.load.running, worker.reserved_count))

    async def UndrainWorker(self, request: pb.UndrainWorkerRequest, context: Context) -> pb.UndrainWorkerResponse:
        self._registry.undrain(request.worker_id)
        return pb.UndrainWorkerResponse()

    async def RefreshWorkers(self, request: pb.RefreshWorkersRequest, context: Context) -> pb.RefreshWorkersResponse:
        live, removed = await self._refresh.run()
        return pb.RefreshWorkersResponse(
            live_worker_ids=[worker.spec.worker_id for worker in live],
            removed_worker_ids=[worker.spec.worker_id for worker in removed],
        )

    async def _check_id(self, spec: WorkerSpec) -> None:
        """A process takes the id of another over when that one is gone, and not while it answers at its address.

        Raises WorkerIdInUse.
        """
        holder = self._registry.holder(spec)
        if holder is not None and await self._refresh.answers(holder) and holder.removed is None:
            raise WorkerIdInUse(
                f"worker {spec.worker_id!r} is another process, which answers at {holder.spec.address}; "
                "two workers must not share a worker id (set --worker-id)",
                metadata={"worker_id": spec.worker_id},
            )

    def _confirm(self, terms: LeaseTerms) -> pb.HeartbeatResponse:
        """The answer to most heartbeats; built anew only when the terms change."""
        if terms is not self._terms:
            self._terms = terms
            self._confirmation = pb.HeartbeatResponse(
                time_to_live=convert.duration(terms.time_to_live_s),
                heartbeat_interval=convert.duration(terms.heartbeat_interval_s),
            )
        return self._confirmation
