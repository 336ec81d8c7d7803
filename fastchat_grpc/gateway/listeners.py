"""What Envoy listens on, and the filters that a request passes."""

from __future__ import annotations

from fastchat_grpc.config import GatewayConfig, GatewayMode
from fastchat_grpc.gateway import errors_lua
from fastchat_grpc.gateway.clusters import API, EXT_AUTHZ, controller_service, log_clusters
from fastchat_grpc.gateway.routes import virtual_host
from fastchat_grpc.gateway.shape import Tree, extension, seconds, socket_address, tls_context, typed
from fastchat_grpc.rpc.bridge import CLIENT_HEADER, TICKET_HEADER

HTTP, HTTPS = "http", "https"
_FILTERS = "envoy.extensions.filters.http"
# Set by the bridge or by Envoy alone; what a caller sends under these names is dropped.
_INTERNAL_HEADERS = (
    TICKET_HEADER,
    CLIENT_HEADER,
    "x-envoy-original-path",
    "x-envoy-original-dst-host",
    "x-envoy-retry-on",
    "x-envoy-max-retries",
    "x-envoy-upstream-rq-timeout-ms",
)


def listeners(config: GatewayConfig, node_id: str, descriptors: str) -> list[Tree]:
    """The plaintext listener, and the one with TLS if there is a certificate."""
    manager = _manager(config, node_id, descriptors)
    found = [_listener(config, HTTP, config.port, {"filters": [manager]})]
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
    return {
        "name": name,
        "address": socket_address(config.host, port),
        # Whole requests are held here: for the picker, for the transcoder, and for a second try.
        "per_connection_buffer_limit_bytes": config.max_body_bytes + 65_536,
        "filter_chains": [chain],
    }


def _manager(config: GatewayConfig, node_id: str, descriptors: str) -> Tree:
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
        http2_protocol_options={"max_concurrent_streams": 1024, "initial_stream_window_size": 1_048_576},
        early_header_mutation_extensions=[
            extension(
                "envoy.http.early_header_mutation.header_mutation",
                "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                mutations=[{"remove": name} for name in _INTERNAL_HEADERS],
            )
        ],
        access_log=_access_logs(config),
        route_config={"name": "all", "virtual_hosts": [virtual_host(config, node_id)]},
        http_filters=_filters(config, descriptors),
    )


def _filters(config: GatewayConfig, descriptors: str) -> list[Tree]:
    filters = [
        extension(
            "envoy.filters.http.health_check",
            f"{_FILTERS}.health_check.v3.HealthCheck",
            pass_through_mode=False,
            headers=[{"name": ":path", "string_match": {"exact": "/health"}}],
            cluster_min_healthy_percentages={API: {"value": 1}},
        ),
        extension("envoy.filters.http.cors", f"{_FILTERS}.cors.v3.Cors"),
        extension("envoy.filters.http.grpc_web", f"{_FILTERS}.grpc_web.v3.GrpcWeb"),
        # Before the transcoder, so that it sees what the transcoder answers.
        extension(
            "envoy.filters.http.lua",
            f"{_FILTERS}.lua.v3.Lua",
            default_source_code={"inline_string": errors_lua.source(config.max_body_bytes)},
        ),
        extension(
            "envoy.filters.http.grpc_json_transcoder",
            f"{_FILTERS}.grpc_json_transcoder.v3.GrpcJsonTranscoder",
            **_transcoding(config, descriptors),
        ),
    ]
    if config.mode is GatewayMode.DIRECT:
        # After the transcoder, so that JSON and gRPC requests look alike to the picker.
        filters.append(
            extension(
                EXT_AUTHZ,
                f"{_FILTERS}.ext_authz.v3.ExtAuthz",
                transport_api_version="V3",
                grpc_service=controller_service(config, timeout_s=config.pick_timeout_s),
                status_on_error={"code": "ServiceUnavailable"},
                with_request_body={"max_request_bytes": config.max_body_bytes, "pack_as_bytes": True},
            )
        )
    filters.append(extension("envoy.filters.http.router", f"{_FILTERS}.router.v3.Router", suppress_envoy_headers=True))
    return filters


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
        "max_request_body_size": config.max_body_bytes,
        "print_options": {
            "always_print_primitive_fields": True,
            "preserve_proto_field_names": True,
            "stream_sse_style_delimited": True,
        },
    }


def _access_logs(config: GatewayConfig) -> list[Tree]:
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
        logs += [_completion_log(config, cluster) for cluster in log_clusters(config)]
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
        "first_byte_ms": "%RESPONSE_DURATION%",
        "duration_ms": "%DURATION%",
        "bytes_in": "%BYTES_RECEIVED%",
        "bytes_out": "%BYTES_SENT%",
    }


def _completion_log(config: GatewayConfig, cluster: str) -> Tree:
    """Tells a controller of every request that has a ticket, when it has ended."""
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
                "grpc_service": controller_service(config, cluster),
            },
            additional_request_headers_to_log=[TICKET_HEADER],
        ),
    }
