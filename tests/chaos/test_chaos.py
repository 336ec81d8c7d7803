"""The storm in small, for every run of the suite; `python -m tests.chaos` is the whole one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import Delta, GenerateRequest, ResumedChoice, SamplingParams, StopConditions, TextPrompt
from tests.chaos.__main__ import MAIN, SEEDLESS, SOLO, dice_groups
from tests.chaos.dice import Dice, agrees, text_of
from tests.chaos.fleet import ChaosFleet
from tests.chaos.storm import Plan, Storm
from tests.chaos.workload import dice_workload


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_no_request_is_lost_and_no_text_differs_while_members_die(tmp_path: Path, seed: int) -> None:
    fleet = ChaosFleet(2, dice_groups(3, 50.0), tmp_path, gateway=True)
    plan = Plan(seed=seed, seconds=20.0, pause_s=1.5, relay=14, client=4, http=6)
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


async def test_a_text_with_penalties_goes_on_by_all_that_was_said() -> None:
    sampling = {"presence_penalty": 0.3, "frequency_penalty": 0.15}
    whole = await said(60, **sampling)
    assert await said(60, whole[:30], **sampling) == whole[30:]
    assert await said(60, whole[:20] + whole[10:20], **sampling) != whole[30:]
    assert await said(60, **{**sampling, "frequency_penalty": 0.2}) != whole


async def said(tokens: int, before: Sequence[int] = (), **sampling: float) -> list[int]:
    """Tokens of a worker of dice that goes on from those before."""
    backend = Dice(BackendConfig(name="dice", model=ModelConfig(path="dice", names=("dice",))))
    resume = (ResumedChoice(index=0, output_token_ids=tuple(before)),) if before else None
    request = GenerateRequest(
        prompt=TextPrompt("a"),
        model="dice",
        sampling=SamplingParams(temperature=0, **sampling),  # type: ignore[arg-type]
        stopping=StopConditions(max_new_tokens=tokens),
        resume=resume,
    )
    return [t async for event in backend.generate(request) if isinstance(event, Delta) for t in event.token_ids]
