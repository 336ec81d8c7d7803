"""Seeds of single draws, for engines that take a seed rather than our random numbers."""

from __future__ import annotations

GOLDEN = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio, odd: its multiples are spread over all 64-bit numbers."""
_MASK = 2**64 - 1


def splitmix64(seed: int, place: int) -> int:
    """The 64-bit number at a place of a seed's sequence, counted from 1 (Steele et al., OOPSLA 2014).

    It depends on seed and place alone, so that a sequence may be resumed elsewhere without a seam. At place 0 it is the
    seed itself, mixed.
    """
    z = (seed + place * GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
