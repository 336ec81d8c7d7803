"""Which request goes where. Routes match the gRPC method, which the transcoder has put in place of an HTTP path."""

from __future__ import annotations

import re

from fastchat_grpc.config import GatewayConfig, GatewayMode
from fastchat_grpc.gateway.clusters import API, EXT_AUTHZ, WORKERS
from fastchat_grpc.gateway.shape import Tree, typed
from fastchat_grpc.rpc.bridge import GATEWAY_KEY

PICKED = (
    "/fastchat_grpc.v1.OpenAIService/ChatCompletions",
    "/fastchat_grpc.v1.OpenAIService/Completions",
    "/fastchat_grpc.v1.OpenAIService/Embeddings",
    "/fastchat_grpc.v1.GenerationService/Generate",
    "/fastchat_grpc.v1.GenerationService/Embed",
)
"""Methods whose worker the picker chooses, in direct mode."""
OPEN_PREFIXES = (
    "/fastchat_grpc.v1.OpenAIService/",
    "/fastchat_grpc.v1.GenerationService/",
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1alpha.ServerReflection/",
    "/grpc.reflection.v1.ServerReflection/",
)
READS = tuple(
    f"/fastchat_grpc.v1.ControllerService/{name}"
    for name in ("ListWorkers", "GetWorker", "WatchWorkers", "ListModels", "PickWorker", "ReleasePick")
)
"""What callers may see of the fleet. Registration and drains are for the controller's own address."""
FORBIDDEN = "this method is not open through the gateway; call the controller's own address"
_CORS = "envoy.filters.http.cors"
HTTP_PREFIXES = ("/v1/", "/api/", "/tokenize", "/detokenize")
"""What the paths of the HTTP API begin with."""


def virtual_host(config: GatewayConfig, node_id: str) -> Tree:
    """All routes, and who may call them from a web page."""
    routes = [_preflight(config, prefix) for prefix in HTTP_PREFIXES]
    if config.mode is GatewayMode.DIRECT:
        routes += [_picked(config, path, node_id) for path in PICKED]
    prefixes = [{"prefix": prefix} for prefix in OPEN_PREFIXES]
    reads = [{"path": path} for path in READS] if config.mode is not GatewayMode.SIDECAR else []
    routes += [_api(config, match) for match in (*prefixes, *reads)]
    routes.append(_refused(config, "/fastchat_grpc.v1.ControllerService/", 403, FORBIDDEN))
    routes.append(_refused(config, "/", 404, "no such path; see the API's documentation"))
    return {
        "name": "all",
        "domains": ["*"],
        "typed_per_filter_config": {_CORS: _cors(config)},
        "response_headers_to_remove": ["grpc-accept-encoding"],
        "request_body_buffer_limit": config.max_body_bytes + 65_536,
        "routes": routes,
    }


def _preflight(config: GatewayConfig, prefix: str) -> Tree:
    """Where the browser's question whether it may call is matched; the CORS filter answers it before it is routed.

    HTTP paths have no route before the transcoder has replaced them, and on the route of the final refusal,
    a direct response, the CORS filter does not act.
    """
    asks = [
        {"name": ":method", "string_match": {"exact": "OPTIONS"}},
        {"name": "access-control-request-method", "present_match": True},
    ]
    return {"match": {"prefix": prefix, "headers": asks}, "route": {"cluster": API}, **_unpicked(config)}


def _picked(config: GatewayConfig, path: str, node_id: str) -> Tree:
    # Nothing is sent to a caller before the first token, so whatever fails until then can be done again elsewhere.
    retry = {
        "retry_on": "connect-failure,refused-stream,reset,unavailable,resource-exhausted",
        "num_retries": config.retries,
        "retry_back_off": {"base_interval": "0.01s", "max_interval": "0.05s"},
        "host_selection_retry_max_attempts": 5,
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": typed("envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"),
            }
        ],
    }
    extensions = {"check_settings": {"context_extensions": {GATEWAY_KEY: node_id}}}
    return {
        "match": {"path": path},
        "route": {"cluster": WORKERS, **_unbounded(), **({"retry_policy": retry} if config.retries else {})},
        "typed_per_filter_config": {
            EXT_AUTHZ: typed("envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute", **extensions)
        },
    }


def _api(config: GatewayConfig, match: Tree) -> Tree:
    retry = {
        "retry_on": "connect-failure,refused-stream",
        "num_retries": 2,
        "retry_back_off": {"base_interval": "0.01s", "max_interval": "0.05s"},
    }
    return {"match": match, "route": {"cluster": API, **_unbounded(), "retry_policy": retry}, **_unpicked(config)}


def _refused(config: GatewayConfig, prefix: str, status: int, message: str) -> Tree:
    return {
        "match": {"prefix": prefix},
        "direct_response": {"status": status, "body": {"inline_string": message}},
        **_unpicked(config),
    }


def _unpicked(config: GatewayConfig) -> Tree:
    if config.mode is not GatewayMode.DIRECT:
        return {}
    # Disabled on the route, by the filter's own message: the generic FilterConfig{disabled} on any route lets
    # transcoded requests of every route pass unchecked.
    off = typed("envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute", disabled=True)
    return {"typed_per_filter_config": {EXT_AUTHZ: off}}


def _unbounded() -> Tree:
    """Streams last as long as they make progress; a caller's grpc-timeout is honoured."""
    return {"timeout": "0s", "max_stream_duration": {"grpc_timeout_header_max": "0s"}}


def _cors(config: GatewayConfig) -> Tree:
    return typed(
        "envoy.extensions.filters.http.cors.v3.CorsPolicy",
        allow_origin_string_match=[{"safe_regex": {"regex": _glob(origin)}} for origin in config.allowed_origins],
        allow_methods="GET, POST, OPTIONS",
        allow_headers="authorization, content-type, x-api-key, x-request-id, x-grpc-web, x-user-agent, grpc-timeout, "
        "x-stainless-arch, x-stainless-lang, x-stainless-os, x-stainless-package-version, x-stainless-runtime, "
        "x-stainless-runtime-version, x-stainless-retry-count, x-stainless-timeout, openai-organization, "
        "openai-project, accept, user-agent",
        expose_headers="grpc-status, grpc-message, grpc-status-details-bin, x-request-id, retry-after",
        max_age="600",
    )


def _glob(origin: str) -> str:
    return ".*".join(re.escape(part) for part in origin.split("*"))
