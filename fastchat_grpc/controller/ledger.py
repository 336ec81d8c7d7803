"""The ledger of one worker: how much work it has, as best known. Pure; the caller brings the time.

A worker reports its queue with each heartbeat. Between two reports the controller adds what it has sent
there and takes away what has ended; what other controllers send shows in the next report.
"""

from __future__ import annotations

import math

from fastchat_grpc.config import MAX_SECONDS
from fastchat_grpc.core import Load

CARRIED = -1
"""The mark of a reservation whose request the controller itself carries, so that it sees its end."""


class Ledger:
    """Requests of one worker. `score` is its queue over its weight: the lower, the sooner it is picked.

    Reservations are of two kinds. The end of those that the controller carries is certain. Of the others
    (a gateway's) the end is told by somebody else, and that word may be lost: those that are older than two
    reports count only as far as the worker's own figures have room for them.
    """

    __slots__ = (
        "_epoch",
        "_epoch_at",
        "_external",
        "_full_until",
        "_lent_before",
        "_lent_long_ago",
        "_lent_now",
        "_padding",
        "_written_off",
        "carried",
        "load",
        "queue_length",
        "score",
        "weight",
    )

    def __init__(self, load: Load, weight: float, now: float) -> None:
        self.load = load
        self.weight = weight
        self.carried = 0
        """Reservations of requests that the controller carries."""
        self.score = 0.0
        self._external = load.queue_length  # others' requests, as last reported
        self._padding = 0  # what makes a worker that refused count as full
        self._full_until = 0.0
        # Reservations that others end: made since the present epoch began, in the one before, and earlier.
        self._lent_now = self._lent_before = self._lent_long_ago = 0
        self._epoch = 0
        self._epoch_at = now
        self._written_off = 0  # of the oldest, those that the worker does not have
        self.queue_length = 0
        """Requests that run and wait there, as best known."""
        self._update()

    @property
    def reserved(self) -> int:
        """Requests that this controller has sent there and that have not ended, as far as it knows."""
        return self.carried + self._lent_now + self._lent_before + self._lent_long_ago - self._written_off

    @property
    def room(self) -> int:
        """How many more requests it takes, as best known; at most one where it does not tell its bounds."""
        capacity = self.load.max_running + self.load.max_waiting
        if self.load.max_running == 0:
            return 0 if self._padding else 1
        return max(0, capacity - self.queue_length)

    def reserve(self, carried: bool) -> int:
        """Count a request that is sent there. Returns the mark that `release` wants."""
        self.queue_length += 1
        self.score = self.queue_length / self.weight
        if carried:
            self.carried += 1
            return CARRIED
        self._lent_now += 1
        return self._epoch

    def release(self, mark: int) -> None:
        """A request that was counted has ended."""
        if mark == CARRIED:
            self.carried -= 1
        elif mark == self._epoch:
            self._lent_now -= 1
        elif mark == self._epoch - 1:
            self._lent_before -= 1
        else:
            self._lent_long_ago -= 1
            if self._written_off > self._lent_long_ago:
                self._written_off -= 1  # it was not counted any more
                return
        self.queue_length -= 1
        self.score = self.queue_length / self.weight

    def report(self, load: Load, now: float, interval_s: float) -> None:
        """Take the worker's own figures."""
        self.load = load
        self._padding = 0
        queue = load.running + load.waiting - self.carried
        if not (self._lent_now or self._lent_before or self._lent_long_ago):  # the usual
            self._external = queue = queue if queue > 0 else 0
            self.queue_length = queue = queue + self.carried
            self.score = queue / self.weight
            return
        if now - self._epoch_at >= interval_s:
            self._epoch += 1
            self._epoch_at = now
            self._lent_long_ago += self._lent_before
            self._lent_before, self._lent_now = self._lent_now, 0
        queue -= self._lent_now + self._lent_before
        old = min(self._lent_long_ago, max(0, queue))
        self._written_off = self._lent_long_ago - old
        queue -= old
        self._external = max(0, queue)
        self._update()

    def full(self, until: float) -> bool:
        """It refused a request because its queue is full: believe that until its next report, or `until`.

        Returns whether `on_time` must be called at `until`.
        """
        load = self.load
        was = self._padding
        short = load.max_running + load.max_waiting - self.queue_length if load.max_running else 1 - was
        self._padding += max(0, short)
        if not was:
            self._full_until = until
        self._update()
        return not was and self._padding > 0

    def on_time(self, now: float) -> None:
        """End what time alone ends: the belief that it is full."""
        if self._padding and self._full_until <= now:
            self._padding = 0
            self._update()

    def reweigh(self, weight: float) -> None:
        """Its weight has changed."""
        self.weight = weight
        self._update()

    def _update(self) -> None:
        self.queue_length = self._external + self._padding + self.reserved
        self.score = self.queue_length / self.weight


def sane(load: Load) -> Load:
    """Figures that can be computed with: what is negative or no number counts as 0, usage is 0 to 1."""
    any_negative = (load.running | load.waiting | load.max_running | load.max_waiting | load.kv_free_tokens) < 0
    rate, usage, age_s = load.tokens_per_second, load.kv_cache_usage, load.oldest_waiting_s
    sane_age = age_s is None or 0.0 <= age_s <= MAX_SECONDS
    if not any_negative and sane_age and 0.0 <= usage <= 1.0 and 0.0 <= rate < math.inf:
        return load
    return load._replace(
        running=max(0, load.running),
        waiting=max(0, load.waiting),
        max_running=max(0, load.max_running),
        max_waiting=max(0, load.max_waiting),
        kv_cache_usage=min(1.0, max(0.0, usage)) if not math.isnan(usage) else 0.0,
        tokens_per_second=rate if 0.0 <= rate < math.inf else 0.0,
        kv_free_tokens=max(0, load.kv_free_tokens),
        oldest_waiting_s=age_s if sane_age else 0.0,
    )
