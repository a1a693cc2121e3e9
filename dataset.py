"""Token files and the batches cut from them.

A token file is one little-endian array of token ids behind a header of 256 bytes; every document ends with the
encoder's `<|eot|>`. `prepare.py` writes them, training reads them. Nothing here holds a corpus in memory: a batch is
copied out of a memory map that lives only while it is copied, so that resident memory stays flat on a file of any size.

    python dataset.py --measure data/webtext.bin      # resident memory and speed of the loader

The order of the samples is a formula, not a state. Sample number g of a run belongs to epoch g // n, where n is the
number of windows; a permutation of 0 … n−1 keyed by (seed, epoch) says which window it is. So any number of processes
sees the same samples, and the position in the data is one number, the step.

A file of kind "pairs" holds a source, its target, the next source, … as documents in turn. What a model learns from
windows or pairs, an objective says: the next token, the missing spans, the target, or the masked tokens. What it hides
is a formula of (seed, sample number) too.

Index:  the header · writing · reading · order · splits · the corpus · objectives · batches · measuring
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import math
import os
import queue
import re
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import options
from options import UserError

MAGIC = b"\x89TOKENS\n"  # \x89 starts no UTF-8 text: a token file is never taken for a document
VERSION = 1
HEADER_SIZE = 256
CHUNK = 1 << 20  # tokens that are read, scanned or hashed at a time
MAX_BATCH = 1 << 20  # rows
KINDS = ("tokens", "pairs")  # running text; sources and targets in turn

# ---- the header ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Header:
    """What stands before the tokens: 256 bytes, little-endian, in this order.

    bytes    field          meaning
    0-7      magic          b"\\x89TOKENS\\n"
    8-15     version, size  two uint32: 1 and 256
    16-31    kind           "tokens" is running text; in "pairs" every other document is the target of the one before it
    32-39    dtype          "uint16" where vocab_size is at most 65,536, else "uint32"
    40-71    vocab_size, eot, n_tokens, n_documents    four uint64; n_tokens counts the eot tokens too
    72-103   encoder        the encoder's fingerprint, a SHA-256
    104-135  sha256         of the payload, which is everything after the header
    136-167  source         SHA-256 of what the file was made from, so that prepare.py knows when to make it anew
    168-223  zeros
    224-255  SHA-256 of bytes 0-223
    """

    vocab_size: int
    eot: int
    n_tokens: int
    n_documents: int
    encoder: str
    sha256: str
    source: str = "00" * 32
    dtype: str = ""
    kind: str = "tokens"
    version: int = VERSION

    LAYOUT = struct.Struct("<8sII16s8sQQQQ32s32s32s56x")

    def to_bytes(self) -> bytes:
        digests = [bytes.fromhex(digest) for digest in (self.encoder, self.sha256, self.source)]
        names = [name.encode("ascii") for name in (self.kind, self.dtype or dtype_for(self.vocab_size))]
        counts = (self.vocab_size, self.eot, self.n_tokens, self.n_documents)
        head = self.LAYOUT.pack(MAGIC, self.version, HEADER_SIZE, *names, *counts, *digests)
        return head + hashlib.sha256(head).digest()

    @classmethod
    def from_bytes(cls, data: bytes, path: str | os.PathLike) -> Header:
        """The header in the first bytes of a file. Raises UserError, naming `path`, for anything but a sound one."""
        if data[: len(MAGIC)] != MAGIC:
            raise UserError(f"{path} is not a token file (it starts with {data[:8]!r}); prepare.py makes token files")
        if len(data) < HEADER_SIZE:
            raise UserError(f"{path} is cut short: {len(data)} bytes, and the header alone has {HEADER_SIZE}")
        version, size = struct.unpack_from("<II", data, len(MAGIC))
        if (version, size) != (VERSION, HEADER_SIZE):
            raise UserError(f"{path} has token file version {version}, and {VERSION} is read here: prepare it anew")
        if hashlib.sha256(data[: cls.LAYOUT.size]).digest() != data[cls.LAYOUT.size : HEADER_SIZE]:
            raise UserError(f"{path} has a damaged header (its checksum is wrong): prepare it anew")
        kind, dtype, *counts, encoder, sha256, source = cls.LAYOUT.unpack_from(data)[3:]
        names = [name.rstrip(b"\0").decode("ascii", "replace") for name in (kind, dtype)]
        header = cls(*counts, encoder.hex(), sha256.hex(), source.hex(), names[1], names[0], version)
        for problem in header.problems():
            raise UserError(f"{path} has an impossible header: {problem}; prepare it anew")
        return header

    def problems(self) -> Iterator[str]:
        if self.kind not in KINDS:
            yield f"it holds {self.kind!r}, and only {' and '.join(map(repr, KINDS))} are read here"
        if not 1 <= self.vocab_size <= 1 << 32:
            yield f"vocab_size is {self.vocab_size}, allowed is 1 to 2^32"
        elif self.dtype != dtype_for(self.vocab_size):
            yield f"dtype is {self.dtype!r}, and a vocabulary of {self.vocab_size} needs {dtype_for(self.vocab_size)!r}"
        if self.eot >= self.vocab_size:
            yield f"the end-of-text token {self.eot} is not under vocab_size {self.vocab_size}"
        if not self.n_documents <= self.n_tokens:
            yield f"{self.n_documents} documents in {self.n_tokens} tokens"
        elif self.kind == "pairs" and (self.n_documents % 2 or self.n_documents == 0):
            yield f"{self.n_documents} documents are no pairs of a source and a target"


def dtype_for(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def storage(vocab_size: int) -> np.dtype:
    """The little-endian dtype of the ids on disk."""
    return np.dtype(dtype_for(vocab_size)).newbyteorder("<")


# ---- writing -------------------------------------------------------------------------------------------------------


class TokenFileWriter:
    """Writes a token file in constant memory, aside, and puts it in place when it is closed.

    with TokenFileWriter("data/webtext.bin", encoder) as writer:
        writer.add(np.array([72, 105]))               # one document; its eot is added here
        writer.add(first_part, last=False)            # or a long document in parts
        writer.add(second_part)

    `encoder` is anything with vocab_size, eot and fingerprint. An exception inside the `with` leaves no file behind.
    """

    def __init__(self, path: str | os.PathLike, encoder, source: str = "00" * 32, kind: str = "tokens"):
        self.path, self.encoder, self.source, self.kind = path, encoder, source, kind
        self.dtype = storage(encoder.vocab_size)
        self.n_tokens = self.n_documents = 0
        self._hash = hashlib.sha256()
        target = Path(os.path.realpath(path))
        self._temporary = options.temporary_path(target)
        if target.exists() and not target.is_file():
            raise UserError(f"cannot write {path}: it is there and is not a regular file; name another path")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by close and abort)
            self._file.write(bytes(HEADER_SIZE))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(self, error_type, *_) -> None:
        if error_type is None:
            self.close()
        else:
            self.abort()

    def add(self, tokens: np.ndarray, last: bool = True) -> None:
        """Append the tokens (n,) of a document, or of a part of it where `last` is False."""
        tokens = np.asarray(tokens)
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.encoder.vocab_size:
            raise ValueError(f"token {int(tokens.max())} is not under vocab_size {self.encoder.vocab_size}")
        if (tokens == self.encoder.eot).any():
            raise ValueError(f"a document holds the end-of-text token {self.encoder.eot}, which only ends documents")
        self._append(tokens.astype(self.dtype))
        if last:
            self._append(np.array([self.encoder.eot], self.dtype))
            self.n_documents += 1

    def _append(self, tokens: np.ndarray) -> None:
        data = tokens.tobytes()
        self._hash.update(data)
        self.n_tokens += len(tokens)
        try:
            self._file.write(data)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> Header:
        """Write the header, put the file in place, return the header."""
        encoder = self.encoder
        counts = (encoder.vocab_size, encoder.eot, self.n_tokens, self.n_documents)
        header = Header(*counts, encoder.fingerprint, self._hash.hexdigest(), self.source, kind=self.kind)
        target = Path(os.path.realpath(self.path))
        try:
            self._file.seek(0)
            self._file.write(header.to_bytes())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, target)
            if os.name != "nt":  # the rename itself is on disk once the folder is
                folder = os.open(target.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
        except OSError as error:
            self.abort()
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        return dataclasses.replace(header, dtype=dtype_for(encoder.vocab_size))

    def abort(self) -> None:
        """Give up: close and remove the unfinished file."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()


# ---- reading -------------------------------------------------------------------------------------------------------


class TokenFile:
    """A token file, opened for reading; its header and its size are checked at once, its hash by verify().

    .header     what the header says
    .tokens     the ids (n_tokens,) as a fresh read-only memory map; drop the array to let its pages go
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._head = file.read(HEADER_SIZE)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            raise UserError(f"there is no token file {path}: run python prepare.py --output {path}") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        self.header = Header.from_bytes(self._head, path)
        self.dtype = storage(self.header.vocab_size)
        self.n_bytes = HEADER_SIZE + self.header.n_tokens * self.dtype.itemsize
        if size != self.n_bytes:
            told = f"{self.header.n_tokens} tokens make {self.n_bytes} bytes, and it has {size}"
            raise UserError(f"{path} is {'cut short' if size < self.n_bytes else 'too long'}: {told}; prepare it anew")
        if self.header.n_tokens == 0:
            raise UserError(f"{path} holds no tokens; prepare it anew from some text")

    @property
    def tokens(self) -> np.memmap:
        try:
            raw = np.memmap(self.path, np.uint8, mode="r", shape=(self.n_bytes,))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.path}: {error}") from error
        if raw[:HEADER_SIZE].tobytes() != self._head:
            raise UserError(f"{self.path} was replaced while it was in use: start again")
        return raw[HEADER_SIZE:].view(self.dtype)

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The tokens from each of `starts` (n,) on: (n, length) int64, a copy. Maps, copies and unmaps."""
        view = np.lib.stride_tricks.sliding_window_view(self.tokens, length)  # (n_tokens − length + 1, length)
        return self._checked(view[starts])

    def slices(self, starts: np.ndarray, stops: np.ndarray) -> list[np.ndarray]:
        """The tokens start … stop−1 of each of starts and stops (n,): n arrays int64, copies. Maps, copies, unmaps."""
        tokens = self.tokens
        return [self._checked(tokens[start:stop]) for start, stop in zip(starts, stops, strict=True)]

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        if tokens.size and tokens.max() >= self.header.vocab_size:
            raise UserError(self._bad_token(int(tokens.max())))
        return tokens.astype(np.int64)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Tokens start … stop−1 in order, a chunk at a time, read and not mapped."""
        stop = self.header.n_tokens if stop is None else stop
        with open(self.path, "rb") as file:
            file.seek(HEADER_SIZE + start * self.dtype.itemsize)
            while start < stop:
                chunk = np.frombuffer(file.read(min(CHUNK, stop - start) * self.dtype.itemsize), self.dtype)
                if not len(chunk):
                    raise UserError(f"{self.path} became shorter while it was read: start again")
                yield chunk
                start += len(chunk)

    def verify(self, progress=lambda n_tokens: None) -> None:
        """Read all of it; UserError where hash, ids or document count are not what the header says."""
        digest, n_documents, last = hashlib.sha256(), 0, self.header.eot
        for chunk in self.chunks():
            digest.update(chunk)
            if chunk.max() >= self.header.vocab_size:
                raise UserError(self._bad_token(int(chunk.max())))
            n_documents += int(np.count_nonzero(chunk == self.header.eot))
            last = int(chunk[-1])
            progress(len(chunk))
        if digest.hexdigest() != self.header.sha256:
            told = f"the tokens' SHA-256 is {digest.hexdigest()[:12]}…, and its header says {self.header.sha256[:12]}…"
            raise UserError(f"{self.path} is damaged: {told}; prepare it anew")
        if (n_documents, last) != (self.header.n_documents, self.header.eot):
            told = f"{n_documents} end-of-text tokens for {self.header.n_documents} documents, the last token {last}"
            raise UserError(f"{self.path} is wrongly made: {told}; prepare it anew")

    def _bad_token(self, token: int) -> str:
        told = f"it holds token {token}, and its vocab_size is {self.header.vocab_size}"
        return f"{self.path} is damaged: {told}; prepare it anew"

    def boundary(self, division: float) -> int:
        """Where the training split ends: the tokens before it are for training, the others for validation.

        It is the first document boundary at or after division · n_tokens; where none is left before the end of the
        file, the last one before that; in a file of one document, the nearest token.

        >>> # documents of 4, 4 and 2 tokens: 0.5 -> 8, 0.8 -> 8, 0.9 -> 8 (not 10: nothing would be left)
        """
        n, eot = self.header.n_tokens, self.header.eot
        if division >= 1:
            return n
        wanted = min(max(math.ceil(division * n), 1), n)
        if self.header.kind == "pairs":
            return self._pair_boundary(wanted)
        position = wanted - 1  # a boundary at b means that token b−1 is an eot
        for chunk in self.chunks(position, n - 1):
            found = np.flatnonzero(chunk == eot)
            if len(found):
                return position + int(found[0]) + 1
            position += len(chunk)
        for stop in range(wanted - 1, 0, -CHUNK):
            start = max(stop - CHUNK, 0)
            found = np.flatnonzero(np.concatenate(list(self.chunks(start, stop))) == eot)
            if len(found):
                return start + int(found[-1]) + 1
        return min(max(round(division * n), 1), n)

    def _pair_boundary(self, wanted: int) -> int:
        """The first end of a pair at or after `wanted`; the last one before the end of the file where that leaves none;
        the end of the file where it has but one pair."""
        ends = self.pairs(0, self.header.n_tokens)[:, -1]
        place = min(int(np.searchsorted(ends, wanted)), max(len(ends) - 2, 0))
        return int(ends[place])

    def pairs(self, start: int, stop: int) -> np.ndarray:
        """Where the pairs in tokens start … stop−1 stand, (n, 3) int64: a source's first token, its target's first
        token, and the pair's end. 24 bytes a pair, the only thing here that grows with the file."""
        found, position = [], start
        for chunk in self.chunks(start, stop):
            found.append(position + np.flatnonzero(chunk == self.header.eot))
            position += len(chunk)
        ends = np.concatenate([[start - 1], *found]).astype(np.int64) + 1
        if len(ends) % 2 == 0 or ends[-1] != stop:
            told = f"tokens {start} to {stop} hold {len(ends) - 1} end-of-text tokens, which make no pairs"
            raise UserError(f"{self.path} is wrongly made: {told}; prepare it anew")
        return np.stack((ends[:-1:2], ends[1::2], ends[2::2]), axis=1)


# ---- order ---------------------------------------------------------------------------------------------------------
# Everything random here is a hash of numbers, in 64 bits, the same on every machine and in every version of numpy.

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection on uint64 in which every bit counts."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys(seed: int, epoch: np.ndarray) -> np.ndarray:
    """One 64-bit key for each epoch (n,) of a run with this seed."""
    start = np.full(1, seed % (1 << 64), np.uint64)
    return mix(mix(start + GOLDEN) ^ mix(epoch.astype(np.uint64) * GOLDEN + GOLDEN))


def permute(i: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """The place of each of i (m,) in the permutation of 0 … n−1 that its key (m,) names; O(m) memory whatever n is.

    A Feistel network on a × b ≥ n cells (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): each round
    turns one coordinate by a hash of the other, which can be undone, so that the whole is a bijection on the cells.
    What lands outside 0 … n−1 goes through again ("cycle walking") until it lands inside.

    >>> sorted(permute(np.arange(10), 10, keys(seed=1, epoch=np.zeros(10))))
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    a = math.isqrt(max(n - 1, 0)) + 1
    b = -(-n // a)
    a, b = np.uint64(a), np.uint64(b)
    place = i.astype(np.uint64)
    outside = np.arange(len(place))
    while len(outside):
        left, right = np.divmod(place[outside], b)
        round_key = key[outside]
        for _ in range(3):
            round_key = mix(round_key + GOLDEN)
            left = (left + mix(round_key ^ right) % a) % a
            round_key = mix(round_key + GOLDEN)
            right = (right + mix(round_key ^ left) % b) % b
        place[outside] = left * b + right
        outside = outside[place[outside] >= np.uint64(n)]
    return place.astype(np.int64)


# ---- splits --------------------------------------------------------------------------------------------------------


class Split:
    """The training or the validation part of a corpus: pieces of token files, and the windows cut from them.

    A window is block_size + 1 tokens, the last block_size of which are targets. A piece of N tokens gives
    n = max(1, (N − block_size) // block_size) windows in each epoch, a stride of block_size apart: no target twice. The
    first starts at a phase drawn from (seed, epoch, piece) out of all N − n·block_size at which the n windows lie
    inside: at least block_size of them, so that each epoch cuts the text elsewhere and every token but the first gets
    to be a target. A piece shorter than one window gives none.
    """

    def __init__(self, name: str, pieces: list[tuple[TokenFile, int, int]], block_size: int):
        self.name, self.block_size = name, block_size
        self.n_tokens = sum(stop - start for _, start, stop in pieces)
        self.pieces = [piece for piece in pieces if piece[2] - piece[1] > block_size]
        sizes = np.array([stop - start for _, start, stop in self.pieces], np.int64)
        counts = np.maximum(sizes // block_size - 1, 1)
        self.ends = np.cumsum(counts)  # piece p has windows ends[p] − counts[p] … ends[p] − 1
        self._first = self.ends - counts
        self._start = np.array([start for _, start, _ in self.pieces], np.int64)
        self._phases = (sizes - counts * block_size).astype(np.uint64)
        self.n_windows = int(counts.sum())

    def windows(self, seed: int, first: int, count: int) -> np.ndarray:
        """Samples number first … first + count − 1 of the endless sequence: (count, block_size + 1) int64.

        Each n_windows samples, from a multiple of it on, are one epoch: every window once, in an order of its own.
        """
        piece, starts = self.locate(seed, np.arange(first, first + count, dtype=np.int64))
        out = np.empty((count, self.block_size + 1), np.int64)
        for number in np.unique(piece):
            rows = np.flatnonzero(piece == number)
            out[rows] = self.pieces[number][0].rows(starts[rows], self.block_size + 1)
        return out

    def locate(self, seed: int, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For sample numbers (n,): which piece each one is in, and its first token's position in that file."""
        if not self.n_windows:
            raise UserError(f"the {self.name} split has no window of {self.block_size + 1} tokens; lower block_size, "
                            "change dataset.data_division, or prepare more text")
        epoch, index = np.divmod(sample, self.n_windows)
        key = keys(seed, epoch)
        index = permute(index, self.n_windows, key)
        piece = np.searchsorted(self.ends, index, side="right")
        phase = mix(key ^ mix(piece.astype(np.uint64) + np.uint64(1))) % self._phases[piece]
        return piece, self._start[piece] + (index - self._first[piece]) * self.block_size + phase.astype(np.int64)


class PairSplit:
    """The training or the validation part of a corpus of pairs: each pair once in each epoch, in an order of its own.

    Sample number g is found as in Split; a window is a pair here. .n_cut counts the pairs that block_size cuts short.
    """

    def __init__(self, name: str, pieces: list[tuple[TokenFile, int, int]], block_size: int):
        self.name, self.block_size, self.pieces = name, block_size, pieces
        self.n_tokens = sum(stop - start for _, start, stop in pieces)
        self._places = [file.pairs(start, stop) for file, start, stop in pieces]
        self.ends = np.cumsum([len(places) for places in self._places])
        self._first = self.ends - [len(places) for places in self._places]
        self.n_windows = int(self.ends[-1])
        self.n_cut = sum(int((np.diff(places).max(axis=1) > block_size).sum()) for places in self._places)

    def pairs(self, seed: int, first: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Samples number first … first + count − 1: (source, target) each, the first block_size tokens of both. The
        eot ends each of them, unless it was cut off."""
        piece, number = self.locate(seed, np.arange(first, first + count, dtype=np.int64))
        out: list[Any] = [None] * count
        for p in np.unique(piece):
            rows = np.flatnonzero(piece == p)
            starts, middles, ends = self._places[p][number[rows]].T
            sources = self.pieces[p][0].slices(starts, np.minimum(middles, starts + self.block_size))
            targets = self.pieces[p][0].slices(middles, np.minimum(ends, middles + self.block_size))
            for row, source, target in zip(rows, sources, targets, strict=True):
                out[row] = (source, target)
        return out

    def locate(self, seed: int, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For sample numbers (n,): which piece each one is in, and the number of its pair there."""
        if not self.n_windows:
            raise UserError(f"the {self.name} split has no pair; change dataset.data_division, or prepare more pairs")
        epoch, index = np.divmod(sample, self.n_windows)
        index = permute(index, self.n_windows, keys(seed, epoch))
        piece = np.searchsorted(self.ends, index, side="right")
        return piece, index - self._first[piece]


SPLITS = {"tokens": Split, "pairs": PairSplit}

# ---- the corpus ----------------------------------------------------------------------------------------------------


class Corpus:
    """One or more token files, checked, and divided at the same place every time.

    dataset       the `dataset` of a run's configuration (path, load_from_file, data_division), or a path, or paths
    encoder       the fingerprint of the encoder that the files must have been made with (None: any, but one)
    .train, .val  the two splits; no token is a target in both. With data_division 1.0, val has no windows
    .fingerprint  SHA-256 of the files' contents in order, for a checkpoint to compare
    .kind         what the files hold, "tokens" or "pairs": one of them for all
    """

    def __init__(self, dataset, encoder: str | None, block_size: int, data_division: float | None = None):
        division = getattr(dataset, "data_division", 0.9) if data_division is None else data_division
        if not 0 < division <= 1:
            raise UserError(f"dataset.data_division is {division}, allowed is above 0 and up to 1")
        self.files = [TokenFile(path) for path in token_files(dataset)]
        self.vocab_size, self.kind = self.files[0].header.vocab_size, self.files[0].header.kind
        self.fingerprint = hashlib.sha256("".join(f.header.sha256 for f in self.files).encode()).hexdigest()
        for file in self.files:
            self._check(file, encoder or self.files[0].header.encoder, block_size)
        cut_files = [(file, file.boundary(division)) for file in self.files]
        split = SPLITS[self.kind]
        self.train = split("training", [(file, 0, cut) for file, cut in cut_files], block_size)
        self.val = split("validation", [(file, cut, file.header.n_tokens) for file, cut in cut_files], block_size)
        for split in (self.train, self.val):
            if not split.n_windows and (split is self.train or division < 1):
                needed = f"a window of {block_size + 1}" if self.kind == "tokens" else "a pair"
                raise UserError(f"the {split.name} split has {split.n_tokens} tokens in {len(self.files)} file(s), too "
                                f"few for {needed}; change dataset.data_division (now {division}), "
                                "lower block_size, or prepare more text")

    def _check(self, file: TokenFile, encoder: str, block_size: int) -> None:
        if file.header.kind != self.kind:
            raise UserError(f"{file.path} holds {file.header.kind}, and {self.files[0].path} holds {self.kind}: train "
                            "on one kind at a time")
        if file.header.encoder != encoder:
            raise UserError(f"{file.path} was made with encoder {file.header.encoder[:12]}…, and this run's is "
                            f"{encoder[:12]}…: set encoder_path to the one it was made with, or prepare it anew")
        if file.header.n_tokens <= block_size and self.kind == "tokens":
            raise UserError(f"{file.path} has {file.header.n_tokens} tokens, fewer than one window of "
                            f"{block_size + 1}: lower block_size or prepare more text")


def token_files(dataset) -> list[Path]:
    """The paths that a `dataset` configuration, a path or a list of paths means, in a fixed order.

    With load_from_file false, path is a directory: every file in it that ends in .bin or begins as a token file does.
    """
    if isinstance(dataset, (str, os.PathLike)):
        return [Path(dataset)]
    if isinstance(dataset, (list, tuple)):
        return [Path(path) for path in dataset]
    path = Path(dataset.path)
    if dataset.load_from_file:
        if path.is_dir():
            raise UserError(f"dataset.path {path} is a directory: set dataset.load_from_file to false to read it")
        return [path]
    if not path.is_dir():
        raise UserError(f"dataset.path {path} is not a directory, which load_from_file false needs: set it to true")
    found = [entry for entry in sorted(path.iterdir()) if _is_token_file(entry)]
    if not found:
        raise UserError(f"dataset.path {path} has no token files in it; make one with prepare.py")
    return found


def _is_token_file(path: Path) -> bool:
    if path.name.startswith(".") or not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix == ".bin" or file.read(len(MAGIC)) == MAGIC


# ---- objectives ----------------------------------------------------------------------------------------------------
# What is made of a split's samples: what the model is shown, and what it must say. An objective is
#     batch(split, seed, first, count) -> Batch of numpy arrays, for samples number first … first + count − 1
# and a pure function of its arguments: a resumed run, and any number of processes, see the same corruption.
# Sentinels and the mask are ids from encoder.vocab_size on, so that no text spells them; a model's vocab_size leaves
# room for them, `extra_ids` many.


class Batch(NamedTuple):
    """What one micro-batch is made of; tensors or arrays, int64."""

    x: Any  # (B, T) what the model reads: an encoder's input, a decoder's past
    y: Any  # (B, T) what it must predict at each place, −1 where nothing
    source: Any = None  # (B, S) for encoder-decoders
    n_targets: int = 0  # of y that are not −1


class NextToken:
    """Each token from those before it: x is the window but for its last token, y the window but for its first."""

    model, kind = "decoder", "tokens"  # what it trains, what it reads
    in_bytes = True  # whether the targets are text, so that bits per byte mean something
    pads = False  # whether rows hold, or will hold when the model is used, padding

    def __init__(self, encoder=None, block_size: int = 0):
        self.extra_ids = 0

    def batch(self, split, seed: int, first: int, count: int) -> Batch:
        windows = split.windows(seed, first, count)
        y = windows[:, 1:].copy()
        return Batch(windows[:, :-1].copy(), y, None, y.size)


class Spans:
    """Span corruption (T5, arXiv 1910.10683): the source lacks 15 % of its tokens, in spans of 3 on average, a sentinel
    in the place of each; the target is each sentinel and what it stands for.

    Of block_size tokens, all windows lose equally many, in equally many spans, so that no row is padded. How the tokens
    are cut into spans, and what is between them into gaps, is drawn uniformly; as T5's do, a window begins with a gap
    and ends with a span.

        text     a b c d e f g h      source  a b <0> e f g <1> eot      target  <0> c d <1> h eot
    """

    model, kind = "encoder-decoder", "tokens"
    in_bytes = False  # the sentinels cost bits and are no text
    pads = True
    DENSITY, MEAN_SPAN = 0.15, 3

    def __init__(self, encoder, block_size: int):
        if block_size < 2:
            raise UserError(f"model_hyperparams.block_size = {block_size}: span corruption needs 2 or more tokens")
        self.eot, self.first_sentinel = encoder.eot, encoder.vocab_size
        self.n_noise = min(max(round(block_size * self.DENSITY), 1), block_size - 1)
        self.n_spans = min(max(round(self.n_noise / self.MEAN_SPAN), 1), block_size - self.n_noise)
        self.extra_ids = self.n_spans

    def batch(self, split, seed: int, first: int, count: int) -> Batch:
        text = split.windows(seed, first, count)[:, 1:]
        n = text.shape[1]
        draw = draws(seed, first, count, n - 2)
        spans = cut(self.n_noise, self.n_spans, draw[:, : self.n_noise - 1])
        gaps = cut(n - self.n_noise, self.n_spans, draw[:, self.n_noise - 1 :])
        lengths = np.stack((gaps, spans), axis=2).reshape(count, -1)  # gap, span, gap, span, …
        begins = np.zeros((count, n), bool)
        np.put_along_axis(begins, np.cumsum(lengths, axis=1)[:, :-1], True, axis=1)
        part = np.cumsum(begins, axis=1)  # (count, n): 0, 2, 4 … are gaps, 1, 3, 5 … the spans after them
        begins[:, 0] = True
        noise = part % 2 == 1
        sentinel = self.first_sentinel + part // 2
        source = np.where(begins & noise, sentinel, text)[begins | ~noise].reshape(count, -1)
        target = np.where(begins & ~noise, sentinel, text)[noise | begins].reshape(count, -1)
        y = ended(target, self.eot)
        return Batch(shifted(y, self.eot), y, ended(source, self.eot), y.size)


class Pairs:
    """The target of a pair from its source. Both end with the eot, and are cut to block_size tokens or padded."""

    model, kind = "encoder-decoder", "pairs"
    in_bytes = True
    pads = True

    def __init__(self, encoder, block_size: int):
        self.eot, self.pad, self.block_size, self.extra_ids = encoder.eot, encoder.pad, block_size, 0

    def batch(self, split, seed: int, first: int, count: int) -> Batch:
        source, x = np.full((2, count, self.block_size), self.pad, np.int64)
        y = np.full_like(x, -1)
        for row, (given, wanted) in enumerate(split.pairs(seed, first, count)):
            source[row, : len(given)] = given
            source[row, len(given) - 1] = self.eot  # of a source that is cut, too
            y[row, : len(wanted)] = wanted
            x[row, : len(wanted)] = shifted(wanted[None], self.eot)
        return Batch(x, y, source, int((y >= 0).sum()))


class Masked:
    """Masked tokens (BERT, arXiv 1810.04805): 15 % of the tokens, never an eot, are to be told from those around them.

    Of those, 80 % are shown as the mask, 10 % as an ordinary token drawn uniformly, and 10 % as they are.
    """

    model, kind = "encoder", "tokens"
    in_bytes = False  # bits per byte of a text cannot be had from tokens that are guessed one by one
    pads = True
    DENSITY, MASKED, RANDOM = 0.15, 0.8, 0.1

    def __init__(self, encoder, block_size: int):
        self.eot, self.mask, self.extra_ids = encoder.eot, encoder.vocab_size, 1
        self.ordinary = np.setdiff1d(np.arange(encoder.vocab_size), list(encoder.specials.values()))
        self.n_chosen = max(round(block_size * self.DENSITY), 1)

    def batch(self, split, seed: int, first: int, count: int) -> Batch:
        text = split.windows(seed, first, count)[:, 1:]
        n = text.shape[1]
        order, how, which = np.split(draws(seed, first, count, 3 * n), 3, axis=1)
        order = np.where(text == self.eot, np.iinfo(np.uint64).max, order)
        chosen = np.zeros(text.shape, bool)
        np.put_along_axis(chosen, smallest(order, self.n_chosen), True, axis=1)
        chosen &= text != self.eot  # in a window of little else
        share = (how >> np.uint64(11)) * 2.0**-53
        other = self.ordinary[which % np.uint64(len(self.ordinary))]
        shown = np.where(share < self.MASKED, self.mask, np.where(share < self.MASKED + self.RANDOM, other, text))
        y = np.where(chosen, text, -1)
        return Batch(np.where(chosen, shown, text), y, None, int(chosen.sum()))


OBJECTIVES = {"next": NextToken, "spans": Spans, "pairs": Pairs, "masked": Masked}
CORRUPTION = np.uint64(0x5AB1E5)  # sets these draws apart from the order's and from dropout's, which are keyed alike


def draws(seed: int, first: int, count: int, n: int) -> np.ndarray:
    """n draws for each of the samples first … first + count − 1: (count, n) uint64, SplitMix64 from the sample's key"""
    key = mix(keys(seed, np.arange(first, first + count)) ^ CORRUPTION)
    return mix(key[:, None] + np.arange(1, n + 1, dtype=np.uint64) * GOLDEN)


def smallest(draw: np.ndarray, k: int) -> np.ndarray:
    """The places of the k smallest of each row: k of n places, each choice equally likely. (count, n) to (count, k)."""
    return np.argsort(draw, axis=1, kind="stable")[:, :k]


def cut(n: int, parts: int, draw: np.ndarray) -> np.ndarray:
    """n cut into that many parts of at least 1, each way equally likely: (count, n − 1) draws to (count, parts)."""
    places = np.sort(smallest(draw, parts - 1), axis=1) + 1
    return np.diff(places, axis=1, prepend=0, append=n)


def ended(rows: np.ndarray, eot: int) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, 1)), constant_values=eot)


def shifted(y: np.ndarray, eot: int) -> np.ndarray:
    """What a decoder reads in order to say y: what comes before each of its tokens, at first the eot."""
    return np.pad(y[:, :-1], ((0, 0), (1, 0)), constant_values=eot)


def make_objective(name: str, model: str, vocab_size: int, block_size: int, encoder, corpus: Corpus) -> tuple:
    """(name, objective), once it is known to fit. `model` is "decoder", "encoder" or "encoder-decoder".

    "auto" is what such a model learns from such a corpus: "next", "masked", or "spans" or "pairs" by the corpus' kind.
    """
    fits = [fit for fit, objective in OBJECTIVES.items() if objective.model == model]
    if name == "auto":
        name = next((fit for fit in fits if OBJECTIVES[fit].kind == corpus.kind), fits[0])
    cls, path = OBJECTIVES[name], corpus.files[0].path
    if name not in fits:
        raise UserError(f'objective = "{name}": is for a model of kind {cls.model}, and this one is of kind {model}, '
                        f'for which there is {" and ".join(fits)}; set it to "auto"')
    if cls.kind != corpus.kind:
        made = "with" if cls.kind == "pairs" else "without"
        raise UserError(f'objective = "{name}": learns from {cls.kind}, and {path} holds {corpus.kind}; set '
                        f"dataset.path to a file that prepare.py made {made} --pairs")
    objective = cls(encoder, block_size)
    needed = encoder.vocab_size + objective.extra_ids
    if vocab_size < needed:
        raise UserError(f'model_hyperparams.vocab_size = {vocab_size}: objective "{name}" needs {objective.extra_ids} '
                        f"more ids than the encoder's {encoder.vocab_size}; set it to {needed} or more")
    return name, objective


def spare_ids(name: str, model: str, block_size: int, encoder) -> int:
    """How many ids beside the encoder's a model of that kind needs for an objective, or with "auto" for any of its."""
    fits = [cls for fit, cls in OBJECTIVES.items() if cls.model == model and name in ("auto", fit)]
    return max((cls(encoder, block_size).extra_ids for cls in fits), default=0)


def spell(encoder, tokens) -> str:
    """The text of tokens, in which the sentinels above the encoder's ids are written <|0|>, <|1|>, …"""
    text = ""
    for is_text, run in itertools.groupby(tokens, lambda token: token < encoder.vocab_size):
        run = list(run)
        text += encoder.decode(run) if is_text else "".join(f"<|{token - encoder.vocab_size}|>" for token in run)
    return text


def read_spelled(encoder, text: str) -> list[int]:
    """The tokens of a text in which <|0|>, <|1|>, … are sentinels."""
    parts = re.split(r"<\|(\d{1,9})\|>", text)  # text, number, text, …
    ids = [[encoder.vocab_size + int(part)] if i % 2 else encoder.encode(part) for i, part in enumerate(parts)]
    return list(itertools.chain.from_iterable(ids))


# ---- batches -------------------------------------------------------------------------------------------------------


class Loader:
    """Batches for training, made ahead on a thread of their own.

    with Loader(corpus.train, seed, batch_size=4, accumulation=2, device="cpu") as loader:
        for micro_batches in loader:                  # one step: a list of `accumulation` batches
            for x, y, source, n_targets in micro_batches: ...      # x (rows, T) int64 on the device

    Step s takes samples s·batch_size·accumulation … and so on; micro-batch m is the m-th batch_size of them. Of several
    ranks each gets an equal part of each micro-batch, or of the micro-batches where rows do not come out even: see
    `divide_batch`. Position and order depend on nothing else, so that start_step alone resumes. An error on the thread
    is raised by next(). close() ends the thread; so do garbage collection and the end of the program. The batches of
    small steps are made many at once, since what one costs is mostly not its size: a GPU may take a step each
    millisecond.
    """

    AHEAD = 2  # steps that wait, ready, for the consumer
    AT_ONCE = 1 << 16  # tokens that are made at once, at most, where a step has fewer

    def __init__(self, split: Split, seed: int, batch_size: int, accumulation: int = 1, device="cpu",
                 start_step: int = 0, rank: int = 0, world: int = 1, objective=None):
        import torch

        from strawberry.sharding import divide_batch

        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not under world {world}")
        split.locate(seed, np.zeros(1, np.int64))  # a split without windows is refused here, not on the thread
        self.device = torch.device(device)
        rows, offsets = divide_batch(batch_size, accumulation, rank, world)
        share, size = rows, accumulation * batch_size
        firsts = ([step * size + offset for offset in offsets] for step in itertools.count(start_step))
        if world == 1:  # what a step reads is one stretch of samples, and so is what several do
            group = max(1, self.AT_ONCE // (size * split.block_size))
            firsts = ([step * size] for step in itertools.count(start_step, group))
            share = group * size
        cuda = None
        if self.device.type == "cuda":
            cuda = torch.cuda.current_device() if self.device.index is None else self.device.index
        self._queue: queue.Queue = queue.Queue(self.AHEAD)
        stop = threading.Event()
        make = partial((objective or NextToken()).batch, split, seed)
        sizes = (share, rows, len(offsets))
        arguments = (make, sizes, firsts, cuda, self._queue, stop)  # never self: the thread would keep it alive
        thread = threading.Thread(target=_produce, args=arguments, name="loader", daemon=True)
        self._finalizer = weakref.finalize(self, _finish, self._queue, stop, thread)
        thread.start()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list:
        item = self._queue.get()
        if isinstance(item, list):
            return [self._to_device(batch) for batch in item]
        self._queue.put(item)  # the end or an error: so is every later call
        if item is None:
            raise StopIteration
        raise item

    def _to_device(self, batch: Batch) -> Batch:
        """The copy is queued on the caller's stream, so what the caller computes next waits for it; torch keeps the
        pinned block from reuse until the copy is done, however soon it is freed."""
        return tensors(batch, lambda tensor: tensor.to(self.device, non_blocking=True))

    def close(self) -> None:
        self._finalizer()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def tensors(batch: Batch, change: Callable) -> Batch:
    """The batch with its arrays or tensors changed."""
    return Batch(*(None if part is None else change(part) for part in batch[:3]), batch.n_targets)


def parted(batch: Batch, rows: int) -> list[Batch]:
    """The batch in batches of so many rows."""
    if len(batch.x) == rows:
        return [batch]
    columns = [[part[i : i + rows] if part is not None else None for i in range(0, len(batch.x), rows)]
               for part in batch[:3]]  # fmt: skip
    return [Batch(x, y, source, int((y >= 0).sum())) for x, y, source in zip(*columns, strict=True)]


def _produce(make, sizes, firsts, cuda, ready, stop) -> None:
    """The loader's thread: one list of batches per step into `ready`, until `stop`; an error is the last thing put."""
    import torch

    count, rows, accumulation = sizes

    try:
        if cuda is not None:
            torch.cuda.set_device(cuda)  # per thread; else pinning would open a context on the first GPU too
        for step in firsts:
            batches = [part for first in step for part in parted(tensors(make(first, count), torch.from_numpy), rows)]
            for i in range(0, len(batches), accumulation):
                some = batches[i : i + accumulation]
                ready.put([tensors(b, torch.Tensor.pin_memory) for b in some] if cuda is not None else some)
                if stop.is_set():
                    return
    except BaseException as error:  # whatever it is, the consumer must hear of it rather than wait for ever
        ready.put(error)


def _finish(ready, stop, thread) -> None:
    """End the thread: it sees `stop` after at most one more put, for which draining the queue makes room."""
    stop.set()
    _drain(ready)
    if thread is not threading.current_thread():  # garbage may be collected on the loader's own thread
        thread.join()
    _drain(ready)
    ready.put(None)


def _drain(ready) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            ready.get_nowait()


# ---- measuring -----------------------------------------------------------------------------------------------------


def resident() -> dict[str, float]:
    """Resident memory of this process in MB, on Linux by part: anonymous (its own) and file (mapped pages)."""
    try:
        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
        table = {line[0].rstrip(":"): int(line[1]) * 1024 / 1e6 for line in lines if len(line) == 3 and line[2] == "kB"}
        return {"resident": table["VmRSS"], "anonymous": table["RssAnon"], "file": table["RssFile"]}
    except OSError:
        with contextlib.suppress(ImportError):
            import resource  # macOS: the peak, in bytes

            return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
    return {}


def measure(path: str, steps: int, batch_size: int, block_size: int) -> None:
    """Print resident memory and speed while the loader draws random batches from a token file."""
    corpus = Corpus(path, None, block_size, data_division=1.0)
    tokens = corpus.train.n_tokens
    print(f"{path}: {tokens:,} tokens, {os.path.getsize(path) / 1e9:.2f} GB; batches of {batch_size} × {block_size}")
    with Loader(corpus.train, 0, batch_size) as loader:
        start = time.perf_counter()
        for step in range(steps + 1):
            next(loader)
            if step % max(steps // 10, 1) == 0:
                speed = (step + 1) * batch_size * block_size / (time.perf_counter() - start)
                told = "  ".join(f"{name} {size:7.1f} MB" for name, size in resident().items())
                print(f"batch {step:>7,}  {told}  {speed / 1e6:6.1f} M tokens/s", flush=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measure the loader's resident memory and speed on a token file.")
    parser.add_argument("--measure", metavar="FILE", required=True)
    parser.add_argument("--steps", type=int, default=10_000, help="batches to draw (default 10000)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--block_size", type=int, default=256)
    arguments = parser.parse_args(argv)
    measure(arguments.measure, arguments.steps, arguments.batch_size, arguments.block_size)


if __name__ == "__main__":
    options.run_cli(main)
