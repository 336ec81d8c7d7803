"""What Envoy asks a controller before a request goes on: whether its key is known, and which worker may have it.

The key is asked for by itself, from the headers alone, before a large body is taken into memory. The picks ask
for the key again, so nothing depends on the first check but memory.

Each controller picks among the workers that it knows. With several of them, one that has nobody for a request
leaves it to the others: whichever is healthy is asked first, then each by its name, and at last a healthy one
again, which knows what the others said and answers for all.
"""

from __future__ import annotations

from fastchat_grpc.config import GatewayConfig, GatewayMode
from fastchat_grpc.gateway.clusters import API, EXT_AUTHZ, controller_cluster, controller_service
from fastchat_grpc.gateway.shape import Tree, extension, typed
from fastchat_grpc.rpc.api_keys import HEADERS
from fastchat_grpc.rpc.bridge import (
    CHOICES_KEY,
    FINAL_KEY,
    GATEWAY_KEY,
    KEY_ONLY_KEY,
    LARGE_KEY,
    LUA_NAMESPACE,
    MISSED_HEADER,
    PLACES_KEY,
)

FRAMING_BYTES = 1024
"""More than the transcoder adds to a body when it makes a message of it."""
MIN_PICK_BYTES = 512 * 1024
PASS_OVER_S = 2.0
"""A controller that does not answer is left for another after this time. It waits for a gateway for a second itself."""
KEY_CHECK = f"{EXT_AUTHZ}.key"
_TYPE = "envoy.extensions.filters.http.ext_authz.v3"
# The rest of a request's headers, such as its cookies, is none of the controller's business.
_HEADERS = (*HEADERS, "grpc-encoding", "x-request-id", MISSED_HEADER)


def key_checks(config: GatewayConfig) -> list[Tree]:
    """The filter that asks for the key before a large body is taken; a sidecar asks for no keys."""
    if config.mode is GatewayMode.SIDECAR:
        return []
    large = {"filter": LUA_NAMESPACE, "path": [{"key": LARGE_KEY}], "value": {"bool_match": True}}
    # A controller that cannot be asked refuses nothing here: the request comes before it, or another, anyway.
    return [_filter(config, KEY_CHECK, API, filter_enabled_metadata=large, failure_mode_allow=True)]


def picks(config: GatewayConfig) -> list[Tree]:
    """The filters that choose a request's worker, after the transcoder: JSON and gRPC look alike to them."""
    if config.mode is not GatewayMode.DIRECT:
        return []
    body = {"with_request_body": {"max_request_bytes": pick_bytes(config), "pack_as_bytes": True}}
    names = _names(config)
    if len(names) == 1:
        return [_filter(config, EXT_AUTHZ, controller_cluster(0), clear_route_cache=True, **body)]
    unpicked = {
        "filter_enabled_metadata": {
            "filter": EXT_AUTHZ,
            "path": [{"key": PLACES_KEY}],
            "value": {"present_match": True},
            "invert": True,
        }
    }
    found = []
    for name, cluster in names.items():
        first, last = name == EXT_AUTHZ, name == f"{EXT_AUTHZ}.last"
        settings = {**body, **({} if first else unpicked), **({} if last else {"failure_mode_allow": True})}
        found.append(_filter(config, name, cluster, clear_route_cache=True, **settings))
    return found


def pick_bytes(config: GatewayConfig) -> int:
    """The largest message that is picked for. JSON bodies are bounded by the transcoder, which knows them unframed.

    More than twice of what comes of a body while its key is asked for: Envoy stops reading then, and goes on only
    when it holds less than half of what it may. So small bounds are for JSON alone.
    """
    return max(config.max_body_bytes, MIN_PICK_BYTES) + FRAMING_BYTES


def pick_settings(config: GatewayConfig, node_id: str) -> Tree:
    """What the picks say of a route whose worker is picked."""
    extensions = {GATEWAY_KEY: node_id, CHOICES_KEY: str(1 + config.retries)}
    *others, last = _names(config)
    found = {name: _per_route(check_settings={"context_extensions": extensions}) for name in others}
    found[last] = _per_route(check_settings={"context_extensions": {**extensions, FINAL_KEY: "1"}})
    return found


def unpicked_settings(config: GatewayConfig) -> Tree:
    """What turns the picks off on a route.

    By the filter's own message: the generic FilterConfig{disabled} on any route lets transcoded requests of
    every route pass unchecked.
    """
    if config.mode is not GatewayMode.DIRECT:
        return {}
    return {name: _per_route(disabled=True) for name in _names(config)}


def key_check_settings(config: GatewayConfig) -> Tree:
    """What the key check says on every route."""
    if config.mode is GatewayMode.SIDECAR:
        return {}
    return {KEY_CHECK: _per_route(check_settings={"context_extensions": {KEY_ONLY_KEY: "1"}})}


def _names(config: GatewayConfig) -> dict[str, str]:
    """The picks' filters in their order, and the cluster that each asks."""
    count = len(config.controller_addresses)
    if count == 1:
        return {EXT_AUTHZ: controller_cluster(0)}
    each = {f"{EXT_AUTHZ}.{i}": controller_cluster(i) for i in range(count)}
    return {EXT_AUTHZ: API, **each, f"{EXT_AUTHZ}.last": API}


def _filter(config: GatewayConfig, name: str, cluster: str, **settings: object) -> Tree:
    # Who may be passed over is not waited for as long: of several controllers one may be frozen, and is asked twice.
    passed_over = "failure_mode_allow" in settings and len(config.controller_addresses) > 1
    timeout_s = min(config.pick_timeout_s, PASS_OVER_S) if passed_over else config.pick_timeout_s
    return extension(
        name,
        f"{_TYPE}.ExtAuthz",
        transport_api_version="V3",
        grpc_service=controller_service(config, cluster, timeout_s),
        status_on_error={"code": "ServiceUnavailable"},
        allowed_headers={"patterns": [{"exact": header} for header in _HEADERS]},
        **settings,
    )


def _per_route(**settings: object) -> Tree:
    return typed(f"{_TYPE}.ExtAuthzPerRoute", **settings)
