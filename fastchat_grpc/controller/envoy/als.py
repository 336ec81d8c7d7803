"""ALS: Envoy's access log tells the controller what became of the requests that it picked workers for.

Each attempt at a worker is an entry of its own, with the gRPC status that the worker gave; at last comes the
end of the request. So nothing is guessed: what a worker said counts as it does for requests that the controller
relays, and only where it said nothing Envoy's flags tell how the connection ended.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import enum
import logging
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from fastchat_grpc.config import join_address
from fastchat_grpc.controller.envoy.tickets import Ticket, Tickets
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.errors import Code
from fastchat_grpc.rpc.bridge import TICKET_HEADER
from fastchat_grpc.rpc.printable import printable

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE_NAME = "envoy.service.accesslog.v3.AccessLogService"
GRACE_S = 5.0
"""A gateway whose log streams have all ended may come back within this time; then its tickets are void."""
LOST_S = 60.0
"""What Envoy logs while a log stream is broken is lost: tickets that are open this long after are void."""


class Outcome(enum.Enum):
    """What an attempt says of its worker."""

    GOOD = "good"
    """It answered in full."""
    FAULT = "fault"
    """It failed the request."""
    LOST = "lost"
    """It went away, or could not be reached."""
    FULL = "full"
    """It has no room."""
    ELSEWHERE = "elsewhere"
    """It is healthy and takes no such request now: it drains, starts, or has other models."""
    NOTHING = "nothing"
    """The request or its caller is why it ended."""


_BY_REASON = {
    "QUEUE_FULL": Outcome.FULL,
    "DRAINING": Outcome.ELSEWHERE,
    "STARTING": Outcome.ELSEWHERE,
    "MODEL_NOT_FOUND": Outcome.ELSEWHERE,
}
_BY_CODE = {
    Code.OK: Outcome.GOOD,
    Code.INTERNAL: Outcome.FAULT,
    Code.UNKNOWN: Outcome.FAULT,
    Code.DATA_LOSS: Outcome.FAULT,
    Code.UNAVAILABLE: Outcome.LOST,
}


def outcome(entry: accesslog_pb2.HTTPAccessLogEntry) -> Outcome:
    """What the log entry of an attempt says. Pure."""
    code, reason = _status(entry)
    if code is not None:
        return _BY_REASON.get(reason) or _BY_CODE.get(code, Outcome.NOTHING)
    flags = entry.common_properties.response_flags
    if (
        flags.upstream_connection_failure
        or flags.upstream_remote_reset
        or flags.upstream_connection_termination
        or flags.upstream_request_timeout
    ):
        return Outcome.LOST
    answered = entry.response.response_code.value
    # Some other server is where the worker was.
    return Outcome.LOST if answered and answered != 200 else Outcome.NOTHING


def _status(entry: accesslog_pb2.HTTPAccessLogEntry) -> tuple[Code | None, str]:
    """The gRPC code that the worker gave, None if it gave none; and our reason, if there is one."""
    response = entry.response
    for fields in (response.response_trailers, response.response_headers):
        code = fields.get("grpc-status", "")
        if code.isdecimal():
            known = {int(known): known for known in Code}
            return known.get(int(code), Code.UNKNOWN), _reason(fields.get("grpc-status-details-bin", ""))
    return None, ""


def _reason(details: str) -> str:
    try:
        status = status_pb2.Status.FromString(base64.b64decode(details + "=" * (-len(details) % 4)))
    except (binascii.Error, DecodeError, ValueError):
        return ""
    info = error_details_pb2.ErrorInfo()
    return next((str(info.reason) for detail in status.details if detail.Unpack(info)), "")


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
        self._judge(ticket, outcome(entry))

    def _judge(self, ticket: Ticket, found: Outcome) -> None:
        worker = ticket.reservation.worker
        match found:
            case Outcome.GOOD:
                ticket.reservation.succeeded()
                return
            case Outcome.NOTHING:
                return
            case Outcome.FULL:
                ticket.reservation.release()  # it is not there, and must not count as what fills the worker
                self._registry.full(worker)
            case Outcome.FAULT:
                self._registry.failed(worker)
                return  # it is not tried elsewhere
            case Outcome.LOST:
                self._registry.lost(worker)
            case Outcome.ELSEWHERE:
                self._registry.suspect(worker)
        if ticket.further:
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
