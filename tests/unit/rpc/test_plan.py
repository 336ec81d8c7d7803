"""The table of what a call does next, line by line."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from fastchat_grpc.backends.capabilities import TRAITS, Feature
from fastchat_grpc.config import FailoverConfig
from fastchat_grpc.rpc.plan import Outlook, Situation, Step, next_step
from fastchat_grpc.rpc.retry import Verdict

LIMITS = FailoverConfig(max_attempts=3, max_resumes=2)
READY, COMING, OPEN, CLOSED = Outlook.READY, Outlook.COMING, Outlook.OPEN, Outlook.CLOSED
TRY, WAIT, STOP = Step.TRY, Step.WAIT, Step.STOP
FINAL, LOST, LEAVING, STARTING = Verdict.FINAL, Verdict.LOST, Verdict.LEAVING, Verdict.STARTING
FULL, EMPTY, UNABLE = Verdict.FULL, Verdict.EMPTY, Verdict.UNABLE

# Before the first event. By how the last attempt ended: what is done if somebody can take it now, if somebody is
# known to come back, if somebody may turn up, and if nobody can.
NEW = {
    None: (TRY, WAIT, STOP, STOP),
    FINAL: (STOP, STOP, STOP, STOP),
    LOST: (TRY, WAIT, WAIT, STOP),
    LEAVING: (TRY, WAIT, WAIT, STOP),
    STARTING: (TRY, WAIT, WAIT, STOP),
    FULL: (TRY, STOP, STOP, STOP),
    EMPTY: (TRY, WAIT, STOP, STOP),
    UNABLE: (TRY, STOP, STOP, STOP),
}
# After it, whatever is not final is waited for: half an answer is of no use to anybody.
BEGUN = dict.fromkeys(NEW, (TRY, WAIT, WAIT, STOP)) | {FINAL: (STOP, STOP, STOP, STOP)}

TABLE = [
    pytest.param(
        started, last, outlook, step, id=f"{'begun' if started else 'new'}-{last and last.value}-{outlook.value}"
    )
    for started, rows in ((False, NEW), (True, BEGUN))
    for last, steps in rows.items()
    for outlook, step in zip((READY, COMING, OPEN, CLOSED), steps, strict=True)
]


@pytest.mark.parametrize(("started", "last", "outlook", "step"), TABLE)
def test_the_table(started: bool, last: Verdict | None, outlook: Outlook, step: Step) -> None:
    situation = Situation(last=last, started=started, attempts=0 if last is None else 1)
    assert next_step(situation, outlook, LIMITS) is step


def test_what_has_waited_its_turn_once_waits_for_room_again() -> None:
    for outlook, step in ((READY, TRY), (COMING, WAIT), (OPEN, WAIT), (CLOSED, STOP)):
        assert next_step(Situation(last=FULL, displaced=True, attempts=1), outlook, LIMITS) is step


LIMIT_CASES = {
    "as many attempts as allowed": (Situation(last=LOST, attempts=2), TRY),
    "one more": (Situation(last=LOST, attempts=3), STOP),
    "the budget is used up": (Situation(last=LOST, attempts=1, funded=False), STOP),
    "the budget is not asked for what has begun": (Situation(last=LOST, started=True, funded=False, losses=1), TRY),
    "attempts do not count once it has begun": (Situation(last=LOST, started=True, attempts=3, losses=1), TRY),
    "as many losses as allowed": (Situation(last=LOST, started=True, losses=2), TRY),
    "one loss more": (Situation(last=LOST, started=True, losses=3), STOP),
    "drained however often": (Situation(last=LEAVING, started=True, losses=2, attempts=99), TRY),
    "it cannot be resumed": (Situation(last=LOST, started=True, resumable=False, losses=1), STOP),
    "what cannot be resumed can be made again": (Situation(last=LOST, resumable=False, attempts=1), TRY),
    "the deadline has passed": (Situation(late=True), STOP),
    "the deadline has passed midway": (Situation(last=LOST, started=True, losses=1, late=True), STOP),
}


@pytest.mark.parametrize(("situation", "step"), LIMIT_CASES.values(), ids=LIMIT_CASES)
def test_limits(situation: Situation, step: Step) -> None:
    assert next_step(situation, READY, LIMITS) is step


def test_turned_off_resuming_ends_what_has_begun_however_it_ended() -> None:
    off = FailoverConfig(max_resumes=0)
    for last in Verdict:
        assert next_step(Situation(last=last, started=True), READY, off) is STOP


@pytest.mark.parametrize(("last", "started"), list(itertools.product([None, *Verdict], [False, True])))
def test_nobody_waits_without_patience(last: Verdict | None, started: bool) -> None:
    for outlook in (COMING, OPEN, CLOSED):
        assert next_step(Situation(last=last, started=started, patience_s=0.0), outlook, LIMITS) is STOP


def rows_after(heading: str) -> dict[str, tuple[str, ...]]:
    """Rows of the first table of the page that begins with such a heading, by their first column."""
    rows: dict[str, tuple[str, ...]] = {}
    lines = iter((Path(__file__).parents[3] / "docs" / "failover.md").read_text().splitlines())
    for line in lines:
        if line.startswith(f"| {heading} |"):
            break
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            break
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first] = tuple(others)
    return rows


def test_the_documented_table_is_this_one() -> None:
    documented = {name.partition(":")[0]: steps for name, steps in rows_after("last attempt").items()}
    assert documented == {
        "none yet" if last is None else last.value: tuple(step.value for step in steps) for last, steps in NEW.items()
    }


def test_the_documented_backends_can_what_they_declare() -> None:
    features = (Feature.RESUME, Feature.RESUME_SEED, Feature.RESUME_STATE)
    documented = rows_after("backend")
    assert set(documented) == set(TRAITS) - {"multi"}
    for name, cells in documented.items():
        assert [cell != "no" for cell in cells] == [TRAITS[name].supports(feature) for feature in features], name
