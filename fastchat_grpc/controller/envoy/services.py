"""What a controller offers to the Envoy of a gateway: picker, endpoints and completions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
from envoy.service.accesslog.v3 import als_pb2_grpc
from envoy.service.auth.v3 import external_auth_pb2_grpc
from envoy.service.endpoint.v3 import eds_pb2_grpc

from fastchat_grpc.controller.envoy import als, eds, ext_authz
from fastchat_grpc.controller.envoy.als import Completions, Verdicts
from fastchat_grpc.controller.envoy.eds import Endpoints
from fastchat_grpc.controller.envoy.ext_authz import Picker
from fastchat_grpc.controller.envoy.going_on import GoingOn
from fastchat_grpc.controller.envoy.tickets import Tickets
from fastchat_grpc.controller.relay import Relay
from fastchat_grpc.rpc.api_keys import ApiKeys

Service = tuple[str, Callable[[grpc.aio.Server], None]]


class EnvoyServices:
    """The parts, wired. Serve `services`, `run` it beside the server, `close` it at the end.

    Args:
        relay: knows registry and dispatcher.
        keys: who may ask.
        settle_s: how long after the start a gateway keeps the endpoints that it has.
    """

    def __init__(self, relay: Relay, keys: ApiKeys, settle_s: float) -> None:
        registry = relay.dispatcher.registry
        self.tickets = Tickets()
        self.endpoints = Endpoints(registry, settle_s)
        self.picker = Picker(relay, self.endpoints, self.tickets, keys)
        verdicts = Verdicts(registry)
        self.completions = Completions(registry, self.tickets, verdicts)
        self.going_on = GoingOn(relay, self.endpoints, self.tickets, verdicts)

    def services(self) -> list[Service]:
        """Full names, and the functions that add them to a server."""
        return [
            (
                ext_authz.SERVICE_NAME,
                lambda server: external_auth_pb2_grpc.add_AuthorizationServicer_to_server(self.picker, server),
            ),
            (
                eds.SERVICE_NAME,
                lambda server: eds_pb2_grpc.add_EndpointDiscoveryServiceServicer_to_server(self.endpoints, server),
            ),
            (
                als.SERVICE_NAME,
                lambda server: als_pb2_grpc.add_AccessLogServiceServicer_to_server(self.completions, server),
            ),
        ]

    async def run(self) -> None:
        """Follow the registry until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.endpoints.names.run())
            group.create_task(self.endpoints.run())

    def close(self) -> None:
        """Hear of no more changes."""
        self.endpoints.close()
