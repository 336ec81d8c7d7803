"""What Envoy logs: a line of each request for people, and what became of picks for the controllers."""

from __future__ import annotations

from fastchat_grpc.config import GatewayConfig, GatewayMode
from fastchat_grpc.gateway.clusters import EXT_AUTHZ, controller_cluster, stream_service
from fastchat_grpc.gateway.shape import Tree, extension
from fastchat_grpc.rpc.bridge import ATTEMPTS_KEY, BROKEN_KEY, LUA_NAMESPACE, PLACE_KEY, SERVED_KEY, TICKET_HEADER

STATUS_HEADERS = ["grpc-status", "grpc-status-details-bin"]


def request_logs(config: GatewayConfig) -> list[Tree]:
    """What is logged of each request when it has ended: for people, and for the controller that picked."""
    logs: list[Tree] = []
    if config.access_log:
        path = "/dev/stdout" if config.access_log == "-" else config.access_log
        logs.append(
            extension(
                "envoy.access_loggers.file",
                "envoy.extensions.access_loggers.file.v3.FileAccessLog",
                path=path,
                log_format={"json_format": _log_fields()},
            )
        )
    if config.mode is GatewayMode.DIRECT:
        logs += _completion_logs(config)
    return logs


def _log_fields() -> Tree:
    """What the access log says of a request: nothing of its content, and the name of its key, never the key."""
    picked = f"DYNAMIC_METADATA({EXT_AUTHZ}:%s)"
    return {
        "time": "%START_TIME%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
        "rpc": "%REQ(:PATH)%",
        "status": "%RESPONSE_CODE%",
        "details": "%RESPONSE_CODE_DETAILS%",
        "flags": "%RESPONSE_FLAGS%",
        "client": f"%{picked % 'client'}%",
        "model": f"%{picked % 'model'}%",
        "picked": f"%{picked % 'worker'}%",
        "upstream": "%UPSTREAM_HOST%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        # Of streams that the module carries, for which the two above are empty.
        **{key: f"%DYNAMIC_METADATA({LUA_NAMESPACE}:{key})%" for key in (SERVED_KEY, PLACE_KEY, BROKEN_KEY)},
        "streams": f"%DYNAMIC_METADATA({LUA_NAMESPACE}:{ATTEMPTS_KEY})%",
        "first_byte_ms": "%RESPONSE_DURATION%",
        "duration_ms": "%DURATION%",
        "bytes_in": "%BYTES_RECEIVED%",
        "bytes_out": "%BYTES_SENT%",
    }


def attempt_logs(config: GatewayConfig) -> Tree:
    """The router's setting that tells a controller of each attempt that was made for a pick of it."""
    return {"upstream_log": _completion_logs(config)} if config.mode is GatewayMode.DIRECT else {}


def _completion_logs(config: GatewayConfig) -> list[Tree]:
    """Each controller hears of everything that has a ticket; only the one that issued it knows it."""
    # Requests and their attempts share one stream to each controller, since this is the same for both: so the
    # attempts arrive before the end of their request.
    return [_completion_log(config, controller_cluster(i)) for i in range(len(config.controller_addresses))]


def _completion_log(config: GatewayConfig, cluster: str) -> Tree:
    present = {"header": {"name": TICKET_HEADER, "present_match": True}}
    return {
        "filter": {"header_filter": present},
        **extension(
            "envoy.access_loggers.http_grpc",
            "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
            common_config={
                "log_name": "fastchat_grpc",
                "transport_api_version": "V3",
                "buffer_flush_interval": "0.1s",
                "grpc_service": stream_service(config, cluster),
            },
            additional_request_headers_to_log=[TICKET_HEADER],
            # A status comes with the headers where a worker refuses, else with the trailers.
            additional_response_headers_to_log=STATUS_HEADERS,
            additional_response_trailers_to_log=STATUS_HEADERS,
        ),
    }
