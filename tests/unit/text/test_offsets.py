"""Offsets of tokens into the text: characters, not bytes or what a token alone would show."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastchat_grpc.core import TokenLogprob
from fastchat_grpc.text.offsets import TextOffsets


def entries(tokens: Sequence[bytes]) -> list[TokenLogprob]:
    return [TokenLogprob(0, token.decode("utf-8", "replace"), token, -1.0) for token in tokens]


def test_a_character_of_several_tokens_begins_where_they_all_do() -> None:
    text = "a😀é漢"
    assert TextOffsets().feed(entries([bytes([b]) for b in text.encode()]), text) == [0, 1, 1, 1, 1, 2, 2, 3, 3, 3]


def test_tokens_that_are_no_text_take_no_room() -> None:
    tokens = [b"<s>", b" Hello", b" wor", b"ld", b"</s>"]
    assert TextOffsets().feed(entries(tokens), "Hello world") == [0, 0, 5, 9, 11]


def test_a_text_in_pieces_that_lags_behind_its_tokens_has_the_same_offsets() -> None:
    offsets = TextOffsets()
    assert offsets.feed(entries([b"<s>", b" The"]), "The") == [0, 0]
    assert offsets.feed(entries([b" \xf0\x9f"]), " ") == [3]
    assert offsets.feed(entries([b"\x98\x80"]), "") == [4]
    assert offsets.feed(entries([b" EN"]), "😀") == [5]
    assert offsets.feed(entries([b"ough"]), " ENough") == [8]
    assert offsets.feed(entries([b"."]), ".") == [12]


def test_what_was_taken_for_text_to_come_and_was_none_is_forgotten() -> None:
    offsets = TextOffsets()
    assert offsets.feed(entries([b"a", b"<pad>"]), "a") == [0, 1]
    assert offsets.feed(entries([b"b", b"c"]), "bc") == [1, 2]


@given(st.text(max_size=30), st.data())
def test_offsets_of_whole_bytes_are_those_of_the_characters(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    tokens = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if a < b]
    expected, position = [], 0
    for token in tokens:
        expected.append(len(raw[:position].decode("utf-8", "ignore")))
        position += len(token)
    found = TextOffsets().feed(entries(tokens), text)
    assert found == expected
    assert all(0 <= offset <= len(text) for offset in found)


@pytest.mark.parametrize("text", ["", "x"])
def test_no_tokens_have_no_offsets(text: str) -> None:
    assert TextOffsets().feed([], text) == []
