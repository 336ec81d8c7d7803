"""ALS: Envoy's access log tells the controller what became of the requests that it picked workers for.

Each attempt at a worker is an entry of its own, with the gRPC status that the worker gave; at last comes the
end of the request. So nothing is guessed: what a worker said counts as it does for requests that the controller
relays, and only where it said nothing Envoy's flags tell how the connection ended.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import grpc
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from fastchat_grpc.config import join_address
from fastchat_grpc.controller.envoy.tickets import Ticket, Tickets
from fastchat_grpc.controller.evidence import Evidence, evidence
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.errors import Code
from fastchat_grpc.rpc.bridge import TICKET_HEADER
from fastchat_grpc.rpc.printable import printable
from fastchat_grpc.rpc.retry import judge
from fastchat_grpc.rpc.status import error_from_status

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE_NAME = "envoy.service.accesslog.v3.AccessLogService"
GRACE_S = 5.0
"""A gateway whose log streams have all ended may come back within this time; then its tickets are void."""
LOST_S = 60.0
"""What Envoy logs while a log stream is broken is lost: tickets that are open this long after are void."""


_RETRIED = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.NOT_FOUND})
"""Statuses before the first message with which the gateway's routes go on to the next worker."""


class Attempted(NamedTuple):
    """What the log entry of an attempt says: of its worker, and whether the request goes on to the next one."""

    evidence: Evidence
    goes_on: bool


_GOOD = Attempted(Evidence.GOOD, goes_on=False)
_NOTHING = Attempted(Evidence.NOTHING, goes_on=False)
_LOST = Attempted(Evidence.LOST, goes_on=True)


def attempted(entry: accesslog_pb2.HTTPAccessLogEntry) -> Attempted:
    """What the log entry of an attempt says. Pure."""
    status = _status(entry)
    if status is None:
        return _without_status(entry)
    if status.code == Code.OK:
        return _GOOD
    if status.code == Code.CANCELLED:
        return _NOTHING  # a caller who leaves may be told so on the way out; a worker that stops resets the stream
    error = error_from_status(status)
    return Attempted(evidence(error, judge(error)), goes_on=error.code in _RETRIED)


def _without_status(entry: accesslog_pb2.HTTPAccessLogEntry) -> Attempted:
    flags = entry.common_properties.response_flags
    if (
        flags.upstream_connection_failure
        or flags.upstream_remote_reset
        or flags.upstream_connection_termination
        or flags.upstream_request_timeout
    ):
        return _LOST
    answered = entry.response.response_code.value
    # Some other server is where the worker was.
    return _LOST if answered and answered != 200 else _NOTHING


def _status(entry: accesslog_pb2.HTTPAccessLogEntry) -> status_pb2.Status | None:
    """The status that the worker gave; None if it gave none."""
    response = entry.response
    for fields in (response.response_trailers, response.response_headers):
        told = fields.get("grpc-status", "")
        if told.isdecimal():
            code = int(told) if int(told) in _CODES else int(Code.UNKNOWN)
            found = _details(fields.get("grpc-status-details-bin", ""))
            return found if found.code == code else status_pb2.Status(code=code)
    return None


_CODES = frozenset(map(int, Code))


def _details(encoded: str) -> status_pb2.Status:
    """The status as a worker of ours tells it, with its reason; empty where there is none."""
    try:
        return status_pb2.Status.FromString(base64.b64decode(encoded + "=" * (-len(encoded) % 4)))
    except (binascii.Error, DecodeError, ValueError):
        return status_pb2.Status()


class Completions(als_pb2_grpc.AccessLogServiceServicer):  # type: ignore[misc]
    """The access log service. It releases reservations, and tells the registry how workers did.

    Args:
    """

    def __init__(self, registry: Registry, tickets: Tickets) -> None:
        self._registry = registry
        self._tickets = tickets
        self._streams: Counter[str] = Counter()

    async def StreamAccessLogs(
        self, requests: AsyncIterator[als_pb2.StreamAccessLogsMessage], context: Context
    ) -> als_pb2.StreamAccessLogsResponse:
        gateway = ""
        try:
            async for message in requests:
                if message.HasField("identifier") and not gateway:
                    gateway = message.identifier.node.id
                    self._streams[gateway] += 1
                for entry in message.http_logs.log_entry:
                    self.tell(entry)
        finally:
            if gateway:
                self._left(gateway)
        return als_pb2.StreamAccessLogsResponse()

    def tell(self, entry: accesslog_pb2.HTTPAccessLogEntry) -> None:
        """Take one entry: an attempt of a request, or its end."""
        name = entry.request.request_headers.get(TICKET_HEADER, "")
        if entry.common_properties.access_log_type != accesslog_pb2.UpstreamEnd:
            self._tickets.take(name)
        elif (ticket := self._tickets.get(name)) is not None:
            self._attempted(ticket, entry)

    def _attempted(self, ticket: Ticket, entry: accesslog_pb2.HTTPAccessLogEntry) -> None:
        """An attempt has ended: what it says of its worker, and where the request goes next."""
        upstream = entry.common_properties.upstream_remote_address.socket_address
        place = join_address(upstream.address, upstream.port_value) if upstream.address else ticket.place
        if place in ticket.further:  # a worker before it was passed over without a word
            ticket.move_on(place, self._registry.reserve(ticket.further[place]))
        elif place != ticket.place:
            return
        self._judge(ticket, attempted(entry))

    def _judge(self, ticket: Ticket, found: Attempted) -> None:
        worker = ticket.reservation.worker
        match found.evidence:
            case Evidence.GOOD:
                ticket.reservation.succeeded()
            case Evidence.FULL:
                ticket.reservation.release()  # it is not there, and must not count as what fills the worker
                self._registry.full(worker)
            case Evidence.FAULT:
                self._registry.failed(worker)
            case Evidence.LOST:
                self._registry.lost(worker)
            case Evidence.AWAY:
                self._registry.suspect(worker)
            case Evidence.NOTHING:
                pass
        if found.goes_on and ticket.further:
            following, worker = next(iter(ticket.further.items()))
            ticket.move_on(following, self._registry.reserve(worker))

    # ---------------------------------------------------------------------------- gateways that go

    def _left(self, gateway: str) -> None:
        self._streams[gateway] -= 1
        loop = asyncio.get_running_loop()
        if not self._streams[gateway]:
            del self._streams[gateway]
            loop.call_later(GRACE_S, self._forget, gateway)
        loop.call_later(LOST_S, self._tickets.void, gateway, self._tickets.now())

    def _forget(self, gateway: str) -> None:
        if gateway not in self._streams and (count := self._tickets.void(gateway)):
            logger.warning("gateway %s is gone; %d of its requests count as ended", printable(gateway), count)
