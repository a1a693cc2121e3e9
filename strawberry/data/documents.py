"""The documents in the files of a command line, and the kind of each file.

    documents = Documents(expand_inputs(["book.txt", "notes/", "logs/*.jsonl.gz", "-"]))
    documents.scan()                          # reads each input once: its kind, its SHA-256, whether it is UTF-8
    for text, is_last in documents.read():    # the documents, long ones in parts
        ...
    documents.notes()                         # what was left out, and why

A text file is one document. A .json file is a list of documents, and a .jsonl, .ndjson or .jsonlines file has one per
line: strings, or objects with a "text". A file that the user names must be text, else the command fails. A file from a
folder or a glob that is not text is left out and counted.

Index:  kinds of files · checking bytes · the documents · options of a command
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from strawberry.argument_parser import ArgumentParser
from strawberry.common import UserError, show
from strawberry.data.inputs import PIECE, InputFile, ignore_progress
from strawberry.data.json_entries import Line, NoTextError, parse_json, read_json_list, read_lines

HEAD = 1 << 16  # bytes at the start of a file that determine its kind
MAX_NAMES = 10  # largest number of files that a note lists
VERSION = 1  # of the digest; incremented whenever the same bytes are read as other documents

# ---- kinds of files ------------------------------------------------------------------------------------------------

FORMATS, ERRORS = ("text", "json", "jsonl"), ("strict", "replace")
JSON_SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl"}
OTHER_SUFFIXES = {  # text by their bytes, but not by their meaning
    ".csv": "a table (CSV)", ".tsv": "a table (TSV)", ".ipynb": "a notebook", ".rtf": "a rich text document",
}  # fmt: skip
SIGNATURES = (  # first bytes of a file, from the formats' own specifications
    (b"%PDF-", "a PDF"), (b"PK\x03\x04", "a ZIP archive, as .docx, .xlsx and .epub are"), (b"PAR1", "a Parquet table"),
    (b"\xff\xfe\x00\x00", "UTF-32 text"), (b"\x00\x00\xfe\xff", "UTF-32 text"), (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"), (b"\x89PNG", "a PNG image"), (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF87a", "a GIF image"), (b"GIF89a", "a GIF image"), (b"II*\x00", "a TIFF image"), (b"MM\x00*", "a TIFF image"),
    (b"RIFF", "an image, sound or film (RIFF)"), (b"ID3", "an MP3 sound"), (b"OggS", "an Ogg sound or film"),
    (b"fLaC", "a FLAC sound"), (b"\x1aE\xdf\xa3", "a film (Matroska)"), (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"), (b"\x28\xb5\x2f\xfd", "a Zstandard archive"), (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"), (b"\xd0\xcf\x11\xe0", "an old Office document"), (b"SQLite format 3", "a database"),
    (b"ARROW1", "an Arrow table"), (b"\x89HDF", "an HDF5 file"), (b"\x93NUMPY", "a NumPy array"),
    (b"\x7fELF", "a program"), (b"\x89TOKENS\n", "a token file"),
)  # fmt: skip
ENCODER_FILE = re.compile(rb'\s*\{\s*"format"\s*:\s*"encoder"')
NOT_UTF8, OTHER_KIND, NO_TEXTS, NO_PAIRS = "not in UTF-8", "of other kinds", "of JSON without texts", "of text"  # why
MAX_NUL_SHARE = 0.01  # share of a text's bytes
MAX_BAD_SHARE, MIN_BAD = 0.2, 20  # of a text's replaced characters; above both, it is no text


def find_suffix(path: Path) -> str:
    """The suffix that determines a file's format, in lower case: the one before .gz if there is one."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path).suffix.lower()


def find_format(file: InputFile, head: bytes, wanted: str = "auto") -> str:
    """The format of a file: "text", "json" or "jsonl". Its name decides; for a stream without a known suffix, its first
    bytes.
    """
    suffix = find_suffix(file.path)
    if wanted != "auto" or suffix in JSON_SUFFIXES or not file.is_stream:
        return JSON_SUFFIXES.get(suffix, "text") if wanted == "auto" else wanted
    head = head.removeprefix(codecs.BOM_UTF8)
    if re.match(rb'\s*\[\s*(\{\s*)?"', head):
        return "json"
    return "jsonl" if re.match(rb'\s*\{\s*"[^"\n]*"\s*:', head) else "text"


def find_other_kind(file: InputFile, head: bytes, wanted: str = "auto") -> str | None:
    """The kind of a file that is neither text nor JSON, by its first bytes and its name; None for text and JSON."""
    for signature, kind in SIGNATURES:
        if head.startswith(signature):
            return kind
    if head[4:8] == b"ftyp":
        return "a film or image (MP4)"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if b"\0" in head[:8] and head[8:10] == b'{"':
        return "a model file (safetensors)"
    if ENCODER_FILE.match(head):
        return "an encoder file"
    return OTHER_SUFFIXES.get(find_suffix(file.path)) if wanted == "auto" else None


# ---- checking bytes ------------------------------------------------------------------------------------------------


class BadByte(NamedTuple):
    """The first byte of a file that is not UTF-8. Lines count from 1, bytes from 0."""

    line: int
    offset: int
    value: int

    def __str__(self) -> str:
        return f"byte {self.offset} (0x{self.value:02X})"


class Scan(NamedTuple):
    """The result of one pass over a file."""

    head: bytes
    sha256: str
    size: int
    n_nul: int
    bad_byte: BadByte | None


def scan_bytes(stream: io.BufferedIOBase) -> Scan:
    """Read a whole stream and find the first byte that is not UTF-8."""
    decoder, digest, bad_byte = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256(), None
    size = n_nul = n_lines = 0
    data = head = stream.read(max(PIECE, HEAD))
    while True:
        if bad_byte is None:
            before = size - len(decoder.getstate()[0])
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line = n_lines + error.object.count(b"\n", 0, error.start) + 1
                bad_byte = BadByte(line, before + error.start, error.object[error.start])
        if not data:
            return Scan(head[:HEAD], digest.hexdigest(), size, n_nul, bad_byte)
        digest.update(data)
        size, n_nul, n_lines = size + len(data), n_nul + data.count(0), n_lines + data.count(b"\n")
        data = stream.read(PIECE)


def find_binary(scan: Scan, errors: str) -> str | None:
    """Why a file is not text, even if bytes that are not UTF-8 may be replaced; None if it may be text."""
    if scan.n_nul > MAX_NUL_SHARE * scan.size:
        return f"{scan.n_nul:,} of its {scan.size:,} bytes are NUL, as in UTF-16 or a binary file"
    if scan.bad_byte is None or errors != "replace":
        return None
    text = scan.head.decode("utf-8", "replace")
    n_bad = text.count("\ufffd")
    if n_bad > MIN_BAD and n_bad > MAX_BAD_SHARE * len(text):
        return f"{n_bad / len(text):.0%} of its first characters are not, as in another encoding or a binary file"
    return None


class HashedStream:
    """A stream that hashes the bytes that are read."""

    def __init__(self, stream: io.BufferedIOBase):
        self.stream, self.digest = stream, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.digest.update(data)
        return data

    def readline(self, size: int) -> bytes:
        data = self.stream.readline(size)
        self.digest.update(data)
        return data


# ---- the documents -------------------------------------------------------------------------------------------------


def find_text(entry: Any, where: str) -> str:
    """The text of an entry: a string, or {"text": string}, which may have other keys. Raises NoTextError for other
    entries.
    """
    text = entry.get("text") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        chat = isinstance(entry, dict) and "messages" in entry
        hint = "; prepare.py reads messages with --chat_template chatml" if chat else ""
        raise NoTextError(f"{where} is {show(entry)}, and must be a string or {{\"text\": a string}}{hint}")
    return text


class ScannedFile(NamedTuple):
    """An input that is read, its format, and the hash and size of its decompressed bytes."""

    file: InputFile
    format: str
    sha256: str
    size: int


class Documents:
    """The documents of some inputs: call scan() first, then read() any number of times.

    find_entry  (entry, where) -> the text, or pair, of an entry of a .json or .jsonl; raises NoTextError if it has none
    format      "text", "json" or "jsonl" for all inputs; "auto": determined by their names
    errors      for bytes that are not UTF-8: "strict" raises UserError for a file that the user named, and leaves out
    one that was found; "replace" replaces them by U+FFFD
    mend        the option that selects "replace", for messages; "" if there is none
    only_json   whether text files are refused
    """

    def __init__(self, inputs: Iterable[InputFile], find_entry: Callable[[Any, str], Any] = find_text,
                 format: str = "auto", errors: str = "strict", mend: str = "", only_json: bool = False):
        self.inputs, self.find_entry, self.format, self.errors = list(inputs), find_entry, format, errors
        self.mend, self.only_json = mend, only_json
        self.files: list[ScannedFile] = []
        self.left_out: dict[str, list[str]] = {}  # reason → files, or lines of files
        self._bad_lines: list[str] = []  # the first ones of the last read()
        self._n_bad_lines = 0

    # -- scanning

    def scan(self, progress: Callable[[int], object] = ignore_progress) -> None:
        """Read every input once. .files are the inputs to read, .left_out the others.

        Raises UserError if a file that the user named cannot be read as text.
        """
        self.files, self.left_out = [], {}
        for file in self.inputs:
            with file.open(progress) as stream:
                scan = scan_bytes(stream)
            format = find_format(file, scan.head, self.format)
            if not self._is_left_out(file, scan, format):
                self.files.append(ScannedFile(file, format, scan.sha256, scan.size))

    def _is_left_out(self, file: InputFile, scan: Scan, format: str) -> bool:
        """Whether an input is left out. Raises UserError if the user named it."""
        if kind := find_other_kind(file, scan.head, self.format):
            message = f"{file.label} is {kind}: convert it to text or JSON lines, or leave it out"
            return self._leave_out(file, OTHER_KIND, f"{file.label} ({kind})", message)
        if problem := find_binary(scan, self.errors):
            message = f"{file.label} is no UTF-8 text: {problem}; convert it, or leave it out"
            return self._leave_out(file, NOT_UTF8, f"{file.label} ({problem})", message)
        if self.only_json and format == "text":
            message = f"{file.label} is text: pairs are read from .jsonl and .json, packed with gzip or not"
            return self._leave_out(file, NO_PAIRS, file.label, message)
        if scan.bad_byte and self.errors == "strict" and (file.is_named or format != "jsonl"):
            where = f"{file.label}:{scan.bad_byte.line}"
            keep = f", or keep it with {self.mend}, which puts U+FFFD there" if self.mend else ""
            message = f"{where}: {scan.bad_byte} is not UTF-8; convert the file to UTF-8{keep}"
            return self._leave_out(file, NOT_UTF8, f"{where}, {scan.bad_byte}", message)
        return format != "text" and self._has_no_texts(file, format)

    def _has_no_texts(self, file: InputFile, format: str) -> bool:
        """Whether the first entry does not have the required form, as in a package.json."""
        try:
            with file.open() as stream:
                next(self._read_stream(stream, file, format, self.find_entry), None)
        except NoTextError as error:
            return self._leave_out(file, NO_TEXTS, file.label, str(error))
        return False

    def _leave_out(self, file: InputFile, reason: str, name: str, message: str) -> bool:
        if file.is_named:
            raise UserError(message)
        self.left_out.setdefault(reason, []).append(name)
        return True

    # -- reading

    def read(
        self, files: Iterable[ScannedFile] | None = None, find_entry: Callable[[Any, str], Any] | None = None,
        progress: Callable[[int], object] = ignore_progress,
    ) -> Iterator[tuple[Any, bool]]:
        """Yield (text, whether it ends its document) for all documents, in the order of the files.

        Raises UserError that names file and line or entry if one cannot be read or has changed since scan().
        """
        self._bad_lines, self._n_bad_lines = [], 0
        for scanned in self.files if files is None else files:
            with scanned.file.open(progress) as stream:
                hashed = HashedStream(stream)
                yield from self._read_stream(hashed, scanned.file, scanned.format, find_entry or self.find_entry)
            if hashed.digest.hexdigest() != scanned.sha256:
                raise UserError(f"{scanned.file.label} changed while it was read: start again")

    def read_head(self, file: InputFile) -> Iterator[tuple[Any, bool]]:
        """As read(), of one input that was not scanned, for a caller that reads its beginning only."""
        with file.open() as stream:
            yield from self._read_stream(stream, file, find_format(file, b"", self.format), self.find_entry)

    def _read_stream(self, stream, file: InputFile, format: str, find_entry: Callable) -> Iterator[tuple[Any, bool]]:
        label = self._find_label(file, format)
        if format == "text":
            yield from decode_parts(stream, self.errors)
        elif format == "json":
            for number, entry in enumerate(read_json_list(stream, label, self.errors), 1):
                yield find_entry(entry, f"{label}: entry {number}"), True
        else:
            for line in read_lines(stream, label):
                text = self._decode_line(line, label)
                if text is not None:
                    yield find_entry(self._parse_line(text, f"{label}:{line.number}"), f"{label}:{line.number}"), True

    def _find_label(self, file: InputFile, format: str) -> str:
        """The name of a file for messages, with its format if that was determined by its first bytes."""
        return f"{file.label} (read as {format})" if self._is_guessed(file, format) else file.label

    def _is_guessed(self, file: InputFile, format: str) -> bool:
        return format != "text" and self.format == "auto" and find_suffix(file.path) not in JSON_SUFFIXES

    def _decode_line(self, line: Line, label: str) -> str | None:
        """The text of a line of a .jsonl; None if it is not UTF-8 and therefore left out."""
        try:
            return line.data.decode("utf-8", self.errors)
        except UnicodeDecodeError as error:
            bad_byte = BadByte(line.number, line.offset + error.start, line.data[error.start])
            self._n_bad_lines += 1
            if len(self._bad_lines) <= MAX_NAMES:
                self._bad_lines.append(f"{label}:{line.number}, {bad_byte}")
            return None

    def _parse_line(self, text: str, where: str) -> Any:
        try:
            return parse_json(text)
        except ValueError as error:
            raise UserError(f"{where} {error}") from None

    # -- results

    @property
    def digest(self) -> str:
        """SHA-256 of the inputs that are read, after scan(): each file's format and bytes, in order, independent of
        file names.
        """
        content = [[scanned.format, scanned.sha256] for scanned in self.files]
        return hashlib.sha256(json.dumps([VERSION, self.errors, content]).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Decompressed bytes of the files that are read."""
        return sum(scanned.size for scanned in self.files)

    def count_left_out(self, reason: str) -> int:
        """The number of files left out for that reason; for NOT_UTF8 plus the lines left out in the last read()."""
        return len(self.left_out.get(reason, ())) + (self._n_bad_lines if reason == NOT_UTF8 else 0)

    def notes(self) -> list[str]:
        """A line for each reason for which files, or lines of the last read(), were left out."""
        left_out = {_count(len(names), f"file{{}} {reason}"): names for reason, names in self.left_out.items()}
        if self._bad_lines:
            left_out[_count(self._n_bad_lines, f"line{{}} {NOT_UTF8}")] = self._bad_lines
        guessed = [f"{scanned.file.label} is read as {scanned.format}: --format text reads it as one text"
                   for scanned in self.files if self._is_guessed(scanned.file, scanned.format)]  # fmt: skip
        return guessed + [f"left out {what}: {'; '.join(names[:MAX_NAMES])}{' …' if len(names) > MAX_NAMES else ''}"
                for what, names in left_out.items()]  # fmt: skip


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun.format('s' * (n != 1))}"


def decode_parts(stream: io.BufferedIOBase | HashedStream, errors: str = "strict") -> Iterator[tuple[str, bool]]:
    """Yield (part, whether it is the last) of a text, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
    while data := stream.read(PIECE):
        yield decoder.decode(data), False
    yield decoder.decode(b"", final=True), True


def read_text(file: InputFile) -> str:
    """The whole text of a file, whatever its name. Raises UserError if it is not UTF-8."""
    documents = Documents([file], format="text")
    documents.scan()
    return "".join(part for part, _ in documents.read())


# ---- options of a command ------------------------------------------------------------------------------------------


def add_reading_options(parser: ArgumentParser) -> None:
    """Add --format and --errors to the parser of a command that reads documents."""
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="what the inputs are, whatever "
                        "their names; auto goes by the names, and for a pipe by the first bytes (default auto)")
    parser.add_argument("--errors", choices=ERRORS, default="strict", help="of bytes that are not UTF-8; strict: a "
                        "file that you name is refused, one found in a folder left out; replace: they become U+FFFD "
                        "(default strict)")
