"""The live workers and their models as messages, in pages that no call has to wait for."""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Any

from fastchat_grpc.controller.fleet import ChangeKind, Worker
from fastchat_grpc.controller.paging import ENTRIES_AT_ONCE, MAX_PAGE_BYTES, Position, page_size
from fastchat_grpc.controller.pools import FleetModel
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.rpc import convert
from fastchat_grpc.v1 import registry_pb2 as pb

CHANGES_PER_MESSAGE = 200
"""Changes of one message of a watch: a message is made at a time, and other calls get their turn in between."""

_KINDS: Mapping[ChangeKind, Any] = {
    ChangeKind.ADDED: pb.WORKER_CHANGE_TYPE_ADDED,
    ChangeKind.STATE: pb.WORKER_CHANGE_TYPE_UPDATED,
    ChangeKind.LOAD: pb.WORKER_CHANGE_TYPE_LOAD,
    ChangeKind.REMOVED: pb.WORKER_CHANGE_TYPE_REMOVED,
}


async def workers_page(registry: Registry, request: pb.ListWorkersRequest) -> pb.ListWorkersResponse:
    """The workers after a page token. Raises InvalidArgument."""
    size, prefix = page_size(request.page_size), request.worker_id_prefix
    states, labels = frozenset(request.states), dict(request.labels)
    position = Position(request.model, sorted(states), sorted(labels.items()), prefix)
    after = position.after(request.page_token)
    workers = registry.workers()  # replaced, not changed, when workers come and go
    response = pb.ListWorkersResponse()
    held = 0
    for seen, worker in enumerate(islice(workers, _start(workers, _worker_id, prefix, after), None), 1):
        if not worker.spec.worker_id.startswith(prefix):
            break
        if worker.removed is None and _listed(worker, request.model, states, labels):
            if len(response.workers) == size or held > MAX_PAGE_BYTES:
                response.next_page_token = position.token(response.workers[-1].worker_id)
                break
            entry = worker_to_pb(worker, registry)
            held += entry.ByteSize()
            response.workers.append(entry)
        if seen % ENTRIES_AT_ONCE == 0:
            await asyncio.sleep(0)
    return response


async def models_page(catalogue: Sequence[FleetModel], request: pb.ListModelsRequest) -> pb.ListModelsResponse:
    """The models after a page token. Raises InvalidArgument."""
    size, prefix = page_size(request.page_size), request.name_prefix
    position = Position(prefix, request.base_model)
    after = position.after(request.page_token)
    response = pb.ListModelsResponse()
    for seen, model in enumerate(islice(catalogue, _start(catalogue, _model_name, prefix, after), None), 1):
        if not model.info.name.startswith(prefix):
            break
        if not request.base_model or model.info.base_model == request.base_model:
            if len(response.models) == size:
                response.next_page_token = position.token(response.models[-1].model.name)
                break
            info = convert.model_to_pb(model.info)
            response.models.append(pb.FleetModel(model=info, worker_count=model.worker_count))
        if seen % ENTRIES_AT_ONCE == 0:
            await asyncio.sleep(0)
    return response


def change_batches(
    changes: Sequence[tuple[ChangeKind, Worker]], registry: Registry, version: str, *, snapshot: bool = False
) -> Iterator[pb.WatchWorkersResponse]:
    """Changes as messages of bounded size; at least one. The last alone says where the watcher is after it."""
    message = pb.WatchWorkersResponse(snapshot=snapshot)
    held = 0
    for kind, worker in changes:
        if len(message.changes) == CHANGES_PER_MESSAGE or held > MAX_PAGE_BYTES:
            yield message
            message = pb.WatchWorkersResponse(snapshot=snapshot)
            held = 0
        entry = (load_to_pb if kind is ChangeKind.LOAD else worker_to_pb)(worker, registry)
        held += entry.ByteSize()
        message.changes.append(pb.WorkerChange(type=_KINDS[kind], worker=entry))
    message.version = version
    yield message


def worker_to_pb(worker: Worker, registry: Registry) -> pb.Worker:
    """A worker as callers see it; its lease id stays secret."""
    spec = worker.spec
    return pb.Worker(
        worker_id=spec.worker_id,
        instance_id=spec.instance_id,
        address=spec.address,
        models=[convert.model_to_pb(model) for model in spec.models],
        weight=spec.weight,
        load=convert.load_to_pb(worker.load),
        labels=dict(spec.labels),
        check_heartbeat=spec.check_heartbeat,
        reserved_count=worker.reserved_count,
        heartbeat_age=convert.duration(registry.heartbeat_age_s(worker)),
        suspect=worker.health.suspect or worker.health.unreachable,
        version=spec.version,
    )


def load_to_pb(worker: Worker, registry: Registry) -> pb.Worker:
    """What heartbeats change of a worker, and whose it is."""
    return pb.Worker(
        worker_id=worker.spec.worker_id,
        instance_id=worker.spec.instance_id,
        load=convert.load_to_pb(worker.load),
        reserved_count=worker.reserved_count,
        heartbeat_age=convert.duration(registry.heartbeat_age_s(worker)),
    )


def _start(entries: Sequence[Any], name: Any, prefix: str, after: str) -> int:
    """Index of the first entry, ordered by name, that may have a prefix and comes after another's name."""
    return max(bisect_left(entries, prefix, key=name), bisect_right(entries, after, key=name) if after else 0)


def _listed(worker: Worker, model: str, states: AbstractSet[Any], labels: Mapping[str, str]) -> bool:
    return (
        (not model or (worker.replicas is not None and model in worker.replicas.models))
        and (not states or convert.state_to_pb(worker.load.state) in states)
        and all(worker.spec.labels.get(key) == value for key, value in labels.items())
    )


def _worker_id(worker: Worker) -> str:
    return worker.spec.worker_id


def _model_name(model: FleetModel) -> str:
    return model.info.name
