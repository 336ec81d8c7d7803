"""Workers by load: the least loaded, any at random, or those of a key, however many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush, merge
from itertools import islice
from operator import attrgetter, itemgetter
from random import Random
from typing import Any, Generic, Protocol, TypeVar

from fastchat_grpc.controller.ring import Ring

_score = attrgetter("score")
_distance = itemgetter(0)

TRIES = 8
"""Candidates are drawn so often at random, before all of them are listed."""


class Indexed(Protocol):
    """What can be indexed. The index owns all of it but weight and affinity."""

    weight: float
    affinity: int
    score: float
    index: ScoreIndex[Any] | None
    place: int
    rank: int


W = TypeVar("W", bound=Indexed)


class ScoreIndex(Generic[W]):
    """Workers in one list for drawing lots and, once somebody asks for them, in buckets of equal score and on a ring.

    A worker is in one index at most and knows its places there (`place`, `rank`), so that a change of its
    score costs the same in a fleet of ten and of ten thousand.
    """

    __slots__ = ("_buckets", "_ring", "_scores", "_total", "items", "max_weight", "sorts")

    def __init__(self) -> None:
        self.items: list[W] = []
        self.max_weight = 0.0
        """No member weighs more."""
        self.sorts = False
        """Whether somebody has asked for an order. Until then a score that changes need only be written down."""
        self._buckets: dict[float, list[W]] | None = None
        self._scores: list[float] = []  # a heap of the buckets' scores; some buckets are empty
        self._ring: Ring[W] | None = None
        self._total = 0.0  # of all scores, where there is a ring

    def __len__(self) -> int:
        return len(self.items)

    def add(self, worker: W) -> None:
        """Put a worker in that is in no index."""
        worker.index = self
        worker.place = len(self.items)
        self.items.append(worker)
        self.max_weight = max(self.max_weight, worker.weight)
        self._put(worker)
        if self._ring is not None:
            self._ring.add(worker)
            self._total += worker.score

    def discard(self, worker: W) -> None:
        """Take a worker out that is in this index."""
        worker.index = None
        last = self.items.pop()
        if last is not worker:
            self.items[worker.place] = last
            last.place = worker.place
        self._take(worker)
        if self._ring is not None:
            self._ring.discard(worker)
            self._total -= worker.score
        if not self.items:
            self.max_weight = self._total = 0.0

    def move(self, worker: W, score: float) -> None:
        """A member's score has changed."""
        if self._ring is not None:
            self._total += score - worker.score
        buckets = self._buckets
        if buckets is None:
            worker.score = score
            return
        bucket = buckets[worker.score]
        last = bucket.pop()
        if last is not worker:
            bucket[worker.rank] = last
            last.rank = worker.rank
        worker.score = score
        there = buckets.get(score)
        if there is None:
            there = self._bucket(score)
        worker.rank = len(there)
        there.append(worker)

    def lowest(self) -> list[W]:
        """The members with the lowest score; none in an empty index."""
        buckets = self._buckets
        if buckets is None:
            self.sorts = True
            buckets = self._buckets = {}
            for worker in self.items:
                self._put(worker)
        scores = self._scores
        while scores:
            bucket = buckets[scores[0]]
            if bucket:
                return bucket
            del buckets[heappop(scores)]
        return []

    def ascending(self) -> Iterator[list[W]]:
        """Members of equal score together, the lowest first. The index must not change meanwhile."""
        first = self.lowest()
        if not first:
            return
        yield first
        buckets, scores = self._buckets or {}, self._scores.copy()
        heappop(scores)
        while scores:
            bucket = buckets[heappop(scores)]
            if bucket:
                yield bucket

    def total(self) -> float:
        """The sum of all scores."""
        self._rung()
        return self._total

    def nearest(self, key: str) -> Iterator[tuple[int, W]]:
        """The members in the order of a key, and how far each is from it. The index must not change meanwhile."""
        return self._rung().nearest(key)

    def _rung(self) -> Ring[W]:
        """The ring, and the sum that is kept with it."""
        if self._ring is None:
            self.sorts = True
            self._ring = Ring(self.items)
            self._total = float(sum(map(_score, self.items)))
        return self._ring

    def _put(self, worker: W) -> None:
        if self._buckets is None:
            return
        bucket = self._buckets.get(worker.score)
        if bucket is None:
            bucket = self._bucket(worker.score)
        worker.rank = len(bucket)
        bucket.append(worker)

    def _take(self, worker: W) -> None:
        if self._buckets is None:
            return
        bucket = self._buckets[worker.score]
        last = bucket.pop()
        if last is not worker:
            bucket[worker.rank] = last
            last.rank = worker.rank

    def _bucket(self, score: float) -> list[W]:
        """A new bucket. Where many are empty, those are forgotten first."""
        assert self._buckets is not None
        if len(self._scores) > 2 * len(self.items) + 64:
            for empty in [score for score, bucket in self._buckets.items() if not bucket]:
                del self._buckets[empty]
            self._scores = list(self._buckets)
            heapify(self._scores)
        bucket = self._buckets[score] = []
        heappush(self._scores, score)
        return bucket


class Candidates(Generic[W]):
    """The workers that one request may go to: those of some indexes that fit.

    Args:
        fits: whether a member may have the request; None: all may.
    """

    __slots__ = ("_fits", "_indexes", "_only")

    def __init__(self, indexes: Sequence[ScoreIndex[W]], fits: Callable[[W], bool] | None = None) -> None:
        self._indexes = indexes
        self._fits = fits
        self._only = indexes[0] if fits is None and len(indexes) == 1 else None  # the usual, at hand

    def shortest(self, rng: Random) -> W | None:
        """One with the lowest score; among equals, any. None where nobody fits."""
        if self._only is not None:
            bucket = self._only.lowest()
            return bucket[int(rng.random() * len(bucket))] if bucket else None
        best: W | None = None
        equals = 0
        for index in self._indexes:
            for bucket in index.ascending():
                if best is not None and bucket[0].score > best.score:
                    break
                worker = self._any(bucket, rng)
                if worker is None:
                    continue
                if best is None or worker.score < best.score:
                    best, equals = worker, len(bucket)
                else:
                    equals += len(bucket)
                    best = worker if rng.random() * equals < len(bucket) else best
                break
        return best

    def any(self, rng: Random) -> W | None:
        """One at random. None where nobody fits."""
        if len(self._indexes) == 1:
            return self._any(self._indexes[0].items, rng)
        for _ in range(TRIES):
            worker = self._draw(rng)
            if worker is None or self._fits is None or self._fits(worker):
                return worker
        return self._any(self.all(), rng)

    def weighed(self, rng: Random) -> W | None:
        """One at random, with a chance in proportion to its weight. None where nobody fits."""
        heaviest = max((index.max_weight for index in self._indexes), default=0.0)
        for _ in range(TRIES):
            worker = self._draw(rng)
            if worker is None:
                return None
            if rng.random() * heaviest < worker.weight and (self._fits is None or self._fits(worker)):
                return worker
        listed = self.all()
        return rng.choices(listed, weights=[worker.weight for worker in listed])[0] if listed else None

    def shorter_of_two(self, rng: Random) -> W | None:
        """The lower score of two different ones taken at random. None where nobody fits."""
        only = self._only
        items = only.items if only is not None else self._sample(rng)
        count = len(items)
        if count < 2:
            return items[0] if items else None
        first = int(rng.random() * count)
        second = int(rng.random() * (count - 1))
        second += second >= first
        a, b = items[first], items[second]
        return a if a.score < b.score or (a.score == b.score and rng.random() < 0.5) else b

    def mean(self) -> float:
        """The mean score of all, whether they fit or not; 0 where there is none."""
        count = sum(map(len, self._indexes))
        return sum(index.total() for index in self._indexes) / count if count else 0.0

    def nearest(self, key: str, most: int) -> Iterator[W]:
        """Those that fit among the `most` that come first in the order of a key, in that order."""
        near = merge(*(index.nearest(key) for index in self._indexes), key=_distance)
        for _, worker in islice(near, most):
            if self._fits is None or self._fits(worker):
                yield worker

    def all(self) -> Sequence[W]:
        """All that fit. Not to be changed."""
        if self._only is not None:
            return self._only.items
        fits = self._fits
        return [worker for index in self._indexes for worker in index.items if fits is None or fits(worker)]

    def _sample(self, rng: Random) -> Sequence[W]:
        """Two different ones at random, or all that fit."""
        first: W | None = None
        for _ in range(2 * TRIES):
            worker = self._draw(rng)
            if worker is None:
                return ()
            if worker is not first and (self._fits is None or self._fits(worker)):
                if first is not None:
                    return (first, worker)
                first = worker
        return self.all()

    def _draw(self, rng: Random) -> W | None:
        """Any member, whether it fits or not."""
        place = int(rng.random() * sum(map(len, self._indexes)))
        for index in self._indexes:
            if place < len(index.items):
                return index.items[place]
            place -= len(index.items)
        return None

    def _any(self, workers: Sequence[W], rng: Random) -> W | None:
        fits = self._fits
        if not workers:
            return None
        if fits is None:
            return workers[int(rng.random() * len(workers))]
        for _ in range(TRIES):
            worker = workers[int(rng.random() * len(workers))]
            if fits(worker):
                return worker
        fitting = [worker for worker in workers if fits(worker)]
        return fitting[int(rng.random() * len(fitting))] if fitting else None
