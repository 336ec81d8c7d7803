"""A circuit breaker for one worker: closed, open, half open. Pure; the caller brings the time.

It counts what is the worker's fault alone. Client errors, back-pressure, drains and cancelled calls are
not reported to it: breakers that counted those have taken whole fleets out.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

from fastchat_grpc.config import BreakerConfig


class BreakerState(Enum):
    """What a breaker lets through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Opens when at least `min_failures` and `failure_ratio` of the calls of the window failed.

    After the cooldown (`ready_at`) the owner calls `half_open`; one call may then go through as a
    probe. Its success closes the breaker, its failure opens it again for twice the time.
    """

    __slots__ = ("_config", "_cooldown_s", "_failures", "_outcomes", "ready_at", "state")

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self._cooldown_s = config.cooldown_s
        self._outcomes: deque[tuple[float, bool]] = deque()  # (time, failed), oldest first
        self._failures = 0
        self.state = BreakerState.CLOSED
        self.ready_at = 0.0

    def success(self, now: float) -> None:
        """Count a call that the worker answered."""
        if self.state is BreakerState.CLOSED:
            self._count(now, failed=False)
        elif self.state is BreakerState.HALF_OPEN:
            self._close()

    def failure(self, now: float) -> None:
        """Count a call that failed through the worker's fault."""
        if self.state is BreakerState.HALF_OPEN:
            self._cooldown_s = min(self._cooldown_s * 2, self._config.max_cooldown_s)
            self._open(now)
        elif self.state is BreakerState.CLOSED:
            self._count(now, failed=True)
            config = self._config
            if self._failures >= config.min_failures and self._failures >= config.failure_ratio * len(self._outcomes):
                self._open(now)

    def half_open(self) -> None:
        """The cooldown is over: let a probe through."""
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN

    def _count(self, now: float, *, failed: bool) -> None:
        outcomes, oldest = self._outcomes, now - self._config.window_s
        outcomes.append((now, failed))
        self._failures += failed
        # The window is bounded in count, too: a fast worker would otherwise hold thousands of entries.
        while outcomes and (outcomes[0][0] < oldest or len(outcomes) > MAX_OUTCOMES):
            self._failures -= outcomes.popleft()[1]

    def _open(self, now: float) -> None:
        self.state = BreakerState.OPEN
        self.ready_at = now + self._cooldown_s
        self._outcomes.clear()
        self._failures = 0

    def _close(self) -> None:
        self.state = BreakerState.CLOSED
        self._cooldown_s = self._config.cooldown_s


MAX_OUTCOMES = 256
