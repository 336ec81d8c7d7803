"""Values of labels, and of buckets."""

from __future__ import annotations

from collections.abc import Sequence

OTHER = "other"
"""What stands for the names beyond the bound."""
MAX_NAMES = 1000
MAX_LENGTH = 128
NOBODY = "none"
"""The client of a request without a key."""

# vLLM's, so that what reads its figures reads these.
LATENCY_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
CHOICES = (1, 2, 5, 10, 20)
OVERHEAD_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


def token_bounds(most: int) -> Sequence[float]:
    """1, 2, 5, 10, ... up to `most`, such as a context length."""
    return [step * 10**power for power in range(8) for step in (1, 2, 5) if step * 10**power <= max(most, 1)]


class Names:
    """The first names that come become values of a label, and the rest is "other": nobody can make series at will."""

    def __init__(self, most: int = MAX_NAMES) -> None:
        self._most = most
        self._known: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The label's value for a name."""
        known = self._known.get(name)
        if known is None:
            if len(self._known) >= self._most:
                return OTHER
            known = self._known[name] = name[:MAX_LENGTH]
        return known


def escaped(value: str) -> str:
    """A label's value as it stands between quotes."""
    if "\\" in value or '"' in value or "\n" in value:
        return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return value
