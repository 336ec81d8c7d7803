"""One started backend at a time, shared by the tests that ask it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from fastchat_grpc.backends.openvino.quiet import forbid_telemetry
from tests.conformance.harness import Harness
from tests.conformance.targets import Target, chosen

forbid_telemetry()  # of what tests import themselves


def _parameters() -> list[object]:
    return [
        pytest.param(target, id=target.label or target.name, marks=[pytest.mark.slow] if target.real else [])
        for target in chosen()
    ]


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=_parameters())
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """A started backend."""
    target: Target = request.param
    harness = Harness(target)
    await harness.open()
    yield harness
    await harness.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The first test of a backend waits until its engine has started, and perhaps exported or compiled a model."""
    left_out = []
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(600))
            callspec = getattr(item, "callspec", None)
            target = callspec.params.get("harness") if callspec is not None else None
            if isinstance(target, Target) and target.fuzz_only and item.path.stem != "test_fuzz":
                left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
