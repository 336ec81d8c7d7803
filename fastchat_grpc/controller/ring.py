"""A ring of workers by hash: a key leads to the same workers in the same order, whoever else comes and goes."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from heapq import heapify, heapreplace
from typing import Generic, Protocol, TypeVar

PROBES = 21
POINTS = 4
"""Points of a key and of a member. With so many, members have 0.6 to 1.3 times the keys of the mean; with one of
each, nothing to five times."""
BITS = 56
_MASK = (1 << BITS) - 1
_FACTORS = tuple(int(blake2b(bytes([i]), digest_size=7).hexdigest(), 16) | 1 for i in range(POINTS))


class Hashed(Protocol):
    """What can be put on a ring."""

    affinity: int
    """A hash of BITS bits of what names it."""


H = TypeVar("H", bound=Hashed)


class Ring(Generic[H]):
    """Multi-probe consistent hashing (Appleton and O'Reilly, 2015): members have few points, and so have keys.

    A key belongs to the member that comes soonest after one of its points. A member that leaves gives up its own
    keys alone, and one that comes takes keys to itself alone; rings of the same members agree wherever they are.
    """

    __slots__ = ("_members", "_points")

    def __init__(self, members: Iterable[H] = ()) -> None:
        # Of two members with one point, one in 2^56, the last one has it.
        self._members: dict[int, H] = {point: member for member in members for point in points(member.affinity)}
        self._points = sorted(self._members)

    def add(self, member: H) -> None:
        """Put a member on that is not there."""
        for point in points(member.affinity):
            if point not in self._members:
                insort(self._points, point)
            self._members[point] = member

    def discard(self, member: H) -> None:
        """Take a member off."""
        for point in points(member.affinity):
            if self._members.get(point) is member:
                del self._members[point]
                del self._points[bisect_left(self._points, point)]

    def nearest(self, key: str) -> Iterator[tuple[int, H]]:
        """All members and how far each is from a key, the nearest first. The ring must not change meanwhile."""
        points, members = self._points, self._members
        count = len(points)
        if not count:
            return
        walks = []
        for probe in probes(key):
            at = bisect_left(points, probe) % count
            walks.append(((points[at] - probe) & _MASK, at, probe))
        heapify(walks)
        seen: set[int] = set()
        for _ in range(count * PROBES):  # by then each walk has been all around
            distance, at, probe = walks[0]
            member = members[points[at]]
            if member.affinity not in seen:
                seen.add(member.affinity)
                yield distance, member
                if len(seen) * POINTS == count:
                    return
            at = (at + 1) % count
            heapreplace(walks, ((points[at] - probe) & _MASK, at, probe))


def affinity(name: str) -> int:
    """The hash of a member's name."""
    return int.from_bytes(blake2b(name.encode(), digest_size=BITS // 8).digest(), "big")


def points(affinity: int) -> list[int]:
    """The points of a member."""
    return [affinity * factor & _MASK for factor in _FACTORS]


def probes(key: str) -> list[int]:
    """The points of a key: two hashes make them all (Kirsch and Mitzenmacher, 2006)."""
    hashed = int.from_bytes(blake2b(key.encode("utf-8", "replace"), digest_size=BITS // 4).digest(), "big")
    first, step = hashed & _MASK, hashed >> BITS | 1
    return [(first + i * step) & _MASK for i in range(PROBES)]
