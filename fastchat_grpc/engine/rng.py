"""Random numbers that depend on a request alone: a counter-based generator, without state.

The number for a token is a function of the request's seed, the choice and the token's place in the
output. So it does not matter what else is in the batch, on which device or worker the token is drawn,
or whether the generation was preempted or resumed elsewhere in between.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MASK = np.uint64(0xFFFFFFFF)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_SHIFT = np.uint64(32)
_ROUNDS = 10


def philox(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: (4, n), each a 32-bit word.
        key: (2, n), each a 32-bit word.

    Returns:
        (4, n) random 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_number in range(_ROUNDS):
        if round_number:
            k0, k1 = (k0 + np.uint64(_WEYL[0])) & _MASK, (k1 + np.uint64(_WEYL[1])) & _MASK
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _MASK, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _MASK
    return np.stack((c0, c1, c2, c3))


def uniforms(
    seeds: NDArray[np.uint64], choices: NDArray[np.uint64], positions: NDArray[np.uint64]
) -> NDArray[np.float64]:
    """One number in [0, 1) for each row, from its seed, choice index and output position; (n,) each."""
    zero = np.zeros_like(positions)
    counter = np.stack((positions & _MASK, positions >> _SHIFT, choices, zero))
    words = philox(counter, np.stack((seeds & _MASK, seeds >> _SHIFT)))
    bits = (words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))  # 53 bits: what a double holds
    numbers: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return numbers
