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


def offsets_of(*events: tuple[Sequence[bytes], str]) -> list[int]:
    """Offsets of all tokens, whenever they were known, in their order."""
    places = TextOffsets()
    placed = [item for tokens, text in events for item in places.feed(entries(tokens), text)]
    seen, unseen = places.close()
    return [offset for _, offset in [*placed, *seen, *unseen]]


def test_a_character_of_several_tokens_begins_where_they_all_do() -> None:
    text = "a😀é漢"
    assert offsets_of(([bytes([b]) for b in text.encode()], text)) == [0, 1, 1, 1, 1, 2, 2, 3, 3, 3]


def test_tokens_that_are_no_text_take_no_room() -> None:
    tokens = [b"<s>", b" Hello", b" wor", b"ld", b"</s>"]
    assert offsets_of((tokens, "Hello world")) == [0, 0, 5, 9, 11]


def test_a_text_in_pieces_that_lags_behind_its_tokens_has_the_same_offsets() -> None:
    found = offsets_of(
        ([b"<s>", b" The"], "The"),
        ([b" \xf0\x9f"], " "),
        ([b"\x98\x80"], ""),
        ([b" EN"], "😀"),
        ([b"ough"], " ENough"),
        ([b"."], "."),
    )
    assert found == [0, 0, 3, 4, 5, 8, 12]


def test_what_was_taken_for_text_to_come_and_was_none_is_forgotten() -> None:
    assert offsets_of(([b"a", b"<pad>"], "a"), ([b"b", b"c"], "bc")) == [0, 1, 1, 2]


def test_tokens_that_show_in_part_are_told_from_those_that_do_not_at_all() -> None:
    places = TextOffsets()
    tokens = entries([b"Hel", b"lo.\n", b"</s>"])
    assert places.feed(tokens, "Hello") == [(tokens[0], 0)]
    assert places.close() == ([(tokens[1], 3)], [(tokens[2], 5)])


def test_broken_bytes_do_not_lead_astray() -> None:
    assert offsets_of(([b"\xff\xfe", b"ab", b"c"], "\ufffdabc"))[2] == 3


@given(st.text(max_size=30), st.data())
def test_offsets_of_whole_bytes_are_those_of_the_characters(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    tokens = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if a < b]
    expected, position = [], 0
    for token in tokens:
        expected.append(len(raw[:position].decode("utf-8", "ignore")))
        position += len(token)
    found = offsets_of((tokens, text))
    assert found == expected
    assert all(0 <= offset <= len(text) for offset in found)
    # The same where the text lags behind.
    events, shown, position = [], 0, 0
    for token in tokens:
        position += len(token)
        until = data.draw(st.integers(shown, len(raw[:position].decode("utf-8", "ignore"))))
        events.append(([token], text[shown:until]))
        shown = until
    assert offsets_of(*events, ([], text[shown:])) == expected


@pytest.mark.parametrize("text", ["", "x"])
def test_no_tokens_have_no_offsets(text: str) -> None:
    assert offsets_of(([], text)) == []
