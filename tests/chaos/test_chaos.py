"""The storm in small, for every run of the suite; `python -m tests.chaos` is the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.__main__ import ECHO_PROMPTS, backend_arguments
from tests.chaos.fleet import ChaosFleet
from tests.chaos.storm import Plan, Storm


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_no_request_is_lost_and_no_text_differs_while_members_die(tmp_path: Path) -> None:
    fleet = ChaosFleet(controllers=2, workers=4, backend=backend_arguments(None, 50.0), log=tmp_path)
    plan = Plan(seed=7, streams=20, seconds=60.0, pause_s=1.5, prompts=ECHO_PROMPTS[:4], max_new_tokens=40)
    try:
        await fleet.start()
        report = await Storm(fleet, plan).run()
    finally:
        await fleet.stop()
    print("\n".join(report.lines()))
    assert report.lost == []
    assert report.differing == []
    assert report.left == []
    assert sum(report.faults.values()) >= 5
    assert report.requests > 40
