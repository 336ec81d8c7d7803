"""Several texts of metrics as one."""

from __future__ import annotations

import pytest

from fastchat_grpc.metrics.merging import merged
from tests.scrape import Scrape

FIRST = """# HELP a_total Of a.
# TYPE a_total counter
a_total 1.0
# HELP h Of h.
# TYPE h histogram
h_bucket{le="1.0"} 1.0
h_bucket{le="+Inf"} 2.0
h_count 2.0
h_sum 5.0
"""
SECOND = """# HELP h Of h.
# TYPE h histogram
h_bucket{le="1.0"} 3.0
h_bucket{le="+Inf"} 3.0
h_count 3.0
h_sum 1.0
# TYPE g gauge
g{x="{y} z"} 4
g{} 5
"""


def test_each_family_stands_once_with_the_lines_of_all() -> None:
    text = merged([("one", FIRST), ('t"w\no', SECOND)])
    assert text.count("# TYPE h histogram") == text.count("# HELP h ") == 1
    told = Scrape(text)
    assert told.get("a_total", instance="one") == 1
    assert told.get("h_count", instance="one") == 2
    assert told.get("h_count", instance='t"w\no') == 3
    assert told.get("h_bucket", le="1.0") == 4
    assert told.get("g", x="{y} z", instance='t"w\no') == 4
    assert told.get("g") == 9


def test_a_text_without_types_is_kept() -> None:
    told = Scrape(merged([("one", 'x 1\ny{a="b"} 2\n')]))
    assert told.get("x", instance="one") == 1
    assert told.get("y", a="b", instance="one") == 2


@pytest.mark.parametrize("sign", ["\u2028", "\x85", "\r", "\x0c", "\x1c"])
def test_a_line_ends_at_a_line_feed_alone(sign: str) -> None:
    """What else ends lines elsewhere may stand in a label's value, and must not spoil what all others tell."""
    text = f'# TYPE g gauge\ng{{model_name="a{sign}b"}} 1\n'
    assert merged([("one", text)]) == f'# TYPE g gauge\ng{{instance="one",model_name="a{sign}b"}} 1\n'
