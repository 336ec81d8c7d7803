"""Completions: Envoy's access log tells the controller when a request that it picked a worker for has ended."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc

from fastchat_grpc.config import join_address
from fastchat_grpc.controller.envoy.tickets import Ticket, Tickets
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.rpc.bridge import TICKET_HEADER

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE_NAME = "envoy.service.accesslog.v3.AccessLogService"
GRACE_S = 5.0
"""A gateway whose log streams have all ended may come back within this time; then its tickets are void."""


class Completions(als_pb2_grpc.AccessLogServiceServicer):  # type: ignore[misc]
    """The access log service. It releases reservations, and tells the registry of workers that failed.

    Args:
        authorize: raises for callers that do not belong to the fleet; gets the call's metadata.
    """

    def __init__(self, registry: Registry, tickets: Tickets, authorize: Callable[[Any], None]) -> None:
        self._registry = registry
        self._tickets = tickets
        self._authorize = authorize
        self._streams: Counter[str] = Counter()

    async def StreamAccessLogs(
        self, requests: AsyncIterator[als_pb2.StreamAccessLogsMessage], context: Context
    ) -> als_pb2.StreamAccessLogsResponse:
        self._authorize(context.invocation_metadata())
        gateway = ""
        try:
            async for message in requests:
                if message.HasField("identifier") and not gateway:
                    gateway = message.identifier.node.id
                    self._streams[gateway] += 1
                for entry in message.http_logs.log_entry:
                    self._ended(entry)
        finally:
            if gateway:
                self._left(gateway)
        return als_pb2.StreamAccessLogsResponse()

    def _left(self, gateway: str) -> None:
        self._streams[gateway] -= 1
        if not self._streams[gateway]:
            del self._streams[gateway]
            asyncio.get_running_loop().call_later(GRACE_S, self._forget, gateway)

    def _forget(self, gateway: str) -> None:
        if gateway not in self._streams and (count := self._tickets.void(gateway)):
            logger.warning("gateway %s is gone; %d of its requests count as ended", gateway, count)

    def _ended(self, entry: accesslog_pb2.HTTPAccessLogEntry) -> None:
        ticket = self._tickets.take(entry.request.request_headers.get(TICKET_HEADER, ""))
        if ticket is None:
            return
        common = entry.common_properties
        flags = common.response_flags
        answered = common.HasField("time_to_first_upstream_rx_byte")
        upstream = common.upstream_remote_address.socket_address
        at_first = not upstream.address or join_address(upstream.address, upstream.port_value) == ticket.place
        if not at_first and common.upstream_request_attempt_count > 1:
            self._passed_over(ticket)
        elif flags.upstream_connection_failure or flags.upstream_remote_reset or flags.upstream_connection_termination:
            ticket.reservation.failed()
            ticket.reservation.suspect()
        elif answered and at_first:
            ticket.reservation.succeeded()

    def _passed_over(self, ticket: Ticket) -> None:
        """Envoy went on to another worker: the first was full, or it failed. The log does not say which."""
        worker = ticket.reservation.worker
        if worker.load.max_running and not worker.ledger.room:
            self._registry.full(worker)
        else:
            ticket.reservation.suspect()
