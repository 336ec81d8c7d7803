"""Text of others in logs and terminals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastchat_grpc.rpc.printable import MAX_CHARACTERS, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("worker-1", "worker-1"),
        ("w\nERROR forged: line", "w\\nERROR forged: line"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\u202eb", "a\\u202eb"),
        ("日本", "日本"),
        ("[fd00::1]:21002", "[fd00::1]:21002"),
        ("\udc80", "\\udc80"),
    ],
)
def test_what_is_not_printable_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters(), max_size=600))
def test_it_is_one_line_of_printable_characters(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    assert len(shown) <= 10 * MAX_CHARACTERS
