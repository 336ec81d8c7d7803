"""The picker: Envoy asks it, for each request of a model, who may have it and where it goes.

Envoy's external authorization calls `Check` after the transcoder, so that JSON and gRPC requests look
alike: gRPC-framed messages. The answer names workers as dynamic metadata, the first of them reserved; Envoy
takes the next one when a worker fails or refuses before its first message, and nobody that is not named.

A gateway with several controllers asks them one after the other until one has a worker. Only the last one's
refusal is the caller's answer; the others leave word of theirs in a header.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import quote

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.auth.v3 import external_auth_pb2 as auth
from envoy.service.auth.v3 import external_auth_pb2_grpc
from envoy.type.v3 import http_status_pb2
from google.protobuf import struct_pb2
from google.rpc import status_pb2

from fastchat_grpc.config import DispatchMethod
from fastchat_grpc.controller.dispatch import PickRequest
from fastchat_grpc.controller.envoy.eds import Endpoints
from fastchat_grpc.controller.envoy.pick import Pick
from fastchat_grpc.controller.envoy.requests import Asked, read_request
from fastchat_grpc.controller.envoy.tickets import Tickets
from fastchat_grpc.controller.fleet import Reservation, Worker
from fastchat_grpc.controller.relay import Relay
from fastchat_grpc.errors import AdapterNotFound, Code, FastChatError, ModelNotFound, NoLiveWorker, Starting
from fastchat_grpc.openai.jsonio import dumps
from fastchat_grpc.rpc import bridge
from fastchat_grpc.rpc.api_keys import HEADERS, ApiKeys
from fastchat_grpc.rpc.http_errors import HTTP_STATUS, error_object
from fastchat_grpc.rpc.status import error_to_status

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE_NAME = "envoy.service.auth.v3.Authorization"
CHOICES = 3
"""Workers that are named, where the gateway does not say how many it tries."""
PATIENCE_S = 1.0
"""A request waits this long for a gateway to learn of the only workers that can take it."""
COMING_PATIENCE_S = 3.0
"""And this long for a worker that is to come back: longer than from one heartbeat to the next."""
LOOK_S = 0.25
"""Who waits looks again this often, whatever happens."""
RETRY_AFTER_S = 1.0
"""When to ask again, where a refusal for the time being does not say it."""
_PASSING = (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)


class _Terms(NamedTuple):
    """What the gateway's configuration says of a request."""

    gateway: str
    choices: int
    final: bool
    missed: str

    @staticmethod
    def read(extensions: Mapping[str, str], headers: Mapping[str, str]) -> _Terms:
        choices = extensions.get(bridge.CHOICES_KEY, "")
        return _Terms(
            extensions.get(bridge.GATEWAY_KEY, ""),
            int(choices) if choices.isdecimal() else CHOICES,
            extensions.get(bridge.FINAL_KEY, "") == "1",
            headers.get(bridge.MISSED_HEADER, ""),
        )


class Picker(external_auth_pb2_grpc.AuthorizationServicer):  # type: ignore[misc]
    """The authorization service.

    Args:
        relay: knows the dispatcher, and what requests are grouped by.
    """

    def __init__(self, relay: Relay, endpoints: Endpoints, tickets: Tickets, keys: ApiKeys) -> None:
        self._dispatcher = relay.dispatcher
        self._registry = relay.dispatcher.registry
        by_prefix = self._dispatcher.method is DispatchMethod.PREFIX_AFFINITY
        self._key_of = relay.affinity_key if by_prefix else None
        self._endpoints = endpoints
        self._tickets = tickets
        self._keys = keys
        self._budget = relay.failover.budget

    async def Check(self, request: auth.CheckRequest, context: Context) -> auth.CheckResponse:
        http, extensions = request.attributes.request.http, request.attributes.context_extensions
        key_only = extensions.get(bridge.KEY_ONLY_KEY, "") == "1"
        try:
            client = self._keys.check(http.headers.items())
            if key_only:
                return auth.CheckResponse(status=status_pb2.Status(code=0), ok_response=auth.OkHttpResponse())
            encoding = http.headers.get("grpc-encoding", "identity")
            asked = await read_request(http.path.partition("?")[0], encoding, http.raw_body, self._key_of)
            terms = _Terms.read(extensions, http.headers)
            try:
                reservation, place = await self._reserve(asked, terms)
            except (ModelNotFound, AdapterNotFound, NoLiveWorker, Starting) as error:
                if not terms.final:
                    return _missed(error, terms)
                raise _verdict(error, terms) from None
            return self._admit(asked, terms, client, reservation, place)
        except FastChatError as error:
            # The transcoder makes OpenAI's error of a status; before it has read a request it can't.
            return _denied(error, as_json=key_only)

    async def _reserve(self, asked: Asked, terms: _Terms) -> tuple[Reservation, str]:
        """A worker, and where the gateway finds it.

        Waits a moment for one that is new, here or to the gateway, and, as a relayed call does, for one that was
        lost a moment ago. Where other controllers are asked next, it may be well there: then it is left to them.
        """
        began = monotonic()
        while True:
            patience_s: float = PATIENCE_S
            coming: str | None = None
            try:
                found = self._pick(asked, terms.gateway)
                if found is not None:
                    return found
                trouble: FastChatError = NoLiveWorker(
                    "no worker of the model can be reached through this gateway now",
                    metadata={"model": asked.model[:128]},
                )
            except (Starting, NoLiveWorker) as error:
                trouble = error
                coming = self._coming(asked, error)
                if coming is None:
                    raise
                patience_s = COMING_PATIENCE_S if terms.final else 0.0
            left_s = began + patience_s - monotonic()
            if left_s <= 0:
                raise trouble
            await self._news(min(left_s, LOOK_S), coming)

    def _coming(self, asked: Asked, error: FastChatError) -> str | None:
        """The model of which a worker is known to come back, or may to a controller that has just started."""
        model = asked.adapter or asked.model
        if isinstance(error, Starting):
            return model
        with contextlib.suppress(FastChatError):
            model, _ = self._registry.pool(model)
        return model if self._registry.recovering(model) else None

    async def _news(self, timeout_s: float, coming: str | None) -> None:
        """Return when a worker of the model that is to come, or a gateway, has come, or after `timeout_s` seconds."""
        if coming is not None:
            await self._registry.room.wait(coming, timeout_s)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._endpoints.acked()

    def _pick(self, asked: Asked, gateway: str) -> tuple[Reservation, str] | None:
        """A worker that the gateway knows, reserved; None where there are only workers that it does not know yet."""
        request = _pick_request(asked)
        reservation = self._dispatcher.pick(request)
        place = self._endpoints.location(reservation.worker, gateway)
        if place is not None:
            return reservation, place
        reservation.release()
        if not self._endpoints.cluster(gateway):
            return None  # it is not connected here, and so has nobody
        try:
            reservation = self._dispatcher.pick(request._replace(reaches=self._known_to(gateway)))
        except NoLiveWorker:
            return None
        place = self._endpoints.location(reservation.worker, gateway)
        assert place is not None, "it was picked by this"
        return reservation, place

    def _known_to(self, gateway: str) -> Callable[[Worker], bool]:
        return lambda worker: self._endpoints.location(worker, gateway) is not None

    def _admit(
        self, asked: Asked, terms: _Terms, client: str, reservation: Reservation, place: str
    ) -> auth.CheckResponse:
        self._budget.request()
        worker = reservation.worker
        further = self._further(asked, terms, {worker.spec.instance_id})
        further.pop(place, None)
        ticket = self._tickets.issue(terms.gateway, reservation, place, further)
        metadata = struct_pb2.Struct()
        pick = Pick.of(asked, ticket, terms.gateway, terms.choices, events=asked.stream and not asked.typed)
        metadata.update(
            {
                bridge.PLACES_KEY: ",".join((place, *further)),
                bridge.CONTINUE_KEY: pick.encode(),
                "client": client,
                "model": asked.model,
                "worker": worker.spec.worker_id,
            }
        )
        headers = {
            bridge.TICKET_HEADER: ticket,
            bridge.CLUSTER_HEADER: self._endpoints.cluster(terms.gateway),
            # As many as there are workers to go to, so that what the last of them answers is what is answered.
            "x-envoy-max-retries": str(len(further)),
            **({bridge.CLIENT_HEADER: client} if client else {}),
            **({bridge.STREAM_HEADER: "1"} if asked.stream else {}),
        }
        # Workers need not see the keys of callers.
        removed = [bridge.MISSED_HEADER, *(HEADERS if self._keys.required else ())]
        return auth.CheckResponse(
            status=status_pb2.Status(code=0),
            ok_response=auth.OkHttpResponse(
                headers=[_header(name, value) for name, value in headers.items()], headers_to_remove=removed
            ),
            dynamic_metadata=metadata,
        )

    def _further(self, asked: Asked, terms: _Terms, excluded: set[str]) -> dict[str, Worker]:
        """Workers to go to when the first one fails or refuses, by their places."""
        found: dict[str, Worker] = {}
        request = _pick_request(asked)._replace(excluded=excluded, reaches=self._known_to(terms.gateway))
        while len(found) < terms.choices - 1:
            try:
                _, worker = self._dispatcher.choose(request)
            except NoLiveWorker:
                break
            excluded.add(worker.spec.instance_id)
            if (place := self._endpoints.location(worker, terms.gateway)) is not None:
                found[place] = worker
        return found


def _pick_request(asked: Asked) -> PickRequest:
    request = PickRequest(model=asked.model, adapter=asked.adapter, key=asked.key, prefers=asked.prefers)
    return request.going_on(asked.resumed) if asked.resumed is not None else request


def _header(name: str, value: str) -> base_pb2.HeaderValueOption:
    return base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=name, value=value),
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )


def _missed(error: FastChatError, terms: _Terms) -> auth.CheckResponse:
    """No refusal yet: the gateway asks another controller, and tells it what this one would have said."""
    passing = str(int(Code.UNAVAILABLE))
    word = passing if error.code is Code.UNAVAILABLE or terms.missed == passing else str(int(Code.NOT_FOUND))
    return auth.CheckResponse(
        status=status_pb2.Status(code=0), ok_response=auth.OkHttpResponse(headers=[_header(bridge.MISSED_HEADER, word)])
    )


def _verdict(error: FastChatError, terms: _Terms) -> FastChatError:
    """The refusal of all controllers: a model that one of them knows is not unknown."""
    if error.code is Code.NOT_FOUND and terms.missed == str(int(Code.UNAVAILABLE)):
        return NoLiveWorker("no worker of the model can take a request now", metadata=error.metadata)
    return error


def _denied(error: FastChatError, *, as_json: bool = False) -> auth.CheckResponse:
    """A refusal. Envoy makes a gRPC response of it, which the transcoder turns into HTTP for JSON callers."""
    if error.code in _PASSING and error.retry_after_s is None:
        error.retry_after_s = RETRY_AFTER_S
    status = error_to_status(error)
    details = base64.b64encode(status.SerializeToString()).decode().rstrip("=")
    headers = [
        _header("grpc-status", str(int(error.code))),
        _header("grpc-message", quote(error.message, safe=" !#$&'()*+,/:;=?@[]~-._")),
        _header("grpc-status-details-bin", details),
    ]
    if error.retry_after_s is not None:
        headers.append(_header("retry-after", str(max(1, round(error.retry_after_s)))))
    code: Any = HTTP_STATUS.get(error.code, 500)
    body = ""
    if as_json:
        body = dumps(error_object(error)).decode()
        headers.append(_header("content-type", "application/json"))
    return auth.CheckResponse(
        status=status_pb2.Status(code=int(error.code), message=error.message),
        denied_response=auth.DeniedHttpResponse(
            status=http_status_pb2.HttpStatus(code=code), headers=headers, body=body
        ),
    )
