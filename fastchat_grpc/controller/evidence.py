"""What the end of an attempt says of the worker that was asked: one rule, whoever carried the request there."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from fastchat_grpc.errors import Code, FastChatError, ModelNotFound
from fastchat_grpc.rpc.retry import Verdict


class Evidence(enum.Enum):
    """What an attempt says of its worker."""

    GOOD = "good"
    """It answered in full."""
    FAULT = "fault"
    """It failed the request: its breaker counts that."""
    LOST = "lost"
    """It went away, or could not be reached."""
    FULL = "full"
    """It has no room."""
    AWAY = "away"
    """It is healthy and takes nothing now: it drains, starts, or does not serve the model that it registered."""
    NOTHING = "nothing"
    """The request, its caller, or whoever is behind the worker is why it ended.

    What a caller can bring about by the words of a request is among it: an adapter that is not there must not keep
    others from the worker.
    """


_BY_VERDICT: Mapping[Verdict, Evidence] = {
    Verdict.LOST: Evidence.LOST,
    Verdict.LEAVING: Evidence.AWAY,
    Verdict.STARTING: Evidence.AWAY,
    Verdict.FULL: Evidence.FULL,
    Verdict.EMPTY: Evidence.NOTHING,
    Verdict.UNABLE: Evidence.NOTHING,
}
_FAULTS = frozenset({Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS})


def evidence(error: FastChatError, verdict: Verdict) -> Evidence:
    """What an error says of the worker that gave it, as `rpc.retry.judge` has judged it."""
    if isinstance(error, ModelNotFound):
        return Evidence.AWAY  # its model was found before it was asked, so that no caller can bring this about
    if verdict is Verdict.FINAL:
        return Evidence.FAULT if error.code in _FAULTS else Evidence.NOTHING
    return _BY_VERDICT[verdict]
