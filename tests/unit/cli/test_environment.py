"""Variables of the environment that look like flags and are none."""

from __future__ import annotations

import os

import pytest

from fastchat_grpc.cli import forget_services


@pytest.mark.parametrize("name", ["PORT", "CONTROLLER_PORT", "GATEWAY_PORT", "METRICS_PORT"])
def test_what_kubernetes_tells_of_services_is_no_flag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"FASTCHAT_GRPC_{name}", "tcp://10.0.0.1:21001")
    forget_services()
    assert f"FASTCHAT_GRPC_{name}" not in os.environ


def test_flags_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCHAT_GRPC_CONTROLLER_PORT", "21001")
    monkeypatch.setenv("CONTROLLER_PORT", "tcp://10.0.0.1:21001")
    forget_services()
    assert os.environ["FASTCHAT_GRPC_CONTROLLER_PORT"] == "21001"
    assert "CONTROLLER_PORT" in os.environ
