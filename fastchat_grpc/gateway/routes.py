"""Which request goes where. Routes match the gRPC method, which the transcoder has put in place of an HTTP path."""

from __future__ import annotations

from fastchat_grpc.config import MAX_MESSAGE_BYTES, GatewayConfig, GatewayMode
from fastchat_grpc.gateway.checks import key_check_settings, pick_settings, unpicked_settings
from fastchat_grpc.gateway.clusters import API, METRICS
from fastchat_grpc.gateway.shape import Tree, origin_regex, seconds, typed
from fastchat_grpc.rpc.bridge import CLUSTER_HEADER, STREAM_HEADER

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
SILENT = ("/fastchat_grpc.v1.OpenAIService/", "/fastchat_grpc.v1.GenerationService/Embed")
"""Methods whose answer may come in one piece at the end: until then silence says nothing."""
READS = tuple(
    f"/fastchat_grpc.v1.ControllerService/{name}" for name in ("ListWorkers", "GetWorker", "WatchWorkers", "ListModels")
)
"""What callers may see of the fleet. Registration, picks and drains are for the controller's own address."""
FORBIDDEN = "this method is not open through the gateway; call the controller's own address"
BEFORE_KEY_BYTES = 64 * 1024
"""So much of a body is held while its key is asked for; the rest is not read before the answer."""
ANSWER_BYTES = MAX_MESSAGE_BYTES + 65_536
"""So much of an answer in one piece is held."""
NO_PATH = "no such path; see the API's documentation"
_ELSEWHERE: Tree = {
    "host_selection_retry_max_attempts": 5,
    "retry_host_predicate": [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": typed("envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"),
        }
    ],
}
"""Further tries go to hosts that have not been tried."""
_NOT_FOUND: Tree = {"name": "grpc-status", "string_match": {"exact": "5"}}
METRICS_PATH = "/metrics"
TRANSCODER = "grpc_json_transcoder.v3.GrpcJsonTranscoder"
_CORS = "envoy.filters.http.cors"
_GRPC = {"name": "content-type", "string_match": {"prefix": "application/grpc"}}


def virtual_host(config: GatewayConfig, node_id: str) -> Tree:
    """All routes, and who may call them from a web page."""
    routes: list[Tree] = [_metrics(config)] if config.metrics_address else []
    if config.mode is GatewayMode.DIRECT:
        routes += [route for path in PICKED for route in _picked(config, path, node_id)]
    routes += [_api(config, {"prefix": prefix}, silent=prefix.startswith(SILENT)) for prefix in OPEN_PREFIXES]
    if config.mode is not GatewayMode.SIDECAR:
        routes += [_api(config, {"path": path}) for path in READS]
    routes.append(_refused(config, {"prefix": "/fastchat_grpc.v1.ControllerService/"}, 403, FORBIDDEN))
    routes.append(_refused(config, {"prefix": "/", "headers": [_GRPC]}, 404, NO_PATH))
    # An HTTP path, before the transcoder puts a method in its place or refuses it: a real route, since filters
    # pass over requests whose route is a direct response, that of CORS among them.
    routes.append({**_api(config, {"prefix": "/"}), "request_body_buffer_limit": BEFORE_KEY_BYTES})
    return {
        "name": "all",
        "domains": ["*"],
        "typed_per_filter_config": {_CORS: _cors(config), **key_check_settings(config)},
        "response_headers_to_remove": ["grpc-accept-encoding"],
        # Whole requests are held: for the picker, for the transcoder, and for a second try.
        "request_body_buffer_limit": config.max_body_bytes + 65_536,
        "routes": routes,
    }


def _picked(config: GatewayConfig, path: str, node_id: str) -> list[Tree]:
    """A method's routes to the worker of the picker's choice.

    The picker names the cluster, and at most as many retries as there are further workers: what the last of
    them answers is the caller's answer.
    """
    # Nothing is sent to a caller before the first token, so whatever fails until then can be done again elsewhere.
    retry = {
        # NOT_FOUND: another server has taken a worker's address, or the worker has other models now.
        "retry_on": "connect-failure,refused-stream,reset,unavailable,resource-exhausted,retriable-headers",
        "retriable_headers": [_NOT_FOUND],
        "num_retries": config.retries,
        "retry_back_off": {"base_interval": "0.01s", "max_interval": "0.05s"},
        **_ELSEWHERE,
    }
    action: Tree = {"cluster_header": CLUSTER_HEADER, **_unbounded()}
    if config.retries:
        action["retry_policy"] = retry
    settings: Tree = {"typed_per_filter_config": pick_settings(config, node_id)}
    idle = seconds(config.idle_timeout_s)
    # A route that is looked up anew, as after a pick, bounds what is held of the answer, too, whatever the transcoder
    # asked for before. The body has been bounded by then.
    after = {**settings, "request_body_buffer_limit": ANSWER_BYTES}
    picked = {"name": CLUSTER_HEADER, "present_match": True}
    streamed = {"name": STREAM_HEADER, "present_match": True}
    whole = {**action, "idle_timeout": "0s" if path.startswith(SILENT) else idle}
    return [
        {"match": {"path": path, "headers": [picked, streamed]}, "route": {**action, "idle_timeout": idle}, **after},
        {"match": {"path": path, "headers": [picked]}, "route": whole, **after},
        # What a gRPC request meets first.
        {
            "match": {"path": path},
            "route": whole,
            **settings,
            "request_body_buffer_limit": BEFORE_KEY_BYTES,
        },
    ]


def _api(config: GatewayConfig, match: Tree, *, silent: bool = False) -> Tree:
    retry: Tree = {
        "retry_on": "connect-failure,refused-stream",
        "num_retries": 2,
        "retry_back_off": {"base_interval": "0.01s", "max_interval": "0.05s"},
    }
    others = len(config.controller_addresses) - 1
    if others > 0:
        # A controller that dies before a relayed answer has begun leaves it to another, and so does one that does
        # not know the model: its view may differ. None of these methods changes anything, and controllers run no
        # models that a request could kill them by.
        retry |= {
            "retry_on": "connect-failure,refused-stream,reset,retriable-headers",
            "retriable_headers": [_NOT_FOUND],
            "num_retries": max(2, others),
            **_ELSEWHERE,
        }
    idle = "0s" if silent else seconds(config.idle_timeout_s)
    return {
        "match": match,
        "route": {"cluster": API, **_unbounded(), "idle_timeout": idle, "retry_policy": retry},
        **_unpicked(config),
    }


def _metrics(config: GatewayConfig) -> Tree:
    settings = {**unpicked_settings(config), **untranscoded()}
    route = {"cluster": METRICS, "timeout": "30s"}
    return {"match": {"path": METRICS_PATH}, "route": route, "typed_per_filter_config": settings}


def untranscoded() -> Tree:
    """What turns the transcoder off on a route: no services, by the filter's own message."""
    name = "envoy.filters.http.grpc_json_transcoder"
    return {name: typed(f"envoy.extensions.filters.http.{TRANSCODER}", proto_descriptor_bin="", services=[])}


def _refused(config: GatewayConfig, match: Tree, status: int, message: str) -> Tree:
    return {
        "match": match,
        "direct_response": {"status": status, "body": {"inline_string": message}},
        **_unpicked(config),
    }


def _unpicked(config: GatewayConfig) -> Tree:
    settings = unpicked_settings(config)
    return {"typed_per_filter_config": settings} if settings else {}


def _unbounded() -> Tree:
    """Streams last as long as they make progress; a caller's grpc-timeout is honoured."""
    return {"timeout": "0s", "max_stream_duration": {"grpc_timeout_header_max": "0s"}}


def _cors(config: GatewayConfig) -> Tree:
    return typed(
        "envoy.extensions.filters.http.cors.v3.CorsPolicy",
        allow_origin_string_match=[
            {"safe_regex": {"regex": origin_regex(origin)}} for origin in config.allowed_origins
        ],
        allow_methods="GET, HEAD, POST, OPTIONS",
        # Whatever headers the page's client sends; a "*" does not stand for authorization.
        allow_headers="*, authorization",
        allow_private_network_access=True,
        expose_headers="grpc-status, grpc-message, grpc-status-details-bin, x-request-id, retry-after, "
        "x-fastchat-grpc-ignored",
        max_age="600",
    )
