"""The soak in small; `python -m tests.chaos.soak` sends 100,000 requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.soak import soak


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_memory_stays_flat_over_many_short_requests(tmp_path: Path) -> None:
    for process in await soak(3_000, tmp_path):
        assert process.grown_mb < 8, process
