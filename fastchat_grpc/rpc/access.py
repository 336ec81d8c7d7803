"""Who may call what: every method that a server of the suite has, in one table.

`rpc.border` asks before a method runs, so that no servicer checks anything by itself. A method that is not in the
table is refused, whoever asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from enum import Enum
from typing import Any

from fastchat_grpc.errors import PermissionDenied, Unauthenticated
from fastchat_grpc.rpc.api_keys import ApiKeys
from fastchat_grpc.rpc.bridge import CLIENT_HEADER
from fastchat_grpc.rpc.security import JoinToken

Metadata = Iterable[tuple[str, Any]]


SAN = "x509_subject_alternative_name"
"""Where grpc puts the names of a peer's verified certificate: DNS names, IP addresses and URIs alike."""


CLIENT: ContextVar[str] = ContextVar("CLIENT", default="")
"""Name of the key of the call's caller; empty: none was asked for. For counts and logs, never a permission."""


class Level(Enum):
    """What a caller must show."""

    PUBLIC = "public"
    """Nothing."""
    KEY = "key"
    """An API key, where the server has keys."""
    MEMBER = "member"
    """The join token, where the server has one: workers, child controllers, gateways."""
    ADMIN = "admin"
    """The join token or the key of an admin, where the server has a token or keys."""


def _service(name: str, level: Level, methods: str) -> dict[str, Level]:
    return {f"/{name}/{method}": level for method in methods.split()}


_GENERATION = "Generate Embed CountTokens Tokenize Detokenize GetModelInfo GetStatus"
_OPENAI = "ChatCompletions Completions Embeddings Tokenize Detokenize TokenCheck ListModels GetModel"
_CONTROL = "ListWorkers GetWorker WatchWorkers PickWorker ReleasePick DrainWorker UndrainWorker RefreshWorkers"
_CHANNELZ = "GetTopChannels GetServers GetServer GetServerSockets GetChannel GetSubchannel GetSocket"

METHODS: Mapping[str, Level] = {
    **_service("fastchat_grpc.v1.GenerationService", Level.KEY, _GENERATION),
    **_service("fastchat_grpc.v1.OpenAIService", Level.KEY, _OPENAI),
    **_service("fastchat_grpc.v1.ControllerService", Level.MEMBER, "Register Heartbeat Deregister"),
    # A gateway's module, beside what Envoy asks below.
    **_service("fastchat_grpc.v1.ControllerService", Level.MEMBER, "ContinueStream"),
    **_service("fastchat_grpc.v1.ControllerService", Level.KEY, "ListModels"),
    # These show, or change, what is inside: addresses, loads, who takes requests.
    **_service("fastchat_grpc.v1.ControllerService", Level.ADMIN, _CONTROL),
    # What Envoy asks of a controller.
    **_service("envoy.service.auth.v3.Authorization", Level.MEMBER, "Check"),
    **_service("envoy.service.endpoint.v3.EndpointDiscoveryService", Level.MEMBER, "StreamEndpoints"),
    **_service("envoy.service.endpoint.v3.EndpointDiscoveryService", Level.MEMBER, "DeltaEndpoints FetchEndpoints"),
    **_service("envoy.service.accesslog.v3.AccessLogService", Level.MEMBER, "StreamAccessLogs"),
    # Load balancers and orchestrators have no keys; the schema is public.
    **_service("grpc.health.v1.Health", Level.PUBLIC, "Check List Watch"),
    **_service("grpc.reflection.v1.ServerReflection", Level.PUBLIC, "ServerReflectionInfo"),
    **_service("grpc.reflection.v1alpha.ServerReflection", Level.PUBLIC, "ServerReflectionInfo"),
    # Addresses of everybody who is connected.
    **_service("grpc.channelz.v1.Channelz", Level.ADMIN, _CHANNELZ),
}
"""Full method names, as grpc has them, and what each asks for."""


class Access:
    """The table, with the keys and tokens of one server.

    Args:
        keys: keys of callers; None: this server has none of its own.
        join_token: what members show; None: anybody is a member.
        told_clients: whether whoever passes a call on has checked its key, and says whose it is (CLIENT_HEADER).
    """

    def __init__(
        self, keys: ApiKeys | None = None, join_token: JoinToken | None = None, *, told_clients: bool = False
    ) -> None:
        self._told_clients = told_clients
        self._keys = keys if keys is not None and keys.required else None
        self._token = join_token if join_token is not None and join_token.required else None

    def admit(self, method: str, metadata: Metadata) -> None:
        """Raises Unauthenticated or PermissionDenied for a call that is not let in."""
        match METHODS.get(method):
            case Level.PUBLIC:
                return
            case Level.KEY:
                if self._keys is not None:
                    CLIENT.set(self._keys.check(metadata))
                elif self._told_clients:
                    CLIENT.set(next((str(value) for name, value in metadata if name == CLIENT_HEADER), ""))
            case Level.MEMBER:
                if self._token is not None:
                    self._token.check(metadata)
            case Level.ADMIN:
                self._admit_admin(metadata)
            case None:
                raise PermissionDenied("nobody may call this method: it has no place in the table of access")

    def _admit_admin(self, metadata: Metadata) -> None:
        if self._keys is None and self._token is None:
            return
        if self._token is not None and self._token.shown_by(metadata):
            return
        if self._keys is None:
            raise Unauthenticated("this method asks for the join token: send authorization: Bearer <token>")
        name = self._keys.check(metadata)
        if not self._keys.is_admin(name):
            raise PermissionDenied("this method asks for the key of an admin, or for the join token")


class PeerNames:
    """Checks that a caller's certificate has one of some names ("*" stands for anything in them)."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._names = [re.compile(".*".join(map(re.escape, pattern.split("*")))) for pattern in patterns]

    def admit(self, method: str, context: Any) -> None:
        """Raises PermissionDenied for a call over a connection whose certificate has none of them."""
        if METHODS.get(method) is Level.PUBLIC:
            return
        shown = [name.decode("utf-8", "replace") for name in context.auth_context().get(SAN, ())]
        if not any(pattern.fullmatch(name) for pattern in self._names for name in shown):
            raise PermissionDenied("the certificate has none of the names that may call here (--tls-peer-san)")
