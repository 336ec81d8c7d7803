"""What was done to whom and when, and which refusals that excuses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from time import monotonic
from typing import Protocol

from fastchat_grpc.config import FailoverConfig

PATIENCE = FailoverConfig(max_attempts=100, max_resumes=100, wait_s=30.0)
"""Of the client: its addresses come and go, and it is to find out whether any request cannot be saved."""

GRACE_S = 6.0
"""A fault may be felt for so long after its end: one lease."""
LOOK_S = 0.1
STALL_S = 1.0
"""A gap between two looks that is this long is felt as one in the network: machines that are starved have some."""
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

    def add(self, disturbance: Disturbance) -> None:
        """Take note of one."""
        self._all.append(disturbance)

    @contextmanager
    def during(self, kind: str, victims: Sequence[Named]) -> Iterator[None]:
        """A fault, until all its victims answer."""
        disturbance = Disturbance(kind, tuple(victims), monotonic())
        self.add(disturbance)
        try:
            yield
        finally:
            disturbance.ended = monotonic()

    async def watch(self, everybody: Sequence[Named]) -> None:
        """Until cancelled, note when this process stood still, and with it its proxies: the network of all members."""
        while True:
            began = monotonic()
            await asyncio.sleep(LOOK_S)
            if (now := monotonic()) - began > STALL_S:
                self.add(Disturbance("the storm itself stood still, and the network", everybody, began, now))

    def among(self, members: Sequence[Named], since: float, until: float) -> int:
        """How many of some members may have been felt to be away, or slow, between two times."""
        felt = [one.victims for one in self._all if one.felt(since, until)]
        names = {victim.name for victims in felt for victim in victims}
        return sum(member.name in names for member in members)

    def outage_s(self, members: Sequence[Named], since: float, until: float) -> float:
        """The longest time between two times in which none of some members was well."""
        changes = (time for one in self._all for time in (one.began, one.ended) if since < time < until)
        longest = now_s = 0.0
        for begin, end in pairwise(sorted({since, until, *changes})):
            away = [one.victims for one in self._all if one.began <= begin and end <= one.ended]
            names = {victim.name for victims in away for victim in victims}
            now_s = now_s + end - begin if all(member.name in names for member in members) else 0.0
            longest = max(longest, now_s)
        return longest

    def journal(self) -> list[str]:
        """A line for each, in seconds since the beginning."""
        return [
            f"{one.began - self.began:5.1f} to {one.ended - self.began:5.1f} s: {one.kind}: "
            + ", ".join(victim.name for victim in one.victims)
            for one in self._all
        ]


@dataclass(frozen=True)
class Excuses:
    """What excuses a refusal, a stream that broke, or an end, for those who ask for a model.

    While a fault comes every second or two, an answer in one piece that takes longer than its worker is left alone
    cannot be had of a direct gateway that does not resume, however often it is asked for: it keeps nothing of it. So
    time in which that was so is no time in which a request was lost. At all other times a refusal for want of
    workers is a fault of the fleet, at once.
    """

    disturbances: Disturbances
    controllers: Sequence[Named]
    workers: Sequence[Named]

    def refusal(self, since: float, until: float) -> bool:
        """Whether all workers that are tried for one request, or all controllers, may have been away.

        A stream that breaks is excused by the same: while another worker is well it goes on there.
        """
        tried = min(TRIES, len(self.workers))
        return self.disturbances.among(self.workers, since, until) >= tried or (
            self.disturbances.among(self.controllers, since, until) == len(self.controllers)
        )

    def patience_ended(self, since: float, until: float) -> bool:
        """Whether there was an outage that is longer than callers, or a relay, wait for its end."""
        return (
            self.disturbances.outage_s(self.controllers, since, until) >= PATIENCE.wait_s
            or self.disturbances.outage_s(self.workers, since, until) >= FailoverConfig().wait_s
        )
