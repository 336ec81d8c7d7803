"""The health of one worker: from everything known of it, whether it may be sent work. Pure; the caller brings the time.

Three reports with three owners, none of which overrules another: what the worker says of itself
(`state`), what happened to requests (`suspect`, the breaker) and what the controller's own connection
says (`unreachable`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from fastchat_grpc.config import BreakerConfig
from fastchat_grpc.controller.breaker import Breaker, BreakerState
from fastchat_grpc.core import WorkerState

REPORT_LIFETIME_S = 1.5
"""A report that a worker cannot be reached is believed this long: whoever watches says it again while it is so."""


class Tier(Enum):
    """Whether a worker is picked: at all, only where no READY one is left, or by choice."""

    NONE = 0
    DEGRADED = 1
    READY = 2


@dataclass(frozen=True, slots=True)
class Drain:
    """An order to drain; `timeout_s` None: the worker's own drain timeout."""

    timeout_s: float | None


class Health:
    """What is known of a worker's ability to take work. Methods say whether `tier` may have changed.

    Attributes that readers may use: `state`, `drain`, `suspect`, `unreachable`, `recovered_at`.
    """

    __slots__ = (
        "_breaker",
        "_config",
        "_probe_ends",
        "_probing",
        "_suspect_until",
        "_unreachable_at",
        "drain",
        "recovered_at",
        "state",
        "undrain",
    )

    def __init__(self, state: WorkerState, now: float, config: BreakerConfig) -> None:
        self._config = config
        self.state = state
        self.drain: Drain | None = None
        self.undrain = False
        """Whether the worker is to hear that its drain was taken back."""
        self.recovered_at = now
        """Time of the last evidence of life: a heartbeat, or a connection that stands again."""
        self._suspect_until: float | None = None
        self._unreachable_at: float | None = None
        self._breaker: Breaker | None = None
        self._probing = False
        self._probe_ends = math.inf

    @property
    def suspect(self) -> bool:
        """Whether a dispatch failed there and nothing has been heard since."""
        return self._suspect_until is not None

    @property
    def unreachable(self) -> bool:
        """Whether the controller's own connection to it is broken, as last reported."""
        return self._unreachable_at is not None

    @property
    def recovering(self) -> bool:
        """Whether the next sign of life may make it pickable."""
        return self._suspect_until is not None or self._unreachable_at is not None

    @property
    def breaker(self) -> BreakerState:
        """What its breaker lets through."""
        return self._breaker.state if self._breaker is not None else BreakerState.CLOSED

    @property
    def half_open(self) -> bool:
        """Whether one request may go there, as a probe."""
        return self._breaker is not None and self._breaker.state is BreakerState.HALF_OPEN

    @property
    def tier(self) -> Tier:
        """Whether the worker is picked."""
        if self.drain is not None or self._suspect_until is not None or self._unreachable_at is not None:
            return Tier.NONE
        breaker = self._breaker
        if breaker is not None:
            if breaker.state is BreakerState.OPEN:
                return Tier.NONE
            if breaker.state is BreakerState.HALF_OPEN and self._probing:
                return Tier.NONE
        match self.state:
            case WorkerState.SERVING:
                return Tier.READY
            case WorkerState.DEGRADED:
                return Tier.DEGRADED
        return Tier.NONE

    # ------------------------------------------------------------------------ what people order

    def drained(self, order: Drain) -> None:
        """It is to take nothing more."""
        self.drain = order
        self.undrain = False

    def undrained(self) -> None:
        """It is to take work again. It does so when it has heard of it, and says so."""
        self.undrain = self.drain is not None or self.state is WorkerState.DRAINING
        self.drain = None

    # ------------------------------------------------------------------------ what the worker says

    def heard(self, state: WorkerState, now: float) -> bool:
        """A heartbeat: the worker lives, and says how it is.

        It ends a suspicion. It ends a report that the worker is unreachable only when nobody has repeated
        that report lately: whoever reported it watches no more, and would not say when it is over.
        """
        self.recovered_at = now
        if state is not WorkerState.DRAINING:
            self.undrain = False
        if state is self.state and self._suspect_until is None and self._unreachable_at is None:
            return False
        self.state = state
        self._suspect_until = None
        if self._unreachable_at is not None and now - self._unreachable_at > REPORT_LIFETIME_S:
            self._unreachable_at = None
        return True

    # -------------------------------------------------------------------- what the connection says

    def lost_connection(self, now: float) -> bool:
        """The connection to it is broken, or is still broken."""
        self._unreachable_at = now
        return True

    def connected(self, now: float) -> bool:
        """The connection to it stands again."""
        self.recovered_at = now
        self._unreachable_at = None
        return True

    def unwatched(self) -> bool:
        """Nobody watches the connection any more: what was last reported of it says nothing now."""
        was, self._unreachable_at = self._unreachable_at, None
        return was is not None

    # ------------------------------------------------------------------------ what requests meet

    def suspected(self, until: float) -> bool:
        """A dispatch failed: nothing more goes there until the next heartbeat, or `until`."""
        self._suspect_until = until
        return True

    def succeeded(self, now: float, *, probe: bool) -> bool:
        """A request ran to its end there.

        Args:
            probe: whether it was the one that a half-open breaker let through. The end of one that began
                before the worker failed says nothing of how it is now.
        """
        breaker = self._breaker
        if breaker is None or (breaker.state is BreakerState.HALF_OPEN and not probe):
            return False
        was = breaker.state
        breaker.success(now)
        if breaker.state is was:
            return False
        self._probing = False
        return True

    def failed(self, now: float) -> float | None:
        """A request failed through the worker's fault. The time at which a probe is due, if the breaker is open."""
        if self._breaker is None:
            self._breaker = Breaker(self._config)
        self._breaker.failure(now)
        if self._breaker.state is not BreakerState.OPEN:
            return None
        self._probing = False
        return self._breaker.ready_at

    def begin_probe(self, ends: float) -> bool:
        """A request is sent there: True if it is the one probe of a half-open breaker.

        Args:
            ends: when another probe may go, though this one has not ended: it may be a long request, or one
                of which nobody tells.
        """
        if not self.half_open or self._probing:
            return False
        self._probing = True
        self._probe_ends = ends
        return True

    def end_probe(self) -> bool:
        """The probe ended without a verdict: another may go."""
        was, self._probing = self._probing, False
        return was

    # ------------------------------------------------------------------------------------- time

    def on_time(self, now: float) -> None:
        """End what time alone ends: a cooldown, a probe, a suspicion."""
        breaker = self._breaker
        if breaker is not None and breaker.state is BreakerState.OPEN and breaker.ready_at <= now:
            breaker.half_open()
        if self._probing and self._probe_ends <= now:
            self._probing = False
        if self._suspect_until is not None and self._suspect_until <= now:
            self._suspect_until = None
