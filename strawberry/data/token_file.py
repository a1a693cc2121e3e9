"""Token files: one little-endian array of token ids after a header of 256 bytes.

Every document ends with the encoder's `<|eot|>`. In a file of kind "pairs", documents alternate between a source and
its target. prepare.py and strawberry.data.assemble write token files; training reads them. The corpus is never loaded
into memory: a batch is copied out of a memory map that is open only during the copy, so that resident memory does not
grow with the file.

Index:  the header · writing · reading
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from strawberry.common import UserError, nearest_file, temporary_path

MAGIC = b"\x89TOKENS\n"  # \x89 starts no UTF-8 text, so a token file is never read as a document
VERSION = 1
HEADER_SIZE = 256
CHUNK = 1 << 20  # tokens to read, scan or hash at a time
DEFAULTS = {  # token file → the options with which prepare.py makes it
    "data/webtext.bin": "", "data/packages.bin": "--corpus packages", "data/pairs.bin": "--pairs",
    "data/packages_pairs.bin": "--corpus packages --pairs",
}  # fmt: skip
NO_ORIGIN = "00" * 32
KINDS = ("tokens", "pairs")  # running text; alternating sources and targets


@dataclasses.dataclass(frozen=True)
class Header:
    """The header before the tokens: 256 bytes, little-endian, in this order.

    bytes    field          meaning
    0-7      magic          b"\\x89TOKENS\\n"
    8-15     version, size  two uint32: 1 and 256
    16-31    kind           "tokens": running text; "pairs": every other document is the target of the one before it
    32-39    dtype          "uint16" if vocab_size is at most 65,536, else "uint32"
    40-71    vocab_size, eot, n_tokens, n_documents    four uint64; n_tokens counts the eot tokens too
    72-103   encoder        the encoder's fingerprint, a SHA-256
    104-135  sha256         of the payload: everything after the header
    136-167  source         SHA-256 of the inputs, by which prepare.py detects that the file is out of date
    168-199  origin         of a file that no --output named: SHA-256 of the names of the inputs and of the encoder, by
                            which prepare.py detects that another command made the file; else zeros
    200-223  zeros
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
    origin: str = NO_ORIGIN

    LAYOUT = struct.Struct("<8sII16s8sQQQQ32s32s32s32s24x")

    def to_bytes(self) -> bytes:
        digests = [bytes.fromhex(digest) for digest in (self.encoder, self.sha256, self.source, self.origin)]
        names = [name.encode("ascii") for name in (self.kind, self.dtype or dtype_for(self.vocab_size))]
        counts = (self.vocab_size, self.eot, self.n_tokens, self.n_documents)
        head = self.LAYOUT.pack(MAGIC, self.version, HEADER_SIZE, *names, *counts, *digests)
        return head + hashlib.sha256(head).digest()

    @classmethod
    def from_bytes(cls, data: bytes, path: str | os.PathLike) -> Header:
        """The header in the first bytes of a file. Raises UserError that names `path` if the header is not valid."""
        if data[: len(MAGIC)] != MAGIC:
            raise UserError(f"{path} is not a token file (it starts with {data[:8]!r}); prepare.py makes token files")
        if len(data) < HEADER_SIZE:
            raise UserError(f"{path} is cut short: {len(data)} bytes, and the header alone has {HEADER_SIZE}")
        version, size = struct.unpack_from("<II", data, len(MAGIC))
        if (version, size) != (VERSION, HEADER_SIZE):
            raise UserError(f"{path} has token file version {version}, and {VERSION} is read here: prepare it anew")
        if hashlib.sha256(data[: cls.LAYOUT.size]).digest() != data[cls.LAYOUT.size : HEADER_SIZE]:
            raise UserError(f"{path} has a damaged header (its checksum is wrong): prepare it anew")
        kind, dtype, *counts, encoder, sha256, source, origin = cls.LAYOUT.unpack_from(data)[3:]
        names = [name.rstrip(b"\0").decode("ascii", "replace") for name in (kind, dtype)]
        digests = [digest.hex() for digest in (encoder, sha256, source)]
        header = cls(*counts, *digests, names[1], names[0], version, origin.hex())
        for problem in header.find_problems():
            raise UserError(f"{path} has an impossible header: {problem}; prepare it anew")
        return header

    def find_problems(self) -> Iterator[str]:
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


def storage_dtype(vocab_size: int) -> np.dtype:
    """The little-endian dtype of the ids on disk."""
    return np.dtype(dtype_for(vocab_size)).newbyteorder("<")


class TokenFileWriter:
    """Writes a token file in constant memory, under a temporary name, and renames it when closed.

    with TokenFileWriter("data/webtext.bin", encoder) as writer:
        writer.add(np.array([72, 105]))               # one document; add appends its eot
        writer.add(first_part, last=False)            # or a long document in parts
        writer.add(second_part)

    `encoder` is any object with vocab_size, eot and fingerprint. An exception inside the `with` leaves no file behind.
    """

    def __init__(self, path: str | os.PathLike, encoder, source: str = "00" * 32, kind: str = "tokens",
                 origin: str = NO_ORIGIN):  # fmt: skip
        self.path, self.encoder, self.source, self.kind, self.origin = path, encoder, source, kind, origin
        self.dtype = storage_dtype(encoder.vocab_size)
        self.n_tokens = self.n_documents = 0
        self._hash = hashlib.sha256()
        target = Path(os.path.realpath(path))
        self._temporary = temporary_path(target)
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
        """Append the tokens (n,) of a document, or of a part of it if `last` is False. Raises ValueError for the eot or
        an id outside the vocabulary.
        """
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
        """Write the header, rename the file, return the header."""
        encoder = self.encoder
        counts = (encoder.vocab_size, encoder.eot, self.n_tokens, self.n_documents)
        header = Header(*counts, encoder.fingerprint, self._hash.hexdigest(), self.source, kind=self.kind,
                        origin=self.origin)  # fmt: skip
        target = Path(os.path.realpath(self.path))
        try:
            self._file.seek(0)
            self._file.write(header.to_bytes())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, target)
            if os.name != "nt":  # the rename is durable only after an fsync of the folder
                folder = os.open(target.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
        except OSError as error:
            self.abort()
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        return dataclasses.replace(header, dtype=dtype_for(encoder.vocab_size))

    def abort(self) -> None:
        """Close and remove the unfinished file."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()


class TokenFile:
    """A token file, opened for reading. The constructor checks its header and size; verify() checks its hash.

    .header     its Header
    .tokens     the ids (n_tokens,) as a new read-only memory map; delete the array to release its pages
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._head = file.read(HEADER_SIZE)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            default = DEFAULTS.get(Path(path).as_posix())
            make = f"--output {path}" if default is None else default
            raise UserError(f"there is no token file {path}: run python prepare.py {make}".rstrip()
                            + nearest_file(path)) from None  # fmt: skip
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        self.header = Header.from_bytes(self._head, path)
        self.dtype = storage_dtype(self.header.vocab_size)
        self.n_bytes = HEADER_SIZE + self.header.n_tokens * self.dtype.itemsize
        if size != self.n_bytes:
            detail = f"{self.header.n_tokens} tokens make {self.n_bytes} bytes, and it has {size}"
            raise UserError(
                f"{path} is {'cut short' if size < self.n_bytes else 'too long'}: {detail}; prepare it anew"
            )
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

    def read_rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """`length` tokens from each of `starts` (n,): (n, length) int64, a copy. Maps the file, copies and unmaps."""
        view = np.lib.stride_tricks.sliding_window_view(self.tokens, length)  # (n_tokens − length + 1, length)
        return self._to_int64(view[starts])

    def read_slices(self, starts: np.ndarray, stops: np.ndarray) -> list[np.ndarray]:
        """The tokens start … stop−1 for each of starts and stops (n,): n int64 arrays, copies. Maps the file, copies,
        unmaps.
        """
        tokens = self.tokens
        return [self._to_int64(tokens[start:stop]) for start, stop in zip(starts, stops, strict=True)]

    def _to_int64(self, tokens: np.ndarray) -> np.ndarray:
        if tokens.size and tokens.max() >= self.header.vocab_size:
            raise UserError(self._explain_bad_token(int(tokens.max())))
        return tokens.astype(np.int64)

    def read_chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yield tokens start … stop−1 in order, in chunks, with file reads instead of a memory map."""
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
        """Read the whole file. Raises UserError if its hash, ids or document count differ from the header."""
        digest, n_documents, last = hashlib.sha256(), 0, self.header.eot
        for chunk in self.read_chunks():
            digest.update(chunk)
            if chunk.max() >= self.header.vocab_size:
                raise UserError(self._explain_bad_token(int(chunk.max())))
            n_documents += int(np.count_nonzero(chunk == self.header.eot))
            last = int(chunk[-1])
            progress(len(chunk))
        if digest.hexdigest() != self.header.sha256:
            detail = (
                f"the tokens' SHA-256 is {digest.hexdigest()[:12]}…, and its header says {self.header.sha256[:12]}…"
            )
            raise UserError(f"{self.path} is damaged: {detail}; prepare it anew")
        if (n_documents, last) != (self.header.n_documents, self.header.eot):
            detail = f"{n_documents} end-of-text tokens for {self.header.n_documents} documents, the last token {last}"
            raise UserError(f"{self.path} is wrongly made: {detail}; prepare it anew")

    def _explain_bad_token(self, token: int) -> str:
        detail = f"it holds token {token}, and its vocab_size is {self.header.vocab_size}"
        return f"{self.path} is damaged: {detail}; prepare it anew"

    def find_boundary(self, division: float) -> int:
        """The end of the training split: tokens before it are for training, the others for validation.

        It is the first document boundary at or after division · n_tokens. If that is the end of the file, it is the
        last boundary before; in a file of one document, the nearest token.

        In documents of 4, 4 and 2 tokens, 0.5, 0.8 and 0.9 all give 8 (0.9 not 10, after which nothing is left).
        """
        n, eot = self.header.n_tokens, self.header.eot
        if division >= 1:
            return n
        wanted = min(max(math.ceil(division * n), 1), n)
        if self.header.kind == "pairs":
            return self._find_pair_boundary(wanted)
        position = wanted - 1  # a boundary at b means that token b−1 is an eot
        for chunk in self.read_chunks(position, n - 1):
            found = np.flatnonzero(chunk == eot)
            if len(found):
                return position + int(found[0]) + 1
            position += len(chunk)
        for stop in range(wanted - 1, 0, -CHUNK):
            start = max(stop - CHUNK, 0)
            found = np.flatnonzero(np.concatenate(list(self.read_chunks(start, stop))) == eot)
            if len(found):
                return start + int(found[-1]) + 1
        return min(max(round(division * n), 1), n)

    def _find_pair_boundary(self, wanted: int) -> int:
        """The first end of a pair at or after `wanted`. If that is the end of the file, the last end before it; with
        only one pair, the end of the file.
        """
        ends = self.find_pairs(0, self.header.n_tokens)[:, -1]
        i = min(int(np.searchsorted(ends, wanted)), max(len(ends) - 2, 0))
        return int(ends[i])

    def find_pairs(self, start: int, stop: int) -> np.ndarray:
        """The positions of the pairs in tokens start … stop−1, (n, 3) int64: a source's first token, its target's first
        token, and the pair's end. Memory: 24 bytes for each pair; nothing else here grows with the file. Raises
        UserError if these tokens do not divide into pairs.
        """
        found, position = [], start
        for chunk in self.read_chunks(start, stop):
            found.append(position + np.flatnonzero(chunk == self.header.eot))
            position += len(chunk)
        ends = np.concatenate([[start - 1], *found]).astype(np.int64) + 1
        if len(ends) % 2 == 0 or ends[-1] != stop:
            detail = f"tokens {start} to {stop} hold {len(ends) - 1} end-of-text tokens, which make no pairs"
            raise UserError(f"{self.path} is wrongly made: {detail}; prepare it anew")
        return np.stack((ends[:-1:2], ends[1::2], ends[2::2]), axis=1)
