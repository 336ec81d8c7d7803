"""The picker: Envoy asks it, for each request of a model, who may have it and where it goes.

Envoy's external authorization calls `Check` after the transcoder, so that JSON and gRPC requests look
alike: gRPC-framed messages. The answer names up to three workers as dynamic metadata, the first of them
reserved; Envoy takes the next one when a worker fails or refuses before its first message.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import zlib
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import quote

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.auth.v3 import external_auth_pb2 as auth
from envoy.service.auth.v3 import external_auth_pb2_grpc
from envoy.type.v3 import http_status_pb2
from google.api.httpbody_pb2 import HttpBody
from google.protobuf import struct_pb2
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from fastchat_grpc.config import MAX_MESSAGE_BYTES, DispatchMethod
from fastchat_grpc.controller.dispatch import PickRequest
from fastchat_grpc.controller.envoy.eds import Endpoints
from fastchat_grpc.controller.envoy.tickets import Tickets
from fastchat_grpc.controller.fleet import Reservation
from fastchat_grpc.controller.relay import AFFINITY_CHARACTERS, Relay
from fastchat_grpc.errors import FastChatError, InvalidArgument, NoLiveWorker
from fastchat_grpc.openai.jsonio import parse_object
from fastchat_grpc.rpc.api_keys import HEADERS, ApiKeys
from fastchat_grpc.rpc.bridge import CLIENT_HEADER, GATEWAY_KEY, PLACES_KEY, TICKET_HEADER
from fastchat_grpc.rpc.http_errors import HTTP_STATUS
from fastchat_grpc.rpc.status import error_to_status
from fastchat_grpc.v1 import generation_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE_NAME = "envoy.service.auth.v3.Authorization"
CHOICES = 3
PATIENCE_S = 0.5
"""A request waits this long for a gateway to learn of the only workers that can take it."""
_FRAME = 5  # a flag for compression, and four bytes of length
_OPENAI = "/fastchat_grpc.v1.OpenAIService/"
_TYPED: dict[str, Any] = {
    "/fastchat_grpc.v1.GenerationService/Generate": pb.GenerateRequest,
    "/fastchat_grpc.v1.GenerationService/Embed": pb.EmbedRequest,
}


class Wish(NamedTuple):
    """What a request asks for: a model, and what prefix_affinity goes by."""

    model: str
    key: str = ""


class Picker(external_auth_pb2_grpc.AuthorizationServicer):  # type: ignore[misc]
    """The authorization service.

    Args:
        relay: knows the dispatcher, and what requests are grouped by.
        authorize: raises for callers that do not belong to the fleet; gets the call's metadata.
    """

    def __init__(
        self, relay: Relay, endpoints: Endpoints, tickets: Tickets, keys: ApiKeys, authorize: Callable[[Any], None]
    ) -> None:
        self._relay = relay
        self._dispatcher = relay.dispatcher
        self._endpoints = endpoints
        self._tickets = tickets
        self._keys = keys
        self._authorize = authorize

    async def Check(self, request: auth.CheckRequest, context: Context) -> auth.CheckResponse:
        self._authorize(context.invocation_metadata())
        attributes = request.attributes
        http = attributes.request.http
        try:
            client = self._keys.check(http.headers.items())
            wish = self._read(http.path.partition("?")[0], http.headers, http.raw_body)
            gateway = attributes.context_extensions.get(GATEWAY_KEY, "")
            reservation, place = await self._reserve(wish, gateway)
            return self._admit(wish, gateway, client, reservation, place)
        except FastChatError as error:
            return _denied(error)

    def _read(self, path: str, headers: Mapping[str, str], body: bytes) -> Wish:
        """The model that a request names. Raises InvalidArgument as its worker would."""
        message = _unframe(body, headers.get("grpc-encoding", "identity"))
        try:
            if path in _TYPED:
                typed = _TYPED[path].FromString(message)
                return Wish(typed.model, self._relay.affinity_key(typed) if path.endswith("/Generate") else "")
            if path.startswith(_OPENAI):
                return self._read_json(parse_object(HttpBody.FromString(message).data))
        except DecodeError:
            raise InvalidArgument("body", "is not a valid message of this method") from None
        raise InvalidArgument("", "this method is not served through the picker")

    def _read_json(self, values: Mapping[str, Any]) -> Wish:
        model = values.get("model")
        if model is not None and not isinstance(model, str):
            raise InvalidArgument("model", "must be a string")
        wants_key = self._dispatcher.method is DispatchMethod.PREFIX_AFFINITY
        return Wish(model or "", _json_key(values) if wants_key else "")

    async def _reserve(self, wish: Wish, gateway: str) -> tuple[Reservation, str]:
        """A worker, and where the gateway finds it. Waits a moment for a worker that is new to the gateway."""
        deadline = monotonic() + PATIENCE_S
        while True:
            found, strangers = self._pick(wish, gateway)
            if found is not None:
                return found
            left_s = deadline - monotonic()
            if not strangers or left_s <= 0:
                raise NoLiveWorker(
                    "no worker of the model can take a request now", metadata={"model": wish.model[:128]}
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._endpoints.acked()

    def _pick(self, wish: Wish, gateway: str) -> tuple[tuple[Reservation, str] | None, bool]:
        """A worker that the gateway knows, reserved; and whether there are workers that it does not know yet."""
        excluded: set[str] = set()
        while True:
            try:
                reservation = self._dispatcher.pick(PickRequest(model=wish.model, key=wish.key, excluded=excluded))
            except NoLiveWorker:
                if not excluded:
                    raise
                return None, True
            place = self._endpoints.location(reservation.worker, gateway)
            if place is not None:
                return (reservation, place), bool(excluded)
            excluded.add(reservation.instance_id)
            reservation.release()

    def _admit(self, wish: Wish, gateway: str, client: str, reservation: Reservation, place: str) -> auth.CheckResponse:
        worker = reservation.worker.spec
        places = [place, *self._further(wish, gateway, {worker.instance_id})]
        ticket = self._tickets.issue(gateway, reservation, place)
        metadata = struct_pb2.Struct()
        metadata.update(
            {PLACES_KEY: ",".join(places), "client": client, "model": wish.model, "worker": worker.worker_id}
        )
        headers = [_header(TICKET_HEADER, ticket)]
        if client:
            headers.append(_header(CLIENT_HEADER, client))
        return auth.CheckResponse(
            status=status_pb2.Status(code=0),
            # Workers need not see the keys of callers.
            ok_response=auth.OkHttpResponse(headers=headers, headers_to_remove=HEADERS if self._keys.required else ()),
            dynamic_metadata=metadata,
        )

    def _further(self, wish: Wish, gateway: str, excluded: set[str]) -> list[str]:
        """Places to go to when the first worker fails or refuses."""
        places: list[str] = []
        while len(places) < CHOICES - 1:
            try:
                _, worker = self._dispatcher.choose(PickRequest(model=wish.model, key=wish.key, excluded=excluded))
            except NoLiveWorker:
                break
            excluded.add(worker.spec.instance_id)
            place = self._endpoints.location(worker, gateway)
            if place is not None:
                places.append(place)
        return places


def _header(name: str, value: str) -> base_pb2.HeaderValueOption:
    return base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=name, value=value),
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )


def _unframe(body: bytes, encoding: str) -> bytes:
    """The first gRPC message of a body."""
    length = int.from_bytes(body[1:_FRAME], "big")
    message = body[_FRAME : _FRAME + length]
    if len(body) < _FRAME or len(message) < length:
        raise InvalidArgument("body", "is cut short or is not a gRPC message")
    if not body[0]:
        return message
    if encoding not in ("gzip", "deflate"):
        raise InvalidArgument("body", "is compressed by a method other than gzip or deflate")
    try:
        inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
        message = inflater.decompress(message, MAX_MESSAGE_BYTES)
    except zlib.error:
        raise InvalidArgument("body", f"is not valid {encoding}") from None
    if inflater.unconsumed_tail:
        raise InvalidArgument("body", f"must have at most {MAX_MESSAGE_BYTES} bytes when decompressed")
    return message


def _json_key(values: Mapping[str, Any]) -> str:
    """What prefix_affinity groups an OpenAI request by: its cache key, or how its prompt begins."""
    if isinstance(named := values.get("prompt_cache_key"), str) and named:
        return named
    if isinstance(prompt := values.get("prompt"), str):
        return prompt[:AFFINITY_CHARACTERS]
    text = ""
    messages = values.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            content = message.get("content")
            text += f"{message.get('role')}:{content if isinstance(content, str) else ''}\n"
        if len(text) >= AFFINITY_CHARACTERS:
            break
    return text[:AFFINITY_CHARACTERS]


def _denied(error: FastChatError) -> auth.CheckResponse:
    """A refusal. Envoy makes a gRPC response of it, which the transcoder turns into HTTP for JSON callers."""
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
    return auth.CheckResponse(
        status=status_pb2.Status(code=int(error.code), message=error.message),
        denied_response=auth.DeniedHttpResponse(status=http_status_pb2.HttpStatus(code=code), headers=headers),
    )
