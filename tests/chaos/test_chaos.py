"""The storm in small, for every run of the suite; `python -m tests.chaos` is the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.__main__ import MAIN, SEEDLESS, SOLO, dice_groups
from tests.chaos.dice import agrees, text_of
from tests.chaos.fleet import ChaosFleet
from tests.chaos.storm import Plan, Storm
from tests.chaos.workload import dice_workload


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_no_request_is_lost_and_no_text_differs_while_members_die(tmp_path: Path, seed: int) -> None:
    fleet = ChaosFleet(2, dice_groups(3, 50.0), tmp_path, gateway=True)
    plan = Plan(seed=seed, seconds=30.0, pause_s=1.5, relay=14, client=4, http=6)
    try:
        await fleet.start()
        report = await Storm(fleet, plan, dice_workload(MAIN, SOLO, SEEDLESS, 40), MAIN).run()
    finally:
        await fleet.stop()
    print("\n".join(report.lines()))
    assert report.lost == []
    assert report.differing == []
    assert report.left == []
    assert sum(report.faults.values()) >= 5
    assert sum(report.requests.values()) > 40


def test_the_storm_sees_a_text_that_was_put_together_of_two() -> None:
    key = "0123456789abcdef"
    other = "fedcba9876543210"
    assert agrees(text_of(key, 40))
    assert not agrees(text_of(key, 30) + text_of(other, 40)[30:])
