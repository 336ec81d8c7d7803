"""Seeds of single draws."""

from __future__ import annotations

from fastchat_grpc.text.seeds import splitmix64


def test_splitmix64_gives_the_published_sequence() -> None:
    """The output of the authors' C code for the seed 1234567, as many ports of it check."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [splitmix64(1234567, place) for place in range(1, 6)] == expected


def test_a_seed_that_is_too_large_is_taken_modulo_2_64() -> None:
    assert splitmix64(2**64 + 5, 3) == splitmix64(5, 3)
    assert splitmix64(-1, 1) == splitmix64(2**64 - 1, 1)
