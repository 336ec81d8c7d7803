"""Where Envoy sends requests: workers, controllers, and the clusters that lead there."""

from __future__ import annotations

from fastchat_grpc.config import GatewayConfig, GatewayMode, TlsConfig, split_address
from fastchat_grpc.gateway.shape import Tree, extension, host_of, name_matcher, seconds, tls_context, typed
from fastchat_grpc.rpc.bridge import NAMED_KEY, PLACE_HEADER, PLACES_KEY

API = "api"
"""Whoever answers what needs no picking: the controllers, or a sidecar's worker."""
READY = "ready"
"""The same servers, healthy while a model can be asked through them. No requests go there."""
METRICS = "metrics"
"""The gateway's own metrics."""
EXT_AUTHZ = "envoy.filters.http.ext_authz"

# Far above what a machine can carry: workers and controllers bound their load themselves, and say so.
_BREAKERS = {
    "max_connections": 65_536,
    "max_pending_requests": 65_536,
    "max_requests": 65_536,
    "max_retries": 4_096,
}
# As our own clients do (see fastchat_grpc.rpc.channels): a path that swallows packets, or a server that is frozen,
# is left within 6 s. A connection that was idle for a second is also probed before it gets a request.
_KEEPALIVE = {"interval": "2s", "timeout": "4s", "connection_idle_interval": "1s"}


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
    return [*_servers(config), *([_metrics(config)] if config.metrics_address else [])]


def _metrics(config: GatewayConfig) -> Tree:
    return {
        "name": METRICS,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": METRICS,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": host_of(config.metrics_address)}}]}],
        },
    }


def _servers(config: GatewayConfig) -> list[Tree]:
    if config.mode is GatewayMode.SIDECAR:
        return [_api(config, [config.worker_address]), _ready(config, [config.worker_address])]
    found = [_api(config, config.controller_addresses), _ready(config, config.controller_addresses)]
    if config.mode is GatewayMode.DIRECT:
        for i, address in enumerate(config.controller_addresses):
            found += [_static(config, controller_cluster(i), [address]), _workers(config, i)]
    return found


def controller_cluster(i: int) -> str:
    """The cluster of one controller: it tells endpoints, and hears what became of its picks."""
    return f"controller_{i}"


def workers_cluster(i: int) -> str:
    """The workers that one controller knows. It picks among them, so its picks and its endpoints agree."""
    return f"workers_{i}"


def _api(config: GatewayConfig, addresses: tuple[str, ...] | list[str]) -> Tree:
    cluster = _static(config, API, addresses)
    # Where none is healthy any is tried: one that has just come back answers before its next health check.
    cluster["common_lb_config"] = {"healthy_panic_threshold": {"value": 1}}
    if len(addresses) > 1:
        cluster["outlier_detection"] = _OUT_OF_TURN
    cluster["health_checks"] = [_health_check("fastchat_grpc.v1.OpenAIService")]
    return cluster


def _ready(config: GatewayConfig, addresses: tuple[str, ...] | list[str]) -> Tree:
    return {**_static(config, READY, addresses), "health_checks": [_health_check("readiness")]}


def _health_check(service: str) -> Tree:
    return {
        "timeout": "2s",
        "interval": "1s",
        # A controller that starts beside the gateway, or comes back, is found at once.
        "no_traffic_interval": "0.2s",
        "no_traffic_healthy_interval": "1s",
        "unhealthy_interval": "0.2s",
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        "grpc_health_check": {"service_name": service},
    }


def _static(config: GatewayConfig, name: str, addresses: tuple[str, ...] | list[str]) -> Tree:
    hosts = [split_address(address)[0] for address in addresses]
    endpoints = [
        {"endpoint": {"address": host_of(address), "hostname": host}}
        for address, host in zip(addresses, hosts, strict=True)
    ]
    cluster = {
        "name": name,
        "type": "STRICT_DNS",
        "dns_lookup_family": "V4_PREFERRED",
        **_http2(),
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    }
    if config.upstream_tls is not None:
        cluster["transport_socket"] = _tls(config.upstream_tls, config.upstream_sans or tuple(hosts))
    return cluster


def _workers(config: GatewayConfig, i: int) -> Tree:
    return {
        "name": workers_cluster(i),
        "type": "EDS",
        "eds_cluster_config": {
            "eds_config": {
                "resource_api_version": "V3",
                # Requests wait for endpoints at the controller that picks; a dead controller delays no start.
                "initial_fetch_timeout": "0.5s",
                "api_config_source": {
                    "api_type": "GRPC",
                    "transport_api_version": "V3",
                    "grpc_services": [stream_service(config, controller_cluster(i))],
                },
            }
        },
        **_http2(),
        **_worker_tls(config),
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "load_balancing_policy": {"policies": [{"typed_extension_config": _picked()}]},
    }


def _picked() -> Tree:
    """The picker's places in their order, and nobody else: a worker that it did not name has another model."""
    nobody = extension(
        "envoy.load_balancing_policies.subset",
        "envoy.extensions.load_balancing_policies.subset.v3.Subset",
        fallback_policy="NO_FALLBACK",
        subset_selectors=[{"keys": ["none"]}],
        subset_lb_policy={
            "policies": [
                {
                    "typed_extension_config": extension(
                        "envoy.load_balancing_policies.round_robin",
                        "envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin",
                    )
                }
            ]
        },
    )
    return extension(
        "envoy.load_balancing_policies.override_host",
        "envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost",
        # The streams of the gateway's module have no metadata.
        override_host_sources=[
            {"header": PLACE_HEADER},
            {"metadata": {"key": EXT_AUTHZ, "path": [{"key": PLACES_KEY}]}},
        ],
        fallback_policy={"policies": [{"typed_extension_config": nobody}]},
    )


def _http2() -> Tree:
    options = typed(
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        explicit_http_config={"http2_protocol_options": {"connection_keepalive": _KEEPALIVE}},
    )
    return {
        "connect_timeout": "1s",
        "circuit_breakers": {"thresholds": [_BREAKERS]},
        "per_connection_buffer_limit_bytes": 1024 * 1024,
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
    }


def _worker_tls(config: GatewayConfig) -> Tree:
    """TLS towards workers, which must have one of the given names or, without any, the name that they advertise.

    For a worker that advertises an IP address Envoy can't tell its certificate from another of the authority.
    """
    tls = config.upstream_tls
    if tls is None:
        return {}
    plain = _tls(tls, config.upstream_sans)
    if config.upstream_sans or tls.ca is None:
        return {"transport_socket": plain}
    by_name = {"name": "by name", "match": {NAMED_KEY: True}, "transport_socket": _tls(tls, (), by_name=True)}
    return {"transport_socket_matches": [by_name, {"name": "by address", "match": {}, "transport_socket": plain}]}


def _tls(tls: TlsConfig, names: tuple[str, ...], *, by_name: bool = False) -> Tree:
    """TLS towards a host whose certificate must have one of the names, or (`by_name`) the host's own."""
    common = {**tls_context(tls), "alpn_protocols": ["h2"]}
    if names and tls.ca is not None:
        common["validation_context"]["match_typed_subject_alt_names"] = [name_matcher(name) for name in names]
    return extension(
        "envoy.transport_sockets.tls",
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        common_tls_context=common,
        auto_host_sni=True,
        **({"auto_sni_san_validation": True} if by_name else {}),
    )


def controller_service(config: GatewayConfig, cluster: str, timeout_s: float) -> Tree:
    """How Envoy asks a controller for a pick."""
    service = _member_of_the_fleet(config, {"envoy_grpc": {"cluster_name": cluster}})
    service["timeout"] = seconds(timeout_s)
    service["retry_policy"] = {
        "retry_on": "connect-failure,refused-stream,reset,unavailable",
        "num_retries": 2,
        # Envoy takes max_interval as the time of each try, too.
        "retry_back_off": {"base_interval": "0.01s", "max_interval": seconds(timeout_s)},
    }
    return service


def stream_service(config: GatewayConfig, cluster: str) -> Tree:
    """How Envoy keeps a stream with a controller: one that comes back is found again within half a second."""
    again = {"retry_back_off": {"base_interval": "0.05s", "max_interval": "0.3s"}}
    return _member_of_the_fleet(config, {"envoy_grpc": {"cluster_name": cluster, "retry_policy": again}})


def _member_of_the_fleet(config: GatewayConfig, service: Tree) -> Tree:
    if config.join_token is not None:
        service["initial_metadata"] = [{"key": "authorization", "value": f"Bearer {config.join_token}"}]
    return service
