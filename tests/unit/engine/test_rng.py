"""The counter-based generator, against the published vectors and as a source of uniform numbers."""

import numpy as np
import pytest

from fastchat_grpc.engine.rng import philox, uniforms

# From the Random123 library's kat_vectors, philox4x32 10.
VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_words(counter, key, expected):
    words = philox(np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64)[:, None])
    assert words[:, 0].tolist() == expected


def numbers(seed, choice, positions):
    n = len(positions)
    return uniforms(
        np.full(n, seed, dtype=np.uint64), np.full(n, choice, dtype=np.uint64), np.array(positions, dtype=np.uint64)
    )


def test_a_number_depends_on_seed_choice_and_position_alone():
    together = numbers(7, 0, range(100))
    for position in (0, 31, 99):
        assert numbers(7, 0, [position])[0] == together[position]


@pytest.mark.parametrize(("seed", "choice", "first"), [(8, 0, 0), (7, 1, 0), (7, 0, 1), (2**63 + 7, 0, 0)])
def test_another_seed_choice_or_position_gives_other_numbers(seed, choice, first):
    assert not np.intersect1d(numbers(7, 0, range(50)), numbers(seed, choice, range(first + 50, first + 100))).size


def test_numbers_are_uniform():
    drawn = numbers(123, 0, range(20_000))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    # Chi-squared with 19 degrees of freedom: 43.8 at p = 0.001.
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
