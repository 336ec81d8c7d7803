"""How often a registered server speaks to its controller. Pure: what a controller asks for in, times out.

A controller asks for longer intervals as its fleet grows, so that all heartbeats together stay under a rate.
The interval therefore tells every worker how large the fleet is, and whatever a worker does on its own
(register again when the controller is back, report a change of its load early) is spread or bounded by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

DEFAULT_INTERVAL_S = 2.0
"""For a controller that asks for none."""
MIN_INTERVAL_S = 0.05
"""However small an interval a controller asks for."""
INTERVALS_PER_LEASE = 3.0
JITTER = 0.1
MIN_CALL_TIMEOUT_S = 0.5
MAX_CALL_TIMEOUT_S = 5.0
LARGE_INTERVAL_S = 20.0
"""The interval from which on a returning controller is met over the whole of an interval: at the usual rate
of 1,000 heartbeats per second, that of a fleet of 20,000."""
MIN_RECONNECT_S = 0.2
MAX_RECONNECT_S = 10.0
MIN_PUSH_GAP_S = 0.1
PUSH_BURST = 4


@dataclass(frozen=True, slots=True)
class Pace:
    """The times of one lease, in seconds, from what the controller answered.

    Args:
        asked_interval_s: time between heartbeats that the controller asks for; 0 or less: none.
        time_to_live_s: the lease ends this long after a heartbeat; 0 or less: not said.
    """

    asked_interval_s: float = 0.0
    time_to_live_s: float = 0.0

    @property
    def known(self) -> bool:
        """Whether a controller has said anything yet."""
        return self.asked_interval_s > 0 or self.time_to_live_s > 0

    @property
    def interval_s(self) -> float:
        """The controller's interval, or a sane one where it gives none or one that would lose the lease."""
        bound_s = self.time_to_live_s / INTERVALS_PER_LEASE if self.time_to_live_s > 0 else DEFAULT_INTERVAL_S
        asked_s = self.asked_interval_s
        kept = 0 < asked_s < self.time_to_live_s or (asked_s > 0 and self.time_to_live_s <= 0)
        return max(asked_s if kept else bound_s, MIN_INTERVAL_S)

    @property
    def lease_s(self) -> float:
        """How long the lease lasts without a heartbeat."""
        return self.time_to_live_s if self.time_to_live_s > 0 else self.interval_s * INTERVALS_PER_LEASE

    def heartbeat_s(self, wanted_s: float | None) -> float:
        """Time between heartbeats: the wanted one, unless one that is lost on its way would lose the lease."""
        return wanted_s if wanted_s is not None and not self.too_slow(wanted_s) else self.interval_s

    def too_slow(self, wanted_s: float) -> bool:
        """Whether heartbeats so far apart would lose the lease as soon as one of them is lost."""
        return wanted_s > max(self.lease_s / 2, self.interval_s)

    @property
    def call_timeout_s(self) -> float:
        """Time for one heartbeat's answer: after one that was lost there is time for another, within the lease."""
        left_s = self.lease_s - self.interval_s * (1 + JITTER)
        return min(max(left_s / 2, MIN_CALL_TIMEOUT_S), MAX_CALL_TIMEOUT_S)

    @property
    def spread_s(self) -> float:
        """Time over which the workers of this fleet come back to a controller that has returned.

        It grows with the square of the interval up to the interval itself: 0.2 s for a fleet small enough for
        heartbeats each 2 s, 20 s for one of 20,000 workers, which register 1,000 per second then.
        """
        return self.interval_s * min(self.interval_s / LARGE_INTERVAL_S, 1.0)

    @property
    def reconnect_s(self) -> float:
        """Most time between two attempts to connect to a controller that is away."""
        return min(max(self.spread_s, MIN_RECONNECT_S), MAX_RECONNECT_S)

    def outgrown(self, earlier: Pace) -> bool:
        """Whether a connection that was opened for an earlier pace would come back much too early or too late."""
        ratio = self.reconnect_s / earlier.reconnect_s
        return ratio > 2 or ratio < 0.5


class PushBudget:
    """Bounds heartbeats that are sent early, because the load has changed, to one per interval on average.

    A few may come at once, MIN_PUSH_GAP_S apart. With them a fleet sends at most twice the heartbeats that its
    controllers ask for.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._left = float(PUSH_BURST)
        self._at = clock()

    def take(self, interval_s: float) -> bool:
        """Spend one push; False if none is left now."""
        self._refill(interval_s)
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def wait_s(self, interval_s: float) -> float:
        """Seconds until a push is left."""
        self._refill(interval_s)
        return max(0.0, 1 - self._left) * interval_s

    def _refill(self, interval_s: float) -> None:
        now = self._clock()
        self._left = min(self._left + (now - self._at) / interval_s, PUSH_BURST)
        self._at = now
