"""Near-duplicates among documents: MinHash with banded locality-sensitive hashing.

Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3. A document is the set of its
shingles, runs of 8 bytes. Its signature is 128 numbers, each of which two documents have in common with a probability
that is the Jaccard index of their sets. Documents that agree in all rows of one band are compared by their shingles: no
document is left out for less than `similarity`, and one that should be is missed with a probability of 1 in 1,000 at
most.

rensa or datasketch would replace compute_signature only: their indexes are in memory and compare no shingles. They want
the shingles as Python objects, whose making takes about as long as compute_signature; and a new version of a library
may hash differently, so that the same recipe makes another dataset.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from strawberry.data.inputs import ignore_progress
from strawberry.data.order import GOLDEN_GAMMA, mix64

N_HASHES = 128  # numbers of a signature
SHINGLE_BYTES = 8  # as many as a uint64 holds, so that different shingles are different numbers
MAX_MISS_PROBABILITY = 1e-3  # that two documents just at `similarity` share no band
MAX_COMPARED_CHARS = 1 << 22  # longer documents are compared exactly only: all shingles of one must fit into memory
HASH_MULTIPLIERS = mix64(np.arange(1, N_HASHES + 1, dtype=np.uint64) * GOLDEN_GAMMA) | np.uint64(1)
HASH_OFFSETS = mix64(HASH_MULTIPLIERS)


def find_shingles(text: str) -> np.ndarray:
    """The distinct runs of 8 bytes of a text, in lower case and with single spaces, as sorted uint64.

    >>> len(find_shingles("a Text"))        # shorter than a shingle: one, padded with zeros
    1
    """
    data = " ".join(text.lower().split()).encode("utf-8", "surrogatepass").ljust(SHINGLE_BYTES, b"\0")
    column = np.frombuffer(data, np.uint8).astype(np.uint64)
    n = len(column) - SHINGLE_BYTES + 1
    shingles = np.zeros(n, np.uint64)
    for i in range(SHINGLE_BYTES):
        shingles = shingles << np.uint64(8) | column[i : i + n]
    return np.unique(shingles)


def compute_signature(shingles: np.ndarray) -> np.ndarray:
    """(N_HASHES,) uint64: for each of as many hash functions the least hash of the shingles (n,)."""
    mixed, least = mix64(shingles), np.full(N_HASHES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(mixed), 512):  # 512 KiB of hashes, which a core's cache holds
        hashes = HASH_MULTIPLIERS[:, None] * mixed[start : start + 512]
        hashes += HASH_OFFSETS[:, None]
        np.minimum(least, hashes.min(axis=1), out=least)
    return least


def choose_bands(similarity: float) -> tuple[int, int]:
    """(bands, rows of each): the most rows for which documents of that similarity are missed rarely enough.

    >>> choose_bands(0.8)       # 1 − (1 − 0.8 ** 5) ** 25 = 0.99995
    (25, 5)
    """
    for rows in range(16, 1, -1):
        if (1 - similarity**rows) ** (N_HASHES // rows) <= MAX_MISS_PROBABILITY:
            return N_HASHES // rows, rows
    return N_HASHES, 1


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The Jaccard index of two sorted arrays without repetitions: |a ∩ b| / |a ∪ b|."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


class NearDuplicates:
    """Finds near-duplicates: add(text) for each document in turn, then find() says which to leave out."""

    def __init__(self, folder: Path, similarity: float):
        self.similarity, (self.bands, self.rows) = similarity, choose_bands(similarity)
        self.shingles = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by close)
        self.keys = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.ends = array("Q", [0])  # of the documents in .shingles, counted in shingles

    def add(self, text: str | None) -> None:
        """The next document; None for one that is not compared."""
        shingles = np.zeros(0, np.uint64) if text is None else find_shingles(text)
        self.shingles.write(shingles.tobytes())
        self.ends.append(self.ends[-1] + len(shingles))
        parts = compute_signature(shingles)[: self.bands * self.rows].reshape(self.bands, self.rows)
        key = np.arange(self.bands, dtype=np.uint64)
        for row in range(self.rows):
            key = mix64(key ^ parts[:, row])
        self.keys.write(key.tobytes())

    def read_shingles(self, document: int) -> np.ndarray:
        start, end = self.ends[document], self.ends[document + 1]
        self.shingles.seek(8 * start)
        return np.frombuffer(self.shingles.read(8 * (end - start)), np.uint64)

    def candidate_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(documents, buckets), sorted by document: documents in one bucket share a band and are to be compared.

        A document may be in several buckets.
        """
        self.keys.flush()
        n = len(self.ends) - 1
        sizes = np.diff(np.frombuffer(self.ends, np.uint64))
        documents, buckets, count = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        table = np.memmap(self.keys, np.uint64, mode="r", shape=(n, self.bands)) if n else np.zeros((0, self.bands))
        for band in range(self.bands):
            _, bucket, size = np.unique(np.array(table[:, band]), return_inverse=True, return_counts=True)
            shared = np.flatnonzero((size[bucket] > 1) & (sizes > 0))
            documents.append(shared)
            buckets.append(bucket[shared] + count)
            count += len(size)
        documents, buckets = np.concatenate(documents), np.concatenate(buckets)
        order = np.argsort(documents, kind="stable")
        return documents[order], buckets[order]

    def find(self, progress: Callable[[float], object] = ignore_progress) -> np.ndarray:
        """(n,) bool: whether a document is a near-duplicate of an earlier one that is itself not left out."""
        out = np.zeros(len(self.ends) - 1, bool)
        documents, buckets = self.candidate_pairs()
        kept: dict[int, list[int]] = {}  # of each bucket, the documents that stay
        starts = np.flatnonzero(np.diff(documents, prepend=-1))
        for start, own in zip(starts, np.split(buckets, starts[1:]) if len(starts) else [], strict=True):
            document, own = int(documents[start]), own.tolist()
            candidates = {candidate for bucket in own for candidate in kept.get(bucket, ())}
            if self.is_near_duplicate(document, sorted(candidates)):
                out[document] = True
            else:
                for bucket in own:
                    kept.setdefault(bucket, []).append(document)
            progress(start / len(documents))
        return out

    def is_near_duplicate(self, document: int, candidates: list[int]) -> bool:
        size, mine = self.ends[document + 1] - self.ends[document], None
        for candidate in candidates:
            other = self.ends[candidate + 1] - self.ends[candidate]
            if min(size, other) < self.similarity * max(size, other):  # the Jaccard index is at most their ratio
                continue
            mine = self.read_shingles(document) if mine is None else mine
            if jaccard(mine, self.read_shingles(candidate)) >= self.similarity:
                return True
        return False

    def close(self) -> None:
        self.shingles.close()
        self.keys.close()
