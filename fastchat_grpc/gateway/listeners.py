"""What Envoy listens on, and the filters that a request passes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fastchat_grpc.config import GatewayConfig, GatewayMode
from fastchat_grpc.gateway import http_lua
from fastchat_grpc.gateway.access_logs import attempt_logs, request_logs
from fastchat_grpc.gateway.checks import key_checks, pick_bytes, picks
from fastchat_grpc.gateway.clusters import API, READY
from fastchat_grpc.gateway.resume_module import resume_filter
from fastchat_grpc.gateway.routes import ANSWER_BYTES, virtual_host
from fastchat_grpc.gateway.shape import Tree, extension, seconds, socket_address, tls_context, typed
from fastchat_grpc.rpc.bridge import (
    CLIENT_HEADER,
    CLUSTER_HEADER,
    MISSED_HEADER,
    PLACE_HEADER,
    RESUME_HEADER,
    STREAM_HEADER,
    TICKET_HEADER,
)

HTTP, HTTPS = "http", "https"
COME_AGAIN = {"retry-after": "1"}
MAX_STREAMS = 256
"""Requests at a time on one connection of HTTP/2; a client opens another connection for more."""
HEALTH_PATHS = r"/(health|healthz|ping)/?(\?.*)?"
"""Paths that say whether there is a controller (sidecar: the worker) that takes requests."""
READY_PATHS = r"/(ready|readyz)/?(\?.*)?"
"""Paths that say whether there is a model that can be asked."""
_FILTERS = "envoy.extensions.filters.http"
# Set by the bridge or by Envoy alone; what a caller sends under these names is dropped.
_INTERNAL_HEADERS = (
    TICKET_HEADER,
    CLIENT_HEADER,
    CLUSTER_HEADER,
    MISSED_HEADER,
    STREAM_HEADER,
    PLACE_HEADER,
    RESUME_HEADER,
    "x-envoy-original-path",
    "x-envoy-original-dst-host",
    "x-envoy-retry-on",
    "x-envoy-max-retries",
    "x-envoy-upstream-rq-timeout-ms",
)


def listeners(config: GatewayConfig, node_id: str, descriptors: str, module: Path | None) -> list[Tree]:
    """The listener: of TLS if there is a certificate, and then a plaintext one only where it is asked for.

    Args:
        module: resumes streams; None: they end with their workers.
    """
    manager = _manager(config, node_id, descriptors, module)
    found = []
    if config.tls is None or config.plaintext:
        found.append(_listener(config, HTTP, config.port, {"filters": [manager]}))
    if config.tls is not None:
        context = typed(
            "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            common_tls_context={**tls_context(config.tls), "alpn_protocols": ["h2", "http/1.1"]},
            require_client_certificate=config.tls.ca is not None,
        )
        chain = {
            "filters": [manager],
            "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context},
        }
        found.append(_listener(config, HTTPS, config.tls_port, chain))
    return found


def _listener(config: GatewayConfig, name: str, port: int, chain: Tree) -> Tree:
    address = socket_address(config.host, port)
    if config.host == "::":
        address["socket_address"]["ipv4_compat"] = True  # as the services' own servers take it: all addresses
    return {
        "name": name,
        "address": address,
        # What one read may take. How much of a request is held, the routes say.
        "per_connection_buffer_limit_bytes": 256 * 1024,
        "filter_chains": [chain],
    }


def _manager(config: GatewayConfig, node_id: str, descriptors: str, module: Path | None) -> Tree:
    return extension(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="ingress",
        codec_type="AUTO",
        use_remote_address=True,
        generate_request_id=True,
        preserve_external_request_id=True,
        always_set_request_id_in_response=True,
        normalize_path=True,
        merge_slashes=True,
        stream_idle_timeout=seconds(config.idle_timeout_s),
        request_timeout=seconds(config.upload_timeout_s),
        request_headers_timeout=seconds(min(10.0, config.upload_timeout_s)),
        common_http_protocol_options={"idle_timeout": "3600s", "headers_with_underscores_action": "DROP_HEADER"},
        # Old probes and proxies speak HTTP/1.0, some of them without a host.
        http_protocol_options={"accept_http_10": True, "default_host_for_http_10": "localhost"},
        http2_protocol_options={
            "max_concurrent_streams": MAX_STREAMS,
            # With BEFORE_KEY_BYTES, what comes of a body while its key is asked for: less than half of what is
            # picked for.
            "initial_stream_window_size": min(1_048_576, pick_bytes(config) // 4),
        },
        early_header_mutation_extensions=[
            extension(
                "envoy.http.early_header_mutation.header_mutation",
                "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                mutations=[{"remove": name} for name in _INTERNAL_HEADERS],
            )
        ],
        access_log=request_logs(config),
        local_reply_config={"mappers": [*_early_refusals(), _late_failure()]},
        route_config={"name": "all", "virtual_hosts": [virtual_host(config, node_id)]},
        http_filters=_filters(config, descriptors, module),
    )


def _early_refusals() -> list[Tree]:
    """What is answered before the filters have seen a request: in OpenAI's shape, too."""
    return [
        _reply(_flagged("DPE"), "invalid_request_error", "this is not a valid HTTP request"),
        _reply(_flagged("OM"), "server_error", "the gateway has too much to do; try again later", COME_AGAIN),
    ]


def _late_failure() -> Tree:
    """What is answered where a server is lost between the head and the body of its answer.

    The filters hold such an answer already, so Envoy passes them by. Of HTTP callers only: what gRPC callers
    hear has no body.
    """
    transcoded = {"header_filter": {"header": {"name": "x-envoy-original-path", "present_match": True}}}
    lost = {"and_filter": {"filters": [_flagged("UC", "UR", "UF", "LR"), transcoded]}}
    return _reply(lost, "server_error", http_lua.MESSAGES[503], COME_AGAIN)


def _flagged(*flags: str) -> Tree:
    return {"response_flag_filter": {"flags": list(flags)}}


def _reply(what: Tree, kind: str, message: str, headers: Mapping[str, str] | None = None) -> Tree:
    error = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return {
        "filter": what,
        "body_format_override": {
            "text_format_source": {"inline_string": json.dumps(error)},
            "content_type": "application/json",
        },
        "headers_to_add": [{"header": {"key": key, "value": value}} for key, value in (headers or {}).items()],
    }


def _filters(config: GatewayConfig, descriptors: str, module: Path | None) -> list[Tree]:
    return [
        # First, since it sees the answers of those after it alone.
        extension("envoy.filters.http.cors", f"{_FILTERS}.cors.v3.Cors"),
        _health(HEALTH_PATHS, API),
        _health(READY_PATHS, READY),
        extension("envoy.filters.http.grpc_web", f"{_FILTERS}.grpc_web.v3.GrpcWeb"),
        # Before the transcoder, so that it sees what the transcoder answers.
        extension(
            "envoy.filters.http.lua",
            f"{_FILTERS}.lua.v3.Lua",
            default_source_code={"inline_string": http_lua.source(config)},
        ),
        *key_checks(config),
        _gunzip(),
        extension(
            "envoy.filters.http.grpc_json_transcoder",
            f"{_FILTERS}.grpc_json_transcoder.v3.GrpcJsonTranscoder",
            **_transcoding(config, descriptors),
        ),
        *picks(config),
        *resume_filter(config, module),
        extension(
            "envoy.filters.http.router",
            f"{_FILTERS}.router.v3.Router",
            suppress_envoy_headers=True,
            **attempt_logs(config),
        ),
    ]


def _health(paths: str, cluster: str) -> Tree:
    """Answers paths by whether a cluster has a healthy host."""
    return extension(
        "envoy.filters.http.health_check",
        f"{_FILTERS}.health_check.v3.HealthCheck",
        pass_through_mode=False,
        headers=[{"name": ":path", "string_match": {"safe_regex": {"regex": paths}}}],
        cluster_min_healthy_percentages={cluster: {"value": 1}},
    )


def _gunzip() -> Tree:
    """Unpacks bodies that callers have compressed; how much may come of it, the transcoder bounds."""
    return extension(
        "envoy.filters.http.decompressor",
        f"{_FILTERS}.decompressor.v3.Decompressor",
        decompressor_library=extension(
            "gzip",
            "envoy.extensions.compression.gzip.decompressor.v3.Gzip",
            # 15 with a header of gzip, the usual; chunks as the library reads them.
            window_bits=15,
            chunk_size=65_536,
        ),
        request_direction_config={"advertise_accept_encoding": False},
        response_direction_config={
            "common_config": {"enabled": {"default_value": False, "runtime_key": "fastchat_grpc.unpack_answers"}}
        },
    )


def _transcoding(config: GatewayConfig, descriptors: str) -> Tree:
    services = ["fastchat_grpc.v1.OpenAIService", "fastchat_grpc.v1.GenerationService"]
    if config.mode is not GatewayMode.SIDECAR:
        services.append("fastchat_grpc.v1.ControllerService")
    return {
        "proto_descriptor": descriptors,
        "services": services,
        "convert_grpc_status": True,
        "ignore_unknown_query_parameters": True,
        "request_validation_options": {"reject_unknown_method": True},
        # Model names may have slashes, which clients encode.
        "url_unescape_spec": "ALL_CHARACTERS",
        "max_request_body_size": config.max_body_bytes,
        "max_response_body_size": ANSWER_BYTES,
        "print_options": {
            "always_print_primitive_fields": True,
            "preserve_proto_field_names": True,
            "stream_sse_style_delimited": True,
        },
    }
