"""Encode documents to disk. prepare.py and strawberry.data.assemble share this module.

with Spool(folder, dtype) as spool:
    encode_documents(cut_pieces(documents.read(), PIECE), encoder, spool)
    for tokens, last in spool.read_shuffled(seed):
        ...
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from encoder import Encoder
from strawberry.data.chat import SpecialToken
from strawberry.data.order import derive_keys, permute

PIECE = 1 << 20  # characters, or tokens, of a document in memory at a time
BATCH = 1 << 22  # characters that one batch encodes, on all threads
MAX_TRAINING_CHARS = 10**8  # largest number of characters to train an encoder on


class Spool:
    """Encoded documents on disk, in unnamed temporary files. They are written in order and can be read in any order."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.dtype, self.n_tokens, self.n_documents, self.n_empty = dtype, 0, 0, 0
        self.tokens = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self.ends = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._write_end(0)
        self._start = 0
        self.notes: list[str] = []  # what was left out or truncated

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_) -> None:
        self.tokens.close()
        self.ends.close()

    def _write_end(self, end: int) -> None:
        self.ends.write(end.to_bytes(8, "little"))

    def add(self, tokens: np.ndarray, last: bool) -> None:
        self.tokens.write(tokens.astype(self.dtype).tobytes())
        self.n_tokens += len(tokens)
        if last and self.n_tokens == self._start:
            self.n_empty += 1
        elif last:
            self._write_end(self.n_tokens)
            self.n_documents, self._start = self.n_documents + 1, self.n_tokens

    def read_shuffled(self, seed: int) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield (tokens, whether they end their document): the documents in shuffled order, each complete."""
        n = self.n_documents
        for first in range(0, n, 1 << 16):
            places = np.arange(first, min(first + (1 << 16), n))
            for document in permute(places, n, derive_keys(seed, np.zeros(len(places)))):
                yield from self.read(*self.find_span(int(document)))

    def find_span(self, document: int) -> tuple[int, int]:
        """(start, end) of a document, in tokens of the spool."""
        self.ends.seek(8 * document)
        return tuple(np.frombuffer(self.ends.read(16), "<u8").tolist())

    def read(self, start: int, end: int) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield (tokens, whether they are the last) of the tokens start … end − 1, in pieces."""
        self.tokens.seek(start * self.dtype.itemsize)
        for at in range(start, end, PIECE):
            data = self.tokens.read(min(PIECE, end - at) * self.dtype.itemsize)
            yield np.frombuffer(data, self.dtype), at + PIECE >= end


def encode_documents(pieces: Iterable[tuple[str | list[str], bool]], encoder: Encoder, spool: Spool) -> int:
    """Encode pieces of documents, or the parts of chats, into the spool, in batches on all processors. Returns the
    bytes of text.
    """
    n_bytes, size, texts = 0, 0, []
    plan: list[tuple[int | None, bool]] = []  # (a special token, or None for the next text; whether its document ends)

    def encode_batch() -> None:
        encoded = iter(encoder.encode_batch(texts, num_threads=os.cpu_count() or 1))
        for special, last in plan:
            spool.add(next(encoded) if special is None else np.array([special]), last)
        texts.clear()
        plan.clear()

    for piece, is_last in pieces:
        parts = [piece] if isinstance(piece, str) else piece or [""]
        for i, part in enumerate(parts, 1):
            special = encoder.specials[part] if isinstance(part, SpecialToken) else None
            texts += [part] if special is None else []
            plan.append((special, is_last and i == len(parts)))
            n_bytes += len(part.encode("utf-8", "surrogatepass"))
            size += len(part) + 256  # 256: the Python objects of short texts
        if size >= BATCH:
            encode_batch()
            size = 0
    encode_batch()
    return n_bytes


def encode_pairs(pairs: Iterable[tuple[tuple[str, str], bool]], encoder: Encoder, spool: Spool, max_tokens: int) -> int:
    """Encode pairs into the spool, each as its source, an eot, and its target. Returns the bytes of text.

    Sources are truncated to `max_tokens` tokens, including the eot. A pair with a longer target is left out, because a
    truncated target is not a valid target. spool.notes has the counts.
    """
    n_bytes = n_cut = n_long = 0
    for batch in batch_pairs(pair for pair, _ in pairs):
        sources, targets = zip(*batch, strict=True)
        n_threads = os.cpu_count() or 1
        encoded = zip(encoder.encode_batch(sources, n_threads), encoder.encode_batch(targets, n_threads), strict=True)
        for source, target in encoded:
            if not len(source) or not len(target):
                spool.n_empty += 1
            elif len(target) >= max_tokens:
                n_long += 1
            else:
                if len(source) >= max_tokens:
                    n_cut += 1
                    source = source[: max_tokens - 1]
                spool.add(np.concatenate((source, [encoder.eot], target)), last=True)
                n_bytes += len(encoder.decode_bytes(source)) + len(encoder.decode_bytes(target))
    if n_long:
        spool.notes.append(f"left out {n_long:,} pairs with a target of more than {max_tokens} tokens (--max_tokens)")
    if n_cut:
        spool.notes.append(f"cut {n_cut:,} sources to {max_tokens} tokens (--max_tokens)")
    return n_bytes


def batch_pairs(pairs: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Yield lists of pairs of about BATCH characters in total."""
    batch, size = [], 0
    for pair in pairs:
        batch.append(pair)
        size += sum(map(len, pair)) + 512  # 512: the Python objects of short texts
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
