"""Asks workers whether they are there: to remove those that are gone before their leases end, never one that lives.

A worker is gone where its address refuses connections, leads nowhere, or is answered by another process.
One that is slow, or that cannot be asked for want of something here (descriptors, a name server), stays.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence

import grpc
from google.protobuf.message import DecodeError

from fastchat_grpc.config import split_address
from fastchat_grpc.controller.fleet import Worker
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.rpc.pool import ChannelPool
from fastchat_grpc.v1 import generation_pb2 as pb

TIMEOUT_S = 3.0
HOLDER_TIMEOUT_S = 1.0
"""A process that registers waits this long for the one that has its id; its call lasts a little longer."""
PARALLEL = 16
"""Workers that are asked at once: each takes a descriptor meanwhile."""
GET_STATUS = "/fastchat_grpc.v1.GenerationService/GetStatus"

_GONE = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EHOSTDOWN})


class Refresh:
    """Asks workers whether they are there."""

    def __init__(self, registry: Registry, pool: ChannelPool) -> None:
        self._registry = registry
        self._pool = pool
        self._places = asyncio.Semaphore(PARALLEL)

    async def run(self) -> tuple[Sequence[Worker], Sequence[Worker]]:
        """Remove the workers that are gone. Returns those that stay and those that were removed, by id."""
        workers = list(self._registry.workers())
        gone = await asyncio.gather(*(self._gone(worker) for worker in workers))
        left = [worker for worker, is_gone in zip(workers, gone, strict=True) if is_gone]
        for worker in left:
            self._registry.drop(worker)
        return [worker for worker, is_gone in zip(workers, gone, strict=True) if not is_gone], left

    async def answers(self, worker: Worker) -> bool:
        """Whether this very process answers at its address. False also where it cannot be asked, or is slow."""
        try:
            async with self._places:
                raw = await self._pool.ask(worker.spec.address, GET_STATUS, b"", HOLDER_TIMEOUT_S)
            return pb.GetStatusResponse.FromString(raw).instance_id == worker.spec.instance_id
        except (grpc.aio.AioRpcError, DecodeError):
            return False

    async def _gone(self, worker: Worker) -> bool:
        if self._fresh(worker):
            return False
        async with self._places:
            asked_at = worker.heartbeat_at
            gone = await self._asked(worker)
        return gone and worker.heartbeat_at == asked_at  # a heartbeat meanwhile is proof enough

    def _fresh(self, worker: Worker) -> bool:
        """Whether its own heartbeats say that it lives, and nothing says otherwise."""
        if not worker.spec.check_heartbeat or worker.health.recovering:
            return False
        return self._registry.heartbeat_age_s(worker) <= 1.5 * worker.terms.heartbeat_interval_s

    async def _asked(self, worker: Worker) -> bool:
        """Ask the process at the worker's address who it is; whether the worker is gone."""
        if await _leads_nowhere(worker.spec.address):
            return True
        try:
            raw = await self._pool.ask(worker.spec.address, GET_STATUS, b"", TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False  # somebody is there, and busy
        return pb.GetStatusResponse.FromString(raw).instance_id != worker.spec.instance_id


async def _leads_nowhere(address: str) -> bool:
    """Whether nobody accepts connections at an address. A failure of this side's own is no evidence."""
    host, port = split_address(address)
    try:
        # Apart from the connection: a name server that is slow, or busy with other names, is no evidence either.
        async with asyncio.timeout(TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except TimeoutError:
        return False
    except UnicodeError:
        return True  # a name that is none
    except OSError as error:
        return error.errno == socket.EAI_NONAME
    return all(await asyncio.gather(*(_refuses(str(where[0]), port) for *_, where in found)))


async def _refuses(ip: str, port: int) -> bool:
    """Whether nobody accepts connections at one address."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            _, writer = await asyncio.open_connection(ip, port)
    except TimeoutError:
        return True  # not even the kernel there answers
    except OSError as error:
        return error.errno in _GONE
    writer.close()
    return False
