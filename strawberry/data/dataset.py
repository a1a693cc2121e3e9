"""A corpus: token files, divided into a training and a validation split, and the samples of each.

Sample number g of a run belongs to epoch g // n, where n is the number of windows (or pairs) of the split. The
permutation in strawberry/data/order.py maps it to a window.

Index:  splits · the corpus
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from strawberry.common import UserError, format_count
from strawberry.data import token_file
from strawberry.data.order import derive_keys, mix64, permute
from strawberry.data.token_file import TokenFile


class Split:
    """The training or the validation part of a corpus: pieces of token files, and the windows cut from them.

    A window is block_size + 1 tokens, the last block_size of which are targets. A piece of N tokens gives n = max(1, (N
    − block_size) // block_size) windows in each epoch, with stride block_size, so that no token is a target twice. The
    first window starts at a phase drawn from (seed, epoch, piece). All N − n·block_size phases that keep the n windows
    inside the piece are possible. There are at least block_size of them, so each epoch cuts the text at other places,
    and every token but the first can be a target. A piece shorter than one window gives none.
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

    def read_windows(self, seed: int, first: int, count: int) -> np.ndarray:
        """Samples first … first + count − 1 of the endless sequence: (count, block_size + 1) int64.

        Samples k · n_windows … (k + 1) · n_windows − 1 are epoch k: every window once, in an order specific to the
        epoch.
        """
        piece, starts = self.locate(seed, np.arange(first, first + count, dtype=np.int64))
        out = np.empty((count, self.block_size + 1), np.int64)
        for number in np.unique(piece):
            rows = np.flatnonzero(piece == number)
            out[rows] = self.pieces[number][0].read_rows(starts[rows], self.block_size + 1)
        return out

    def locate(self, seed: int, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index of its piece, position of its first token in that file) for each of the sample numbers (n,). Raises
        UserError if the split has no windows.
        """
        if not self.n_windows:
            raise UserError(
                f"the {self.name} split has no window of {self.block_size + 1} tokens; lower block_size, "
                "change dataset.data_division, or prepare more text"
            )
        epoch, index = np.divmod(sample, self.n_windows)
        key = derive_keys(seed, epoch)
        index = permute(index, self.n_windows, key)
        piece = np.searchsorted(self.ends, index, side="right")
        phase = mix64(key ^ mix64(piece.astype(np.uint64) + np.uint64(1))) % self._phases[piece]
        return piece, self._start[piece] + (index - self._first[piece]) * self.block_size + phase.astype(np.int64)


class PairSplit:
    """The training or the validation part of a corpus of pairs: each pair once in each epoch, in an order specific to
    the epoch.

    Sample numbers map to pairs as they map to windows in Split. .n_cut counts the pairs that block_size truncates.
    """

    def __init__(self, name: str, pieces: list[tuple[TokenFile, int, int]], block_size: int):
        self.name, self.block_size, self.pieces = name, block_size, pieces
        self.n_tokens = sum(stop - start for _, start, stop in pieces)
        self._places = [file.find_pairs(start, stop) for file, start, stop in pieces]
        self.ends = np.cumsum([len(places) for places in self._places])
        self._first = self.ends - [len(places) for places in self._places]
        self.n_windows = int(self.ends[-1])
        self.n_cut = sum(int((np.diff(places).max(axis=1) > block_size).sum()) for places in self._places)

    def read_pairs(self, seed: int, first: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Samples first … first + count − 1: (source, target) each, both truncated to block_size tokens. Each ends with
        the eot unless it was truncated.
        """
        piece, number = self.locate(seed, np.arange(first, first + count, dtype=np.int64))
        out: list[Any] = [None] * count
        for p in np.unique(piece):
            rows = np.flatnonzero(piece == p)
            starts, middles, ends = self._places[p][number[rows]].T
            sources = self.pieces[p][0].read_slices(starts, np.minimum(middles, starts + self.block_size))
            targets = self.pieces[p][0].read_slices(middles, np.minimum(ends, middles + self.block_size))
            for row, source, target in zip(rows, sources, targets, strict=True):
                out[row] = (source, target)
        return out

    def locate(self, seed: int, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index of its piece, index of its pair there) for each of the sample numbers (n,). Raises UserError if there
        are no pairs.
        """
        if not self.n_windows:
            raise UserError(f"the {self.name} split has no pair; change dataset.data_division, or prepare more pairs")
        epoch, index = np.divmod(sample, self.n_windows)
        index = permute(index, self.n_windows, derive_keys(seed, epoch))
        piece = np.searchsorted(self.ends, index, side="right")
        return piece, index - self._first[piece]


SPLITS = {"tokens": Split, "pairs": PairSplit}


class Corpus:
    """One or more token files, checked and divided. The division depends on the files and data_division only.

    dataset       the `dataset` of a run's configuration (path, load_from_file, data_division), or a path, or paths
    encoder       the fingerprint of the encoder that encoded the files (None: any, but the same for all files)
    .train, .val  the two splits; no token is a target in both. With data_division 1.0, val has no windows
    .fingerprint  SHA-256 of the files' contents in order, which a checkpoint stores to detect other data
    .kind         "tokens" or "pairs", the same for all files

    Raises UserError if files do not match or a split is too small.
    """

    def __init__(self, dataset, encoder: str | None, block_size: int, data_division: float | None = None):
        division = getattr(dataset, "data_division", 0.9) if data_division is None else data_division
        if not 0 < division <= 1:
            raise UserError(f"dataset.data_division is {division}, allowed is above 0 and up to 1")
        self.files = [TokenFile(path) for path in find_token_files(dataset)]
        self.vocab_size, self.kind = self.files[0].header.vocab_size, self.files[0].header.kind
        self.fingerprint = hashlib.sha256("".join(f.header.sha256 for f in self.files).encode()).hexdigest()
        for file in self.files:
            self._check(file, encoder or self.files[0].header.encoder, block_size)
        cut_files = [(file, file.find_boundary(division)) for file in self.files]
        split = SPLITS[self.kind]
        self.train = split("training", [(file, 0, cut) for file, cut in cut_files], block_size)
        self.val = split("validation", [(file, cut, file.header.n_tokens) for file, cut in cut_files], block_size)
        for split in (self.train, self.val):
            if not split.n_windows and (split is self.train or division < 1):
                needed = f"a window of {block_size + 1}" if self.kind == "tokens" else "a pair"
                files = format_count(len(self.files), "file")
                raise UserError(
                    f"the {split.name} split has {split.n_tokens:,} tokens in {files}, too few for {needed}; change "
                    f"dataset.data_division (now {division}), lower block_size, or prepare more text; the splits meet "
                    "between documents, so that a very long document is better cut into several"
                )

    def _check(self, file: TokenFile, encoder: str, block_size: int) -> None:
        if file.header.kind != self.kind:
            raise UserError(
                f"{file.path} holds {file.header.kind}, and {self.files[0].path} holds {self.kind}: train "
                "on one kind at a time"
            )
        if file.header.encoder != encoder:
            raise UserError(
                f"{file.path} was made with encoder {file.header.encoder[:12]}…, and this run's is "
                f"{encoder[:12]}…: set encoder_path to the one it was made with, or prepare it anew"
            )
        if file.header.n_tokens <= block_size and self.kind == "tokens":
            raise UserError(
                f"{file.path} has {file.header.n_tokens} tokens, fewer than one window of "
                f"{block_size + 1}: lower block_size or prepare more text"
            )


def find_token_files(dataset) -> list[Path]:
    """The token files of a `dataset` configuration, a path or a list of paths, in a fixed order.

    With load_from_file false, path is a directory: every file in it that ends in .bin or begins with the magic bytes.
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
        return path.suffix == ".bin" or file.read(len(token_file.MAGIC)) == token_file.MAGIC
