"""The storm in small, for every run of the suite; `python -m tests.chaos` is the whole one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from types import SimpleNamespace

import pytest

from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import Delta, GenerateRequest, ResumedChoice, SamplingParams, StopConditions, TextPrompt
from tests.chaos.__main__ import MAIN, SEEDLESS, SOLO, dice_groups
from tests.chaos.callers import Broken, Lost, Refused, patiently
from tests.chaos.dice import Dice, agrees, text_of
from tests.chaos.disturbance import GRACE_S, STALL_S, Disturbance, Disturbances, Excuses
from tests.chaos.fleet import ChaosFleet
from tests.chaos.storm import Plan, Storm
from tests.chaos.workload import Answer, Ask, dice_workload
from tests.conftest import eventually


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
    assert not report.broken  # its gateway resumes
    assert report.differing == []
    assert report.left == []
    assert sum(report.faults.values()) >= 5
    assert sum(report.requests.values()) > 40


class Refusing:
    """A caller who is refused, for want of workers or of room, and then answered."""

    longest_gap_s = 0.0

    def __init__(self, *refusals: Exception) -> None:
        self._refusals = list(refusals)

    async def ask(self, ask: Ask) -> Answer:
        if self._refusals:
            raise self._refusals.pop(0)
        return Answer(())

    async def close(self) -> None:
        pass


GONE, FULL = Refused("gone", full=False), Refused("full", full=True)


async def refusals(excuses: Excuses, *told: Exception, patience_s: float = 60.0) -> int:
    """How many refusals a caller has heard who got an answer at last."""
    ask = Ask(name="solo", model="solo", prompt="a")
    return (await patiently(Refusing(*told), ask, patience_s, excuses))[1]


async def test_a_refusal_is_excused_only_where_all_that_are_asked_may_have_been_away() -> None:
    names = [SimpleNamespace(name=name) for name in "abcde"]
    workers, controllers = names[:3], names[3:]
    faults = Disturbances()
    excuses = Excuses(faults, controllers, workers)
    assert await refusals(excuses, FULL, FULL) == 2
    with pytest.raises(Lost, match="gone"):
        await refusals(excuses, GONE)
    with pytest.raises(Lost, match="refused 1 times"):
        await refusals(excuses, FULL, patience_s=0)
    with faults.during("kill", [*workers[:2], controllers[0]]), pytest.raises(Lost):
        await refusals(excuses, GONE)
    with faults.during("kill", workers[2:]):  # those before may not be back yet
        assert await refusals(excuses, GONE, GONE, FULL, patience_s=0) == 3
    now = monotonic()
    assert excuses.refusal(now, now)
    assert not excuses.refusal(now + 2 * GRACE_S, now + 3 * GRACE_S)


async def test_a_broken_stream_is_lost_unless_nobody_may_have_been_left_to_go_on_with_it() -> None:
    *workers, controller, other = [SimpleNamespace(name=name) for name in "abcd"]
    faults = Disturbances()
    excuses = Excuses(faults, [controller, other], workers)
    broken = Broken("its worker is gone")
    with pytest.raises(Lost, match="nothing excuses it: its worker is gone"):
        await refusals(excuses, broken)
    with faults.during("kill", [workers[0], controller]), pytest.raises(Lost):
        await refusals(excuses, broken)
    with faults.during("kill", workers[1:]), pytest.raises(Broken):
        await refusals(excuses, broken)
    faults = Disturbances()
    with faults.during("all controllers restart", [controller, other]), pytest.raises(Broken):
        await refusals(Excuses(faults, [controller, other], workers), broken)


async def test_all_controllers_away_excuse_a_refusal_too() -> None:
    worker, *controllers = [SimpleNamespace(name=name) for name in "abc"]
    faults = Disturbances()
    with faults.during("all controllers restart", controllers):
        assert await refusals(Excuses(faults, controllers, [worker]), GONE) == 1


async def test_who_gave_up_to_wait_is_excused_by_an_outage_that_outlasts_him_alone() -> None:
    names = [SimpleNamespace(name=name) for name in "abc"]
    faults = Disturbances()
    excuses = Excuses(faults, names[:1], names[1:])
    gone = Lost("gone", away=True)
    with pytest.raises(Lost):
        await refusals(excuses, gone)
    now = monotonic()
    faults.add(Disturbance("restart", names[1:2], now - 20, now + 5))
    faults.add(Disturbance("restart", names[2:], now - 5, now + 20))
    assert faults.outage_s(names[1:], now - 30, now + 30) == pytest.approx(10)
    assert not excuses.patience_ended(now - 4, now + 30)
    assert excuses.patience_ended(now - 30, now + 30)


async def test_a_storm_that_stood_still_is_felt_by_all() -> None:
    names = [SimpleNamespace(name=name) for name in "ab"]
    faults = Disturbances()
    watch = asyncio.create_task(faults.watch(names))
    await asyncio.sleep(0)
    before = monotonic()
    time.sleep(1.2 * STALL_S)  # noqa: ASYNC251  # that is the point
    await eventually(lambda: faults.among(names, before, monotonic()) == 2)
    watch.cancel()


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
