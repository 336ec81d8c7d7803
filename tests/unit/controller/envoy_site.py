"""A controller's services for Envoy without Envoy: a fleet, and what Envoy would ask and log."""

from __future__ import annotations

import base64
import json
from typing import Any

from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.auth.v3 import external_auth_pb2 as auth
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.config import ApiKeyConfig, DispatchMethod, FailoverConfig
from fastchat_grpc.controller.dispatch import Dispatcher
from fastchat_grpc.controller.envoy.services import EnvoyServices
from fastchat_grpc.controller.fleet import Worker, WorkerSpec
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.controller.relay import Relay
from fastchat_grpc.core import Capability, Load, ModelInfo
from fastchat_grpc.errors import (
    FastChatError,
)
from fastchat_grpc.rpc.api_keys import ApiKeys
from fastchat_grpc.rpc.bridge import (
    FINAL_KEY,
    GATEWAY_KEY,
    PLACES_KEY,
    TICKET_HEADER,
)
from fastchat_grpc.rpc.pool import ChannelPool
from fastchat_grpc.rpc.status import error_to_status

CHAT = "/fastchat_grpc.v1.OpenAIService/ChatCompletions"
GENERATE = "/fastchat_grpc.v1.GenerationService/Generate"
KEY = "sk-of-alice-1234"
NO_KEYS = ApiKeyConfig()
FREE = Load(max_running=4)


class Context:
    def invocation_metadata(self) -> Any:
        return ()


class Site:
    """A registry with workers, and the bridge over it."""

    def __init__(
        self,
        *,
        keys: ApiKeyConfig = NO_KEYS,
        method: DispatchMethod = DispatchMethod.LOTTERY,
        settled: bool = True,
    ) -> None:
        self.registry = Registry()
        if settled:
            self.registry.settle()
        self.dispatcher = Dispatcher(self.registry, method)
        relay = Relay(self.dispatcher, ChannelPool(None, max_message_bytes=2**20), FailoverConfig())
        self.bridge = EnvoyServices(relay, ApiKeys(keys), settle_s=0.0)
        self.known: set[str] | None = None
        """Places that the gateway has; None: all."""
        self.extensions = {GATEWAY_KEY: "g", FINAL_KEY: "1"}
        self.bridge.endpoints.location = self._location  # type: ignore[method-assign]
        self.bridge.endpoints.cluster = lambda gateway: "workers_0"  # type: ignore[method-assign]

    def _location(self, worker: Worker, gateway: str) -> str | None:
        place = worker.spec.address
        return place if self.known is None or place in self.known else None

    def add(
        self,
        number: int,
        model: str = "m",
        weight: float = 1.0,
        load: Load = FREE,
        capabilities: frozenset[Capability] = frozenset(),
        backend: str = "",
    ) -> Any:
        spec = WorkerSpec(
            worker_id=f"w{number}",
            instance_id=f"i{number}",
            address=f"127.0.0.1:{5000 + number}",
            models=(ModelInfo(name=model, context_length=10, capabilities=capabilities, backend=backend),),
            weight=weight,
        )
        return self.registry.register(spec, load)

    async def check(self, path: str, body: bytes, **headers: str) -> auth.CheckResponse:
        request = auth.CheckRequest()
        http = request.attributes.request.http
        http.path, http.raw_body = path, body
        request.attributes.context_extensions.update(self.extensions)
        for name, value in headers.items():
            http.headers[name.replace("_", "-")] = value
        return await self.bridge.picker.Check(request, Context())

    async def chat(self, **values: Any) -> auth.CheckResponse:
        return await self.check(CHAT, chat_body(**values))

    def tell(self, *entries: accesslog_pb2.HTTPAccessLogEntry) -> None:
        """What the access log says."""
        for entry in entries:
            self.bridge.completions.tell(entry)


def chat_body(**values: Any) -> bytes:
    return frame(HttpBody(data=json.dumps({"model": "m", **values}).encode()).SerializeToString())


def attempt(
    name: str, port: int, status: int | None = None, error: FastChatError | None = None, **flags: bool
) -> accesslog_pb2.HTTPAccessLogEntry:
    """The log's entry of an attempt at a worker, which answered or refused."""
    found = ended(name)
    common = found.common_properties
    common.access_log_type = accesslog_pb2.UpstreamEnd
    common.upstream_remote_address.socket_address.address = "127.0.0.1"
    common.upstream_remote_address.socket_address.port_value = port
    if status is not None:
        found.response.response_trailers["grpc-status"] = str(status)
    if error is not None:  # as grpc sends a refusal
        found.response.response_headers["grpc-status"] = str(int(error.code))
        details = base64.b64encode(error_to_status(error).SerializeToString()).decode().rstrip("=")
        found.response.response_headers["grpc-status-details-bin"] = details
    for flag, value in flags.items():
        setattr(common.response_flags, flag, value)
    return found


def ended(name: str) -> accesslog_pb2.HTTPAccessLogEntry:
    """The log's entry of a request that has ended."""
    found = accesslog_pb2.HTTPAccessLogEntry()
    found.request.request_headers[TICKET_HEADER] = name
    found.common_properties.access_log_type = accesslog_pb2.DownstreamEnd
    return found


def frame(message: bytes, compressed: bool = False) -> bytes:
    return bytes([compressed]) + len(message).to_bytes(4, "big") + message


def places(response: auth.CheckResponse) -> list[str]:
    named = dict(response.dynamic_metadata).get(PLACES_KEY, "")
    return named.split(",") if named else []


def refused(response: auth.CheckResponse) -> tuple[int, str]:
    assert response.WhichOneof("http_response") == "denied_response", response
    headers = {item.header.key: item.header.value for item in response.denied_response.headers}
    return response.denied_response.status.code, headers["grpc-message"]


def header(response: auth.CheckResponse, name: str) -> str:
    return next((item.header.value for item in response.ok_response.headers if item.header.key == name), "")


def ticket(response: auth.CheckResponse) -> str:
    return header(response, TICKET_HEADER)
