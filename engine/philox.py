"""Random numbers by counting: Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).

A number depends on nothing but its key and its place, so a row's draw is the same alone, in any batch, and after a
requeue. Computed on the host for all rows of a step at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]  # each element holds 32 bits

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10


def philox4x32(counters: Words, keys: Words) -> Words:
    """counters [4, N], keys [2, N] -> random words [4, N]."""
    even, odd = counters[[0, 2]], counters[[1, 3]]
    for _ in range(_ROUNDS):
        products = even * _MULTIPLIERS
        # The two products change places, as their halves do: (hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0).
        even = (products >> _HALF)[::-1] ^ odd ^ keys
        odd = (products & _LOW)[::-1]
        keys = (keys + _KEY_STEPS) & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniforms(
    seeds: NDArray[np.uint64], indexes: NDArray[np.uint64], positions: NDArray[np.uint64]
) -> NDArray[np.float64]:
    """One number in [0, 1) with 53 bits for each (seed, choice index, position), all [N]."""
    counters = np.stack([positions & _LOW, positions >> _HALF, indexes, np.zeros_like(indexes)])
    words = philox4x32(counters, np.stack([seeds & _LOW, seeds >> _HALF]))
    bits = (words[0] << np.uint64(21)) ^ (words[1] >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53
