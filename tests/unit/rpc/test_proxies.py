"""Which channels go through a proxy of the environment."""

from __future__ import annotations

import logging

import pytest

from fastchat_grpc.rpc import proxies
from fastchat_grpc.rpc.proxies import uses_proxy

LOCAL = [
    "127.0.0.1:1", "[::1]:1", "localhost:1", "10.1.2.3:1", "172.16.0.1:1", "192.168.1.1:1", "169.254.1.1:1",
    "100.64.0.1:1", "[fd00::1]:1", "[fe80::1]:1", "0.0.0.0:1", "worker-3:1", "printer.local:1", "a.localhost:1",
    "vm.internal:1", "LOCALHOST.:1",
]  # fmt: skip
PUBLIC = ["8.8.8.8:1", "[2606:4700::1]:1", "models.example.com:443"]


@pytest.fixture(autouse=True)
def _tell_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxies, "_told", set())


@pytest.mark.parametrize("address", LOCAL)
@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_no_variable_sends_a_loopback_or_private_address_through_a_proxy(address, variable):
    assert not uses_proxy(address, {variable: "http://127.0.0.1:9"})


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_go_through_the_proxy_that_is_meant_for_grpc_alone(address):
    assert uses_proxy(address, {"grpc_proxy": "http://127.0.0.1:9"})
    assert not uses_proxy(address, {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"})
    assert not uses_proxy(address, {})


def test_the_log_says_once_what_was_done_and_never_the_proxys_url(caplog):
    caplog.set_level(logging.INFO)
    environ = {"http_proxy": "http://user:secret@proxy:3128"}
    for address in ("8.8.8.8:1", "127.0.0.1:2"):
        uses_proxy(address, environ)
    assert len(caplog.records) == 1
    assert "http_proxy is set and not used" in caplog.text
    assert "set grpc_proxy" in caplog.text
    uses_proxy("8.8.8.8:1", {"grpc_proxy": "http://user:secret@proxy:3128"})
    assert "through that proxy" in caplog.text
    assert "secret" not in caplog.text
