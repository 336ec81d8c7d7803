"""What is done next for one call that its servers may fail: a table.

`next_step` is a pure function of what the call has been through and of who could take it. A controller's relay
and a client follow it alike; whatever else carries requests past failing servers can do the same.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from fastchat_grpc.config import FailoverConfig
from fastchat_grpc.rpc.retry import Verdict


class Step(enum.Enum):
    """What to do next."""

    TRY = "try"
    """Ask a server now."""
    WAIT = "wait"
    """Until there is room or somebody comes back, but no longer than patience lasts."""
    STOP = "stop"
    """Tell the caller."""


class Outlook(enum.Enum):
    """Who could take the call, given what it needs and whom it has tried."""

    READY = "ready"
    """Somebody, now."""
    COMING = "coming"
    """Nobody now, but somebody is known to come back: a server that was lost a moment ago, or starts."""
    OPEN = "open"
    """Nobody that is known of; but servers come and go, so somebody may turn up."""
    CLOSED = "closed"
    """Nobody, and no other can turn up: a fixed list of servers has been asked, and has said no."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Where a call stands."""

    last: Verdict | None = None
    """How its last attempt ended; None before the first."""
    started: bool = False
    """Whether its caller has seen an event: from then on it can only be resumed, not made again."""
    displaced: bool = False
    """Whether a server that had it went away: it has waited its turn once."""
    resumable: bool = True
    """Whether another server could go on with it."""
    attempts: int = 0
    """Attempts that were made before the first event; not counted: refusals of servers that start, drain or
    have no worker, or, of what is displaced, for want of room."""
    losses: int = 0
    """Servers that were lost after it."""
    funded: bool = True
    """Whether the retry budget pays for another attempt before the first event."""
    patience_s: float = 1.0
    """Time left to wait in, in seconds."""
    late: bool = False
    """Whether the caller's deadline has passed."""


def next_step(situation: Situation, outlook: Outlook, limits: FailoverConfig) -> Step:
    """The next step of a call."""
    if situation.late or not _may_go_on(situation, limits):
        return Step.STOP
    if outlook is Outlook.READY:
        return Step.TRY
    if situation.patience_s <= 0 or outlook is Outlook.CLOSED:
        return Step.STOP
    return Step.WAIT if _worth_waiting(situation, outlook) else Step.STOP


def _may_go_on(situation: Situation, limits: FailoverConfig) -> bool:
    """Whether another attempt may be made, if anybody can take it."""
    if situation.last is None:
        return True
    if situation.last is Verdict.FINAL:
        return False
    if situation.started:
        # Only losses count: a request may be what breaks its servers, but not what fills or drains them.
        return situation.resumable and limits.max_resumes > 0 and situation.losses <= limits.max_resumes
    return situation.attempts < limits.max_attempts and situation.funded


def _worth_waiting(situation: Situation, outlook: Outlook) -> bool:
    """Whether to wait although nobody can take it now."""
    if situation.started:
        return True
    match situation.last:
        case Verdict.LOST | Verdict.LEAVING | Verdict.STARTING:
            return True
        case None | Verdict.EMPTY:
            return outlook is Outlook.COMING
        case Verdict.FULL:
            return situation.displaced
    return False
