"""The rendered configuration: what is in it, and that Envoy takes it."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastchat_grpc.config import ApiKeyConfig, ControllerConfig, GatewayConfig, GatewayMode, TlsConfig
from fastchat_grpc.errors import ConfigError
from fastchat_grpc.gateway import http_lua
from fastchat_grpc.gateway.binary import find_envoy
from fastchat_grpc.gateway.render import bootstrap, render_config
from fastchat_grpc.gateway.routes import BEFORE_KEY_BYTES, PICKED
from fastchat_grpc.gateway.shape import origin_regex
from fastchat_grpc.rpc.bridge import CLUSTER_HEADER
from fastchat_grpc.rpc.http_errors import HTTP_STATUS

DIRECT = GatewayConfig(node_id="n")
CONFIGS = {
    "direct": DIRECT,
    "several controllers": GatewayConfig(node_id="n", controller_addresses=("a:1", "b:2"), join_token="secret"),
    "relay": GatewayConfig(node_id="n", mode=GatewayMode.RELAY, access_log="-"),
    "sidecar": GatewayConfig(node_id="n", mode=GatewayMode.SIDECAR, worker_address="127.0.0.1:21002"),
    "no retries": GatewayConfig(node_id="n", retries=0, allowed_origins=("*",), port=0),
}


def find(tree: Any, key: str) -> list[Any]:
    """Every value under a key, at any depth."""
    if isinstance(tree, dict):
        return [v for k, v in tree.items() if k == key] + [x for v in tree.values() for x in find(v, key)]
    if isinstance(tree, list):
        return [x for item in tree for x in find(item, key)]
    return []


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_envoy_takes_the_configuration_as_yaml_and_as_json(config: GatewayConfig, tmp_path: Path) -> None:
    for name, text in (("c.yaml", render_config(config)), ("c.json", json.dumps(bootstrap(config)))):
        path = tmp_path / name
        path.write_text(text)
        found = subprocess.run(
            [str(find_envoy()), "--mode", "validate", "-c", str(path), "-l", "warning"], capture_output=True, text=True
        )
        assert found.returncode == 0, found.stderr[-500:]
        assert "deprecated" not in found.stderr.lower(), found.stderr[-500:]


def routes(config: GatewayConfig) -> dict[str, Any]:
    (config_tree,) = find(bootstrap(config), "route_config")
    found = config_tree["virtual_hosts"][0]["routes"]
    return {route["match"].get("path") or route["match"]["prefix"]: route for route in found}


def test_in_direct_mode_nothing_reaches_a_worker_without_the_picker() -> None:
    for path, route in routes(DIRECT).items():
        check = route["typed_per_filter_config"]["envoy.filters.http.ext_authz"]
        leads_to_workers = "cluster_header" in route.get("route", {})
        assert leads_to_workers == (path in PICKED)
        assert leads_to_workers != check.get("disabled", False)
        assert check["@type"].endswith("ExtAuthzPerRoute"), "the generic FilterConfig{disabled} would open all routes"


def test_little_of_a_body_that_a_pick_takes_is_held_before_its_key_is_known() -> None:
    """A caller's own headers, which are all that there is by then, choose these routes; the picker's choose others."""
    for path in (*PICKED, "/"):
        assert routes(DIRECT)[path]["request_body_buffer_limit"] == BEFORE_KEY_BYTES == 65_536
    for route in find(bootstrap(DIRECT), "routes")[0]:
        if route.get("request_body_buffer_limit", 0) > BEFORE_KEY_BYTES:
            names = [header["name"] for header in route["match"]["headers"]]
            assert names[0] == CLUSTER_HEADER
    assert {"remove": CLUSTER_HEADER} in find(bootstrap(DIRECT), "mutations")[0], "nobody's own"


def test_nobody_registers_or_drains_through_the_gateway() -> None:
    found = list(routes(DIRECT))
    for method in ("Register", "Heartbeat", "Deregister", "DrainWorker", "RefreshWorkers"):
        assert f"/fastchat_grpc.v1.ControllerService/{method}" not in found
    assert routes(DIRECT)["/fastchat_grpc.v1.ControllerService/"]["direct_response"]["status"] == 403
    assert not [path for path in found if path.startswith(("/envoy", "/grpc.channelz"))]


def test_the_join_token_goes_to_controllers_alone_and_is_never_printed() -> None:
    with_token = bootstrap(CONFIGS["several controllers"])
    services = find(with_token, "initial_metadata")
    # The key check, four picks, the endpoints of each of two controllers, and twice the log to each.
    assert len(services) == 11
    assert all(item == [{"key": "authorization", "value": "Bearer secret"}] for item in services)
    printed = render_config(CONFIGS["several controllers"])
    assert "secret" not in printed
    assert "JOIN-TOKEN" in printed


def test_a_printed_configuration_opens_no_admin_interface() -> None:
    assert "admin" not in bootstrap(DIRECT)
    assert "9901" not in render_config(DIRECT)


def test_each_controller_has_a_cluster_of_its_own_workers() -> None:
    names = [cluster["name"] for cluster in bootstrap(CONFIGS["several controllers"])["static_resources"]["clusters"]]
    assert names == ["api", "ready", "controller_0", "workers_0", "controller_1", "workers_1"]


def test_of_several_controllers_only_the_last_one_asked_is_waited_for_long() -> None:
    def times(config: GatewayConfig) -> list[str]:
        filters = find(bootstrap(config), "http_filters")[0]
        asked = [item for item in filters if item["name"].startswith("envoy.filters.http.ext_authz")]
        return [item["typed_config"]["grpc_service"]["timeout"] for item in asked]

    assert times(DIRECT) == ["5s", "5s"]
    assert times(CONFIGS["several controllers"]) == ["2s", "2s", "2s", "2s", "5s"]


def test_no_load_balancer_chooses_a_worker_that_the_picker_did_not_name() -> None:
    (override,) = find(bootstrap(DIRECT), "load_balancing_policy")
    (nobody,) = find(override, "fallback_policy")[0]["policies"]
    assert nobody["typed_extension_config"]["typed_config"]["fallback_policy"] == "NO_FALLBACK"


def listener_names(config: GatewayConfig) -> list[str]:
    return [listener["name"] for listener in bootstrap(config)["static_resources"]["listeners"]]


def test_with_tls_the_plaintext_listener_is_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.touch()
    tls = TlsConfig(cert=pem, key=pem, ca=pem)
    assert listener_names(DIRECT) == ["http"]
    assert listener_names(replace(DIRECT, tls=tls)) == ["https"]
    assert listener_names(replace(DIRECT, tls=tls, plaintext=True)) == ["http", "https"]


def test_a_certificate_must_be_of_the_host_that_is_connected_to(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.touch()
    config = replace(DIRECT, controller_addresses=("ctl.example:1", "10.0.0.1:2"), upstream_tls=TlsConfig(ca=pem))
    by_name = {cluster["name"]: cluster for cluster in bootstrap(config)["static_resources"]["clusters"]}

    def names(cluster: str) -> list[tuple[str, Any]]:
        found = find(by_name[cluster], "match_typed_subject_alt_names")
        return [(name["san_type"], name["matcher"]) for names in found for name in names]

    assert names("controller_0") == [("DNS", {"exact": "ctl.example"})]
    assert names("controller_1") == [("IP_ADDRESS", {"exact": "10.0.0.1"})]
    assert True in find(by_name["workers_0"], "auto_sni_san_validation")
    fleet = replace(config, upstream_sans=("spiffe://fleet/*",))
    by_name = {cluster["name"]: cluster for cluster in bootstrap(fleet)["static_resources"]["clusters"]}
    for cluster in ("api", "controller_0", "workers_1"):
        assert names(cluster) == [("URI", {"safe_regex": {"regex": "spiffe://fleet/.*"}})]


def test_the_error_filter_reads_the_tables_of_the_services() -> None:
    source = http_lua.source(GatewayConfig(max_body_bytes=5000))
    assert '["PROMPT_TOO_LONG"] = "context_length_exceeded"' in source
    assert '[429] = "rate_limit_error"' in source
    assert "at most 5000 bytes" in source


@pytest.mark.parametrize(
    "settings",
    [
        {"port": 70000},
        {"mode": GatewayMode.SIDECAR},
        {"controller_addresses": ()},
        {"controller_addresses": ("nonsense",)},
        {"worker_address": "x"},
        {"max_body_bytes": 10},
        {"max_body_bytes": 2**30},
        {"idle_timeout_s": 0},
        {"retries": 11},
        {"concurrency": 0},
        {"envoy": Path("/nowhere/envoy")},
        {"drain_timeout_s": -1},
        {"upstream_sans": ("x",)},
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_in_one_line(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        GatewayConfig(**settings)
    assert "\n" not in str(caught.value)


def test_keys_are_given_with_names_or_without() -> None:
    parsed = ApiKeyConfig.parse("alice=sk-alice-secret, bob=c2VjcmV0LWtleQ==, c2VjcmV0LWtleQ==")
    assert parsed.keys == (
        ("alice", "sk-alice-secret"),
        ("bob", "c2VjcmV0LWtleQ=="),
        ("key3", "c2VjcmV0LWtleQ=="),
    )
    assert "c2Vj" not in repr(ControllerConfig(api_keys=parsed, insecure_join=True))
    assert "alice" not in repr(ControllerConfig(api_keys=parsed, insecure_join=True))


@pytest.mark.parametrize("text", ["xyzzy", "plugh=xyzzy", "plugh plugh=xyzzyxyzzy", "xyzzyxyzzy plugh"])
def test_a_bad_key_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ApiKeyConfig.parse(text)
    assert "xyzzy" not in str(caught.value)
    assert "plugh" not in str(caught.value)


def test_no_error_has_a_status_that_clients_send_again_in_vain() -> None:
    again = {status for status in HTTP_STATUS.values() if status >= 500 or status == 429}
    assert again == {429, 500, 503, 504}


@pytest.mark.parametrize(
    ("pattern", "allowed", "refused"),
    [
        (
            "http://localhost:*",
            ["http://localhost", "http://localhost:1", "http://localhost:5174"],
            ["http://localhost:5174.evil.example", "http://localhost:1@evil.example", "http://localhost.evil.example"],
        ),
        (
            "https://*.example.com",
            ["https://chat.example.com", "https://a.b.example.com"],
            ["https://example.com", "https://evil.test/.example.com", "https://evil.test:1#.example.com", "null"],
        ),
        ("https://one.example", ["https://one.example"], ["https://oneXexample", "https://one.example:1"]),
        ("*", ["null", "https://any.example:1", "tauri://localhost"], []),
    ],
)
def test_a_pattern_allows_no_origin_beyond_its_host(pattern: str, allowed: list[str], refused: list[str]) -> None:
    expression = origin_regex(pattern)
    assert [origin for origin in allowed + refused if re.fullmatch(expression, origin)] == allowed
