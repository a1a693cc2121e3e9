"""Token files and the batches cut from them.

A token file is one little-endian array of token ids behind a header of 256 bytes; every document ends with the
encoder's `<|eot|>`. `prepare.py` writes them, training reads them. Nothing here holds a corpus in memory: a batch is
copied out of a memory map that lives only while it is copied, so that resident memory stays flat on a file of any size.

    python dataset.py --measure data/webtext.bin      # resident memory and speed of the loader

The order of the samples is a formula, not a state. Sample number g of a run belongs to epoch g // n, where n is the
number of windows; a permutation of 0 … n−1 keyed by (seed, epoch) says which window it is. So any number of processes
sees the same samples, and the position in the data is one number, the step.

Index:  the header · writing · reading · order · splits · the corpus · batches · measuring
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
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import options
from options import UserError

MAGIC = b"\x89TOKENS\n"  # \x89 starts no UTF-8 text: a token file is never taken for a document
VERSION = 1
HEADER_SIZE = 256
CHUNK = 1 << 20  # tokens that are read, scanned or hashed at a time

# ---- the header ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Header:
    """What stands before the tokens: 256 bytes, little-endian, in this order.

    bytes    field          meaning
    0-7      magic          b"\\x89TOKENS\\n"
    8-15     version, size  two uint32: 1 and 256
    16-31    kind           what one entry is; only "tokens" is read here, other kinds are for other objectives
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
        if self.kind != "tokens":
            yield f"it holds {self.kind!r}, and only 'tokens' are read here"
        if not 1 <= self.vocab_size <= 1 << 32:
            yield f"vocab_size is {self.vocab_size}, allowed is 1 to 2^32"
        elif self.dtype != dtype_for(self.vocab_size):
            yield f"dtype is {self.dtype!r}, and a vocabulary of {self.vocab_size} needs {dtype_for(self.vocab_size)!r}"
        if self.eot >= self.vocab_size:
            yield f"the end-of-text token {self.eot} is not under vocab_size {self.vocab_size}"
        if not self.n_documents <= self.n_tokens:
            yield f"{self.n_documents} documents in {self.n_tokens} tokens"


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

    def __init__(self, path: str | os.PathLike, encoder, source: str = "00" * 32):
        self.path, self.encoder, self.source = path, encoder, source
        self.dtype = storage(encoder.vocab_size)
        self.n_tokens = self.n_documents = 0
        self._hash = hashlib.sha256()
        target = Path(os.path.realpath(path))
        self._temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
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
        header = Header(*counts, encoder.fingerprint, self._hash.hexdigest(), self.source)
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
        rows = view[starts].astype(np.int64)
        if rows.max() >= self.header.vocab_size:
            raise UserError(self._bad_token(int(rows.max())))
        return rows

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


# ---- the corpus ----------------------------------------------------------------------------------------------------


class Corpus:
    """One or more token files, checked, and divided at the same place every time.

    dataset       the `dataset` of a run's configuration (path, load_from_file, data_division), or a path, or paths
    encoder       the fingerprint of the encoder that the files must have been made with (None: any, but one)
    .train, .val  the two splits; no token is a target in both. With data_division 1.0, val has no windows
    .fingerprint  SHA-256 of the files' contents in order, for a checkpoint to compare
    """

    def __init__(self, dataset, encoder: str | None, block_size: int, data_division: float | None = None):
        division = getattr(dataset, "data_division", 0.9) if data_division is None else data_division
        if not 0 < division <= 1:
            raise UserError(f"dataset.data_division is {division}, allowed is above 0 and up to 1")
        self.files = [TokenFile(path) for path in token_files(dataset)]
        self.vocab_size = self.files[0].header.vocab_size
        self.fingerprint = hashlib.sha256("".join(f.header.sha256 for f in self.files).encode()).hexdigest()
        for file in self.files:
            self._check(file, encoder or self.files[0].header.encoder, block_size)
        cut_files = [(file, file.boundary(division)) for file in self.files]
        self.train = Split("training", [(file, 0, cut) for file, cut in cut_files], block_size)
        self.val = Split("validation", [(file, cut, file.header.n_tokens) for file, cut in cut_files], block_size)
        for split in (self.train, self.val):
            if not split.n_windows and (split is self.train or division < 1):
                raise UserError(f"the {split.name} split has {split.n_tokens} tokens in {len(self.files)} file(s), too "
                                f"few for a window of {block_size + 1}; change dataset.data_division (now {division}), "
                                "lower block_size, or prepare more text")

    @staticmethod
    def _check(file: TokenFile, encoder: str, block_size: int) -> None:
        if file.header.encoder != encoder:
            raise UserError(f"{file.path} was made with encoder {file.header.encoder[:12]}…, and this run's is "
                            f"{encoder[:12]}…: set encoder_path to the one it was made with, or prepare it anew")
        if file.header.n_tokens <= block_size:
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


# ---- batches -------------------------------------------------------------------------------------------------------


class Loader:
    """Batches for training, made ahead on a thread of their own.

    with Loader(corpus.train, seed, batch_size=4, accumulation=2, device="cpu") as loader:
        for micro_batches in loader:                  # one step: a list of `accumulation` pairs
            for x, y in micro_batches: ...            # (batch_size // world, block_size) int64 on the device

    Step s takes samples s·batch_size·accumulation … and so on; micro-batch m is the m-th batch_size of them, and rank r
    of `world` gets the r-th equal part of each micro-batch. Position and order depend on nothing else, so that
    start_step alone resumes. An error on the thread is raised by next(). close() ends the thread; so do garbage
    collection and the end of the program.
    """

    AHEAD = 2  # steps that wait, ready, for the consumer

    def __init__(self, split: Split, seed: int, batch_size: int, accumulation: int = 1, device="cpu",
                 start_step: int = 0, rank: int = 0, world: int = 1):
        import torch

        if batch_size % world:
            raise UserError(f"batch_size {batch_size} cannot be divided among {world} processes: make it a multiple")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not under world {world}")
        split.locate(seed, np.zeros(1, np.int64))  # a split without windows is refused here, not on the thread
        self.device = torch.device(device)
        share = batch_size // world
        firsts = (
            [(step * accumulation + micro) * batch_size + rank * share for micro in range(accumulation)]
            for step in itertools.count(start_step)
        )
        cuda = None
        if self.device.type == "cuda":
            cuda = torch.cuda.current_device() if self.device.index is None else self.device.index
        self._queue: queue.Queue = queue.Queue(self.AHEAD)
        stop = threading.Event()
        arguments = (split, seed, share, firsts, cuda, self._queue, stop)  # never self: the thread would keep it alive
        thread = threading.Thread(target=_produce, args=arguments, name="loader", daemon=True)
        self._finalizer = weakref.finalize(self, _finish, self._queue, stop, thread)
        thread.start()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list:
        item = self._queue.get()
        if isinstance(item, list):
            return [self._to_device(windows) for windows in item]
        self._queue.put(item)  # the end or an error: so is every later call
        if item is None:
            raise StopIteration
        raise item

    def _to_device(self, windows):
        """(x, y) of windows (b, block_size + 1). The copy is queued on the caller's stream, so what the caller computes
        next waits for it; torch keeps the pinned block from reuse until the copy is done, however soon it is freed."""
        windows = windows.to(self.device, non_blocking=True)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def close(self) -> None:
        self._finalizer()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _produce(split, seed, count, firsts, cuda, ready, stop) -> None:
    """The loader's thread: one list of windows per step into `ready`, until `stop`; an error is the last thing put."""
    import torch

    try:
        if cuda is not None:
            torch.cuda.set_device(cuda)  # per thread; else pinning would open a context on the first GPU too
        for step in firsts:
            windows = [torch.from_numpy(split.windows(seed, first, count)) for first in step]
            ready.put([w.pin_memory() for w in windows] if cuda is not None else windows)
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
