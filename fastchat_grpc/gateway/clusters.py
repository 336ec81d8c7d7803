"""Where Envoy sends requests: workers, controllers, and the clusters that lead there."""

from __future__ import annotations

from fastchat_grpc.config import GatewayConfig, GatewayMode
from fastchat_grpc.gateway.shape import Tree, extension, host_of, seconds, tls_context, typed
from fastchat_grpc.rpc.bridge import PLACES_KEY

WORKERS = "workers"
"""All workers, from endpoint discovery; the picker's choice overrides the load balancer's."""
API = "api"
"""Whoever answers what needs no picking: the controllers, or a sidecar's worker."""
EXT_AUTHZ = "envoy.filters.http.ext_authz"

# Far above what a machine can carry: workers and controllers bound their load themselves, and say so.
_BREAKERS = {
    "max_connections": 65_536,
    "max_pending_requests": 65_536,
    "max_requests": 65_536,
    "max_retries": 4_096,
}
# Our servers take pings every 10 s on a silent connection (see fastchat_grpc.rpc.channels); a connection that
# was idle for a second is also probed before it gets a request, so a frozen server is noticed at once.
_KEEPALIVE = {"interval": "20s", "timeout": "2s", "connection_idle_interval": "1s"}


# Refused connections take one of several servers out of turn; the health check says when it is back. Half of
# them stay in any case: a moment of overload must not end in no server at all.
_OUT_OF_TURN: Tree = {
    "split_external_local_origin_errors": True,
    "consecutive_local_origin_failure": 2,
    "enforcing_consecutive_5xx": 0,
    "enforcing_success_rate": 0,
    "enforcing_local_origin_success_rate": 0,
    "base_ejection_time": "1s",
    "max_ejection_percent": 50,
}


def clusters(config: GatewayConfig) -> list[Tree]:
    """All clusters of a gateway."""
    if config.mode is GatewayMode.SIDECAR:
        return [_api(config, [config.worker_address])]
    found = [_api(config, config.controller_addresses)]
    if config.mode is GatewayMode.DIRECT:
        found.append(_workers(config))
        names = log_clusters(config)
        if names != [API]:
            addresses = zip(names, config.controller_addresses, strict=True)
            found += [_static(config, name, [address]) for name, address in addresses]
    return found


def log_clusters(config: GatewayConfig) -> list[str]:
    """Clusters that hear of ended requests: each controller by itself, since only one of them picked."""
    count = len(config.controller_addresses)
    return [API] if count == 1 else [f"controller_{i}" for i in range(count)]


def _api(config: GatewayConfig, addresses: tuple[str, ...] | list[str]) -> Tree:
    cluster = _static(config, API, addresses)
    cluster["common_lb_config"] = {"healthy_panic_threshold": {"value": 0}}
    if len(addresses) > 1:
        cluster["outlier_detection"] = _OUT_OF_TURN
    cluster["health_checks"] = [
        {
            "timeout": "2s",
            "interval": "1s",
            # A controller that starts beside the gateway is found before the endpoints are given up.
            "no_traffic_interval": "0.2s",
            "no_traffic_healthy_interval": "1s",
            "unhealthy_threshold": 2,
            "healthy_threshold": 1,
            "grpc_health_check": {"service_name": "fastchat_grpc.v1.OpenAIService"},
        }
    ]
    return cluster


def _static(config: GatewayConfig, name: str, addresses: tuple[str, ...] | list[str]) -> Tree:
    endpoints = [{"endpoint": {"address": host_of(address)}} for address in addresses]
    return {
        "name": name,
        "type": "STRICT_DNS",
        "dns_lookup_family": "V4_PREFERRED",
        **_http2(config),
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    }


def _workers(config: GatewayConfig) -> Tree:
    return {
        "name": WORKERS,
        "type": "EDS",
        "eds_cluster_config": {
            "eds_config": {
                "resource_api_version": "V3",
                "initial_fetch_timeout": "5s",
                "api_config_source": {
                    "api_type": "GRPC",
                    "transport_api_version": "V3",
                    "grpc_services": [controller_service(config)],
                },
            }
        },
        **_http2(config),
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "load_balancing_policy": {"policies": [{"typed_extension_config": _picked()}]},
    }


def _picked() -> Tree:
    """The picker's places in their order; a worker it did not name refuses what it does not serve."""
    least_request = extension(
        "envoy.load_balancing_policies.least_request",
        "envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest",
    )
    return extension(
        "envoy.load_balancing_policies.override_host",
        "envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[{"metadata": {"key": EXT_AUTHZ, "path": [{"key": PLACES_KEY}]}}],
        fallback_policy={"policies": [{"typed_extension_config": least_request}]},
    )


def _http2(config: GatewayConfig) -> Tree:
    options = typed(
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        explicit_http_config={"http2_protocol_options": {"connection_keepalive": _KEEPALIVE}},
    )
    settings: Tree = {
        "connect_timeout": "1s",
        "circuit_breakers": {"thresholds": [_BREAKERS]},
        "per_connection_buffer_limit_bytes": 1024 * 1024,
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
    }
    if config.upstream_tls is not None:
        settings["transport_socket"] = extension(
            "envoy.transport_sockets.tls",
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            common_tls_context={**tls_context(config.upstream_tls), "alpn_protocols": ["h2"]},
        )
    return settings


def controller_service(config: GatewayConfig, cluster: str = API, timeout_s: float | None = None) -> Tree:
    """How Envoy itself calls a controller."""
    service: Tree = {"envoy_grpc": {"cluster_name": cluster}}
    if timeout_s is not None:
        service["timeout"] = seconds(timeout_s)
        service["retry_policy"] = {
            "retry_on": "connect-failure,refused-stream,reset,unavailable",
            "num_retries": 2,
            # Envoy takes max_interval as the time of each try, too.
            "retry_back_off": {"base_interval": "0.01s", "max_interval": seconds(timeout_s)},
        }
    if config.join_token is not None:
        service["initial_metadata"] = [{"key": "authorization", "value": f"Bearer {config.join_token}"}]
    return service
