"""How values are spread: counts of them below bounds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Distribution:
    """Counts of observed values by upper bounds, inclusive, and their sum.

    One thread observes; others may read meanwhile, and see figures of about the same moment. It exists beside the
    histograms of metrics libraries because engines know nothing of those, and because one call observes a value many
    times.

    Args:
        bounds: ascending, without infinity.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """For each bound the values up to it and above the one before; at last those above all."""
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        """Values observed."""
        return sum(self.counts)
