"""Whether a failed attempt may be made elsewhere, and how many of them may."""

from __future__ import annotations

import enum
from collections.abc import Callable
from time import monotonic

from fastchat_grpc.config import FailoverConfig
from fastchat_grpc.errors import Code, FastChatError

BUDGET_WINDOW_S = 10.0


class Verdict(enum.Enum):
    """What a failed attempt says about the next one."""

    FINAL = "final"
    """The request is at fault, or its time is over: it fails anywhere."""
    LOST = "lost"
    """The server went away or could not be reached."""
    LEAVING = "leaving"
    """The server is draining: it goes away in good order."""
    STARTING = "starting"
    """The server has just started and does not know or serve enough yet."""
    FULL = "full"
    """The server has no room."""
    EMPTY = "empty"
    """The server is a controller that has no worker for it."""
    UNABLE = "unable"
    """The server cannot go on with what another began, or does not know the model or the worker; another may."""


_REFUSALS = {
    "QUEUE_FULL": Verdict.FULL,
    "TOO_MANY_CALLS": Verdict.FULL,
    "DRAINING": Verdict.LEAVING,
    "STARTING": Verdict.STARTING,
    "NO_LIVE_WORKER": Verdict.EMPTY,
    "MODEL_DIFFERS": Verdict.UNABLE,
    # A controller that was restarted while the model's workers were away says so; others remember them.
    "MODEL_NOT_FOUND": Verdict.UNABLE,
    "ADAPTER_NOT_FOUND": Verdict.UNABLE,
    "WORKER_NOT_FOUND": Verdict.UNABLE,
}
_FINAL = frozenset({"FAILOVER_EXHAUSTED", "NOT_RESUMABLE", "RELAY_LOOP"})
_INABILITIES = frozenset({Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED, Code.FAILED_PRECONDITION})


def judge(error: FastChatError, *, resumed: bool = False) -> Verdict:
    """Whether an attempt that ended with `error` may be made elsewhere.

    RESOURCE_EXHAUSTED is retried only where the reason is one of our own: grpc answers with the
    same code to messages that are too large, which no other server will take either.

    Args:
        resumed: the attempt went on with what another server began. That server took the request, so
            that a refusal of its fields now is this server's inability.
    """
    refusal = _REFUSALS.get(error.reason)
    if refusal is not None:
        return refusal
    if error.reason in _FINAL:
        return Verdict.FINAL
    if resumed and error.code in _INABILITIES:
        return Verdict.UNABLE
    # A server that stops cancels what is left; a caller's own cancel never comes here as an error.
    if error.code in (Code.UNAVAILABLE, Code.CANCELLED):
        return Verdict.LOST
    # Not an error of ours but of the transport: the stream was reset under it.
    foreign = error.code in (Code.INTERNAL, Code.UNKNOWN) and error.reason in ("INTERNAL", "UNKNOWN")
    if foreign and any(mark in error.message for mark in ("RST_STREAM", "Stream removed", "GOAWAY")):
        return Verdict.LOST
    return Verdict.FINAL


class RetryBudget:
    """Bounds retries to a share of requests plus a reserve per second, so that a struggling fleet is
    not flooded (Finagle's RetryBudget). Resumes are not charged: they replace work that was lost."""

    def __init__(self, config: FailoverConfig, clock: Callable[[], float] = monotonic) -> None:
        self._ratio = config.retry_ratio
        self._rate = config.retry_reserve_per_s
        self._reserve = config.retry_reserve_per_s * BUDGET_WINDOW_S
        self._clock = clock
        self._balance = self._reserve
        self._earned = 0.0
        self._at = clock()

    def request(self) -> None:
        """A request came in: it pays in its share."""
        self._earned = min(self._earned + self._ratio, max(self._reserve, 100.0))

    def withdraw(self) -> bool:
        """Take one retry out; False if none is left."""
        now = self._clock()
        self._balance = min(self._reserve, self._balance + self._rate * (now - self._at))
        self._at = now
        if self._earned >= 1:
            self._earned -= 1
        elif self._balance >= 1:
            self._balance -= 1
        else:
            return False
        return True
