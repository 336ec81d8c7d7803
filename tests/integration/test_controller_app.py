"""The controller's process as a whole: what it does when something in it goes wrong, or runs out."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fastchat_grpc.controller.fleet import WorkerSpec
from fastchat_grpc.core import Load, ModelInfo
from tests.conftest import eventually
from tests.integration.controllers import running_controller


def spec(i: int) -> WorkerSpec:
    return WorkerSpec(
        worker_id=f"w{i}",
        instance_id=f"i{i}",
        address=f"127.0.0.1:{i + 1}",
        models=(ModelInfo(name="m", context_length=1),),
    )


async def test_that_descriptors_run_short_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async with running_controller() as controller:
        controller._descriptor_limit = 10
        with caplog.at_level(logging.WARNING):
            for i in range(9):
                controller.registry.register(spec(i), Load())
                said = [record for record in caplog.records if "ulimit" in record.getMessage()]
                assert len(said) == (i >= 4), "5 workers take 10 of 10"


async def test_a_background_task_that_fails_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_controller() as controller:
        await eventually(lambda: controller._serving)
        looked, failing = 0, True
        expire = controller.registry.expire

        def expires() -> Any:
            nonlocal looked
            looked += 1
            if failing:
                raise RuntimeError("for once")
            return expire()

        monkeypatch.setattr(controller.registry, "expire", expires)
        await eventually(lambda: looked >= 3 and not controller._serving, timeout_s=20)
        failing, seen = False, looked
        await eventually(lambda: looked > seen, timeout_s=20)
