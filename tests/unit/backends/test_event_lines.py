"""Lines of event streams, however their bytes come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fastchat_grpc.backends.event_lines import lines


@given(st.text("a\u2028\x85\x0b\x0cé\r\n", max_size=30), st.lists(st.integers(0, 60), max_size=6))
async def test_lines_end_where_the_standard_has_it_wherever_the_bytes_are_cut(text: str, cuts: list[int]) -> None:
    data = text.encode()

    async def chunks() -> AsyncIterator[bytes]:
        places = sorted({0, *(cut for cut in cuts if cut < len(data)), len(data)})
        for start, end in pairwise(places):
            yield data[start:end]

    expected = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    found = [line async for line in lines(chunks())]
    assert found == (expected[:-1] if expected[-1] == "" else expected)
