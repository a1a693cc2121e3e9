"""The order of the samples, computed by a stateless formula.

All randomness of the data comes from 64-bit hashes, which are the same on every machine and in every version of numpy.
A permutation of 0 … n−1, keyed by (seed, epoch), maps a sample to its window. So any number of processes gets the same
samples, and the position in the data is one number: the step.
"""

from __future__ import annotations

import math

import numpy as np

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def mix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014), a bijection on uint64 with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_keys(seed: int, epoch: np.ndarray) -> np.ndarray:
    """A 64-bit key for each epoch, or other number, (n,), of a run with this seed."""
    start = np.full(1, seed % (1 << 64), np.uint64)
    return mix64(mix64(start + GOLDEN_GAMMA) ^ mix64(epoch.astype(np.uint64) * GOLDEN_GAMMA + GOLDEN_GAMMA))


def permute(i: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """The position of each i (m,) in the permutation of 0 … n−1 that key (m,) selects. Memory is O(m), independent of
    n.

    A Feistel network on a × b ≥ n cells (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): each round
    shifts one coordinate by a hash of the other, which is invertible, so the network is a bijection on the cells. A
    result outside 0 … n−1 is mapped again ("cycle walking") until it is inside.

    >>> sorted(permute(np.arange(10), 10, derive_keys(seed=1, epoch=np.zeros(10))).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    a = math.isqrt(max(n - 1, 0)) + 1
    b = -(-n // a)
    a, b = np.uint64(a), np.uint64(b)
    position = i.astype(np.uint64)
    outside = np.arange(len(position))
    while len(outside):
        left, right = np.divmod(position[outside], b)
        round_key = key[outside]
        for _ in range(3):
            round_key = mix64(round_key + GOLDEN_GAMMA)
            left = (left + mix64(round_key ^ right) % a) % a
            round_key = mix64(round_key + GOLDEN_GAMMA)
            right = (right + mix64(round_key ^ left) % b) % b
        position[outside] = left * b + right
        outside = outside[position[outside] >= np.uint64(n)]
    return position.astype(np.int64)


def permutation(n: int, seed: int) -> np.ndarray:
    """The permutation of 0 … n−1 that the seed selects, (n,)."""
    return permute(np.arange(n), n, derive_keys(seed, np.zeros(n))).astype(np.int64)
