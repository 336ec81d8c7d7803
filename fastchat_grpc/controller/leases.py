"""When leases end: terms that scale with the fleet, and grace for what the controller itself is late with. Pure.

A lease must not end because its heartbeats wait in the controller's own backlog. Three things tell of one:
a gap between two looks at the clock (the process was stopped or starved), a storm of registrations (the
whole fleet comes back at once), and heartbeats that all come late.
"""

from __future__ import annotations

from collections import deque

from fastchat_grpc.config import LeaseConfig
from fastchat_grpc.controller.fleet import LeaseTerms, Worker

SURE_AFTER_LEASES = 10
"""So long after its controller restarts a worker may be away and not unknown: its model may take a minute to load."""
STALL_S = 1.0
"""A gap between two looks at the clock that is this long was the controller's own: nobody expires for it."""
GRACE_INTERVALS = 1.5
"""What is late through the controller's own fault gets this many heartbeat intervals more."""
STORM_SIZE = 20
"""So many new workers within one heartbeat interval are a storm, if they are also a notable share of the fleet."""
STORM_SHARE = 0.02
LATE_S = 0.5
"""A heartbeat that comes this late does so for a reason."""
LATE_RUN = 8
"""So many late heartbeats in a row, and none in time between them, are the controller's own lateness."""


class Leases:
    """The terms of leases, and when they end.

    Attributes:
        terms: what a lease gets now.
    """

    def __init__(self, config: LeaseConfig, now: float) -> None:
        self._config = config
        self.looked_at = now
        """Time of the last look at the clock; the registry sets it."""
        self._grace_until = now
        self._joined = 0
        self._joined_since = now
        self._storm_since: float | None = None
        self.late: deque[float] = deque(maxlen=LATE_RUN)
        """By how much the last heartbeats came late, since one came in time."""
        self._late_at = now
        self.terms = LeaseTerms(config.time_to_live_s, config.heartbeat_interval_s)
        self.settles_at = now + 2 * config.heartbeat_interval_s
        """By then every worker of before that is there has been heard."""
        self.sure_at = now + SURE_AFTER_LEASES * config.time_to_live_s
        """What no worker has served by then does not exist."""

    def resize(self, size: int) -> None:
        """Scale interval and time to live so that all heartbeats together stay under the set rate."""
        config = self._config
        interval_s = max(config.heartbeat_interval_s, size / config.max_heartbeats_per_s)
        if interval_s != self.terms.heartbeat_interval_s:
            scale = interval_s / config.heartbeat_interval_s
            self.terms = LeaseTerms(config.time_to_live_s * scale, interval_s)

    def stalled(self, now: float) -> None:
        """The process was stopped or starved; heartbeats wait in its sockets. Let them be read first."""
        self._grant(now)

    def joined(self, now: float, size: int) -> None:
        """A worker has come that was not there; `size` workers are there now."""
        self.resize(size)
        if now - self._joined_since > self.terms.heartbeat_interval_s:
            if self._joined < self._storm_size(size):
                self._storm_since = None
            self._joined, self._joined_since = 0, now
        self._joined += 1
        if self._joined < self._storm_size(size):
            return
        if self._storm_since is None:
            self._storm_since = self._joined_since
        # Not for ever: a fleet whose workers come and go all the time must expire those that are gone.
        if now - self._storm_since < 3 * self.terms.time_to_live_s:
            self._grant(now)

    def heard(self, late_s: float, now: float) -> None:
        """A heartbeat has come so late. Need not be told while all come in time."""
        if late_s > LATE_S:
            self.late.append(late_s)
            self._late_at = now
        else:
            self.late.clear()

    def ends_at(self, worker: Worker, now: float) -> float:
        """When a worker's lease ends, if nothing is heard of it."""
        terms = self.terms
        # The fleet may have grown since its terms were told: then heartbeats come later.
        deadline = max(worker.deadline, worker.heartbeat_at + terms.time_to_live_s)
        if len(self.late) == LATE_RUN and now - self._late_at <= terms.time_to_live_s:
            deadline += min(self.late)
        return max(deadline, self._grace_until)

    def _grant(self, now: float) -> None:
        self._grace_until = max(self._grace_until, now + self.terms.heartbeat_interval_s * GRACE_INTERVALS)

    def _storm_size(self, size: int) -> float:
        return max(STORM_SIZE, STORM_SHARE * size)
