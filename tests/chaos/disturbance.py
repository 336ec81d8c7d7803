"""What was done to whom and when, and which refusals that excuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Protocol

GRACE_S = 6.0
"""A fault may be felt for so long after its end: one lease."""
TRIES = 3
"""Workers that the gateway tries for one request."""


class Named(Protocol):
    """A member of the fleet."""

    name: str


@dataclass
class Disturbance:
    """A fault, from its beginning until all its victims answer again."""

    kind: str
    victims: Sequence[Named]
    began: float
    ended: float = inf

    def felt(self, since: float, until: float) -> bool:
        """Whether it may have been felt between two times."""
        return self.began <= until and since <= self.ended + GRACE_S


class Disturbances:
    """All faults of a storm."""

    def __init__(self) -> None:
        self.began = monotonic()
        self._all: list[Disturbance] = []

    @contextmanager
    def during(self, kind: str, victims: Sequence[Named]) -> Iterator[None]:
        """A fault, until all its victims answer."""
        disturbance = Disturbance(kind, tuple(victims), monotonic())
        self._all.append(disturbance)
        try:
            yield
        finally:
            disturbance.ended = monotonic()

    def among(self, members: Sequence[Named], since: float, until: float) -> int:
        """How many of some members may have been felt to be away, or slow, between two times."""
        felt = [one.victims for one in self._all if one.felt(since, until)]
        names = {victim.name for victims in felt for victim in victims}
        return sum(member.name in names for member in members)

    def journal(self) -> list[str]:
        """A line for each, in seconds since the beginning."""
        return [
            f"{one.began - self.began:5.1f} to {one.ended - self.began:5.1f} s: {one.kind} of "
            + ", ".join(victim.name for victim in one.victims)
            for one in self._all
        ]


@dataclass(frozen=True)
class Excuses:
    """What excuses a refusal, or an end, for those who ask for a model.

    While a fault comes every second or two, an answer in one piece that takes longer than its worker is left alone
    cannot be had of the direct gateway, however often it is asked for: what has been generated is not kept there. So
    time in which that was so is no time in which a request was lost. At all other times a refusal for want of
    workers is a fault of the fleet, at once.
    """

    disturbances: Disturbances
    controllers: Sequence[Named]
    workers: Sequence[Named]

    def refusal(self, since: float, until: float) -> bool:
        """Whether all workers that are tried for one request, or all controllers, may have been away."""
        tried = min(TRIES, len(self.workers))
        return self.disturbances.among(self.workers, since, until) >= tried or (
            self.disturbances.among(self.controllers, since, until) == len(self.controllers)
        )

    def broken_stream(self, since: float, until: float) -> bool:
        """Whether a worker may have been away."""
        return self.disturbances.among(self.workers, since, until) > 0
