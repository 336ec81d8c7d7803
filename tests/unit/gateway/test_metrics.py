"""What a gateway tells of further processes."""

from __future__ import annotations

import threading

import pytest

from fastchat_grpc.config import GatewayConfig, MetricsConfig
from fastchat_grpc.gateway import metrics
from fastchat_grpc.gateway.metrics import GatewayMetrics

TARGETS = tuple((f"t{i}", f"127.0.0.1:{i + 1}") for i in range(3))


def told() -> str:
    config = GatewayConfig(
        controller_addresses=("127.0.0.1:1",), metrics=MetricsConfig(port=0), metrics_targets=TARGETS
    )
    return GatewayMetrics(config, lambda: None)._exposition.render().decode()


def test_processes_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that hang take their time together: else a few of them outlast the patience of whoever scrapes."""
    all_asked = threading.Barrier(len(TARGETS))

    def answer(address: str) -> str:
        all_asked.wait(10)
        return "x 1\n"

    monkeypatch.setattr(metrics, "_target", answer)
    text = told()
    for name, _ in TARGETS:
        assert f'x{{instance="{name}"}} 1' in text
        assert f'fastchat_grpc_target_up{{instance="gateway",target="{name}"}} 1.0' in text


def test_a_process_that_does_not_answer_is_told_to_be_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(address: str) -> str:
        if address == TARGETS[1][1]:
            raise ConnectionRefusedError
        return "x 1\n"

    monkeypatch.setattr(metrics, "_target", answer)
    text = told()
    assert [
        f'target="{name}"}} {up}' in text for (name, _), up in zip(TARGETS, ("1.0", "0.0", "1.0"), strict=True)
    ] == [True] * 3
    assert 'x{instance="t1"}' not in text
