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
from google.protobuf import struct_pb2
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from fastchat_grpc.config import join_address
from fastchat_grpc.controller.envoy.tickets import Ticket, Tickets
from fastchat_grpc.controller.evidence import Evidence, evidence
from fastchat_grpc.controller.fleet import Worker
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.errors import Code, FastChatError
from fastchat_grpc.rpc.bridge import DETAILS_KEY, END_KEY, LUA_NAMESPACE, PLACE_KEY, TICKET_HEADER
from fastchat_grpc.rpc.printable import printable
from fastchat_grpc.rpc.retry import Verdict, judge
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
    return _without_status(entry) if status is None else _with_status(status)


def _with_status(status: status_pb2.Status) -> Attempted:
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
            return read_status(int(told), fields.get("grpc-status-details-bin", ""))
    return None


def read_status(told: int, details: str) -> status_pb2.Status:
    """A worker's status, from the code and the base64 text of its details in trailers."""
    code = told if told in _CODES else int(Code.UNKNOWN)
    found = _details(details)
    return found if found.code == code else status_pb2.Status(code=code)


_CODES = frozenset(map(int, Code))


def _text(values: struct_pb2.Struct, key: str) -> str:
    return values.fields[key].string_value if key in values.fields else ""


def _details(encoded: str) -> status_pb2.Status:
    """The status as a worker of ours tells it, with its reason; empty where there is none."""
    try:
        return status_pb2.Status.FromString(base64.b64decode(encoded + "=" * (-len(encoded) % 4)))
    except (binascii.Error, DecodeError, ValueError):
        return status_pb2.Status()


class Verdicts:
    """What the ends of attempts say of their workers, told to the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def apply(self, ticket: Ticket | None, worker: Worker, error: FastChatError, verdict: Verdict) -> None:
        """An attempt of a stream has ended with an error.

        Args:
            ticket: of the stream, if it has its reservation there.
        """
        self.judge(ticket, worker, evidence(error, verdict))

    def judge(self, ticket: Ticket | None, worker: Worker, found: Evidence) -> None:
        """An attempt has ended."""
        if found is not Evidence.GOOD:
            self._registry.counts.attempts[found.value] += 1
        match found:
            case Evidence.GOOD:
                if ticket is not None and ticket.reservation is not None:
                    ticket.reservation.succeeded()
            case Evidence.FULL:
                if ticket is not None:
                    ticket.release()  # it is not there, and must not count as what fills the worker
                self._registry.full(worker)
            case Evidence.FAULT:
                self._registry.failed(worker)
            case Evidence.LOST:
                self._registry.lost(worker)
            case Evidence.AWAY:
                self._registry.suspect(worker)
            case Evidence.NOTHING:
                pass


class Completions(als_pb2_grpc.AccessLogServiceServicer):  # type: ignore[misc]
    """The access log service. It releases reservations, and tells the registry how workers did.

    The attempts of streams that the gateway's module carries are no entries: it asks where to go on after each that
    failed (`going_on`), and says with the end of the request how the last one ended.
    """

    def __init__(self, registry: Registry, tickets: Tickets, verdicts: Verdicts) -> None:
        self._registry = registry
        self._tickets = tickets
        self._verdicts = verdicts
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
        ticket = self._tickets.get(name)
        if entry.common_properties.access_log_type == accesslog_pb2.UpstreamEnd:
            if ticket is not None:
                self._attempted(ticket, entry)
            return
        told = entry.common_properties.metadata.filter_metadata
        if ticket is not None and LUA_NAMESPACE in told:
            self._carried(ticket, told[LUA_NAMESPACE])
        if name:
            self._tickets.end(name)

    def _carried(self, ticket: Ticket, told: struct_pb2.Struct) -> None:
        """A stream that the gateway's module carried has ended; where that says nothing, its caller has left."""
        end, place = (_text(told, key) for key in (END_KEY, PLACE_KEY))
        if not end:
            return
        self._reached(ticket, place)
        if place == ticket.place:
            found = _LOST if not end.isdecimal() else _with_status(read_status(int(end), _text(told, DETAILS_KEY)))
            self._judge(ticket, found)

    def _reached(self, ticket: Ticket, place: str) -> None:
        """The request was there, though nothing was said of it."""
        if place in ticket.further:  # a worker before it was passed over without a word
            ticket.move_on(place, self._registry.reserve(ticket.further[place]))

    def _attempted(self, ticket: Ticket, entry: accesslog_pb2.HTTPAccessLogEntry) -> None:
        """An attempt has ended: what it says of its worker, and where the request goes next."""
        upstream = entry.common_properties.upstream_remote_address.socket_address
        place = join_address(upstream.address, upstream.port_value) if upstream.address else ticket.place
        self._reached(ticket, place)
        if place != ticket.place:
            return
        self._judge(ticket, attempted(entry))

    def _judge(self, ticket: Ticket, found: Attempted) -> None:
        if ticket.reservation is not None:
            self._verdicts.judge(ticket, ticket.reservation.worker, found.evidence)
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
