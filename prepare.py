"""Text in, a token file out.

    python prepare.py                                     # the standard library's sources -> data/webtext.bin
    python prepare.py --corpus packages                   # the pinned packages' sources   -> data/packages.bin
    python prepare.py --input texts/ 'more/*.jsonl.gz'    # your own text                  -> data/webtext.bin
    python prepare.py --pairs                             # docstrings and their code      -> data/pairs.bin
    python prepare.py --pairs mine.jsonl                  # lines of {"source": …, "target": …}, for encoder-decoders
    python prepare.py --verify data/webtext.bin           # reads all of a token file and checks its hash

Input is .txt .md .py and the like, one document a file; .json, a list of strings or of {"text": …}; .jsonl, one such
entry a line; any of them gzipped (.gz); a directory, read whole; a glob. The documents are encoded in the order of the
files' names, shuffled, and written with an `<|eot|>` after each. The same input gives the same bytes.

Memory is constant: a text file is read a megabyte at a time, a .json or .jsonl an entry at a time, and what grows with
the input stands on disk, in unnamed temporary files beside the output as large as the output. Only the files' names
are held. Shuffling is exact over all documents, whichever file they come from: they are encoded into such a temporary
file, then copied from it in the order of a permutation that is a formula (dataset.permute).

Index:  reading documents · finding files · corpora · pairs · the encoder · writing the token file · the command line
"""

from __future__ import annotations

import argparse
import ast
import codecs
import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sys
import sysconfig
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
from tqdm import tqdm

import dataset
import options
from encoder import Encoder, load, segments, train
from options import UserError, check_path_arguments
from strawberry.common import Input, Output, check_outputs, encoder_inputs, find_previous

PIECE = 1 << 20  # bytes of a text file that are read at a time
RECORD = 1 << 28  # bytes: the longest entry of a .json or .jsonl
BATCH = 1 << 22  # characters that are encoded at a time, on all threads
TRAINING_TEXT = 10**8  # characters that an encoder is trained on, at most
SEED = 0  # of the shuffle
LONGEST = 1 << 16  # tokens of a pair's source or target: both fit into a piece

# ---- reading documents ---------------------------------------------------------------------------------------------


def ignore(count: int) -> None:
    """For who wants no progress told."""


class Reader:
    """The documents of some files, one after the other, in pieces: iterate for (text, whether it ends its document).

    What isn't UTF-8 is left out and counted in .skipped. `told` is called with the number of bytes read from disk.
    `entry(value, where)` is what an entry of a .json or .jsonl comes to; by default its text (see entry_text).
    """

    def __init__(self, paths: Iterable[Path], texts: Iterable[str] = (), told: Callable[[int], object] = ignore,
                 entry: Callable | None = None):
        self.paths, self.texts, self.told, self.entry = paths, texts, told, entry or entry_text
        self.skipped: list[str] = []  # the first ten
        self.n_skipped = 0

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        for text in self.texts:
            yield text, True
        for path in self.paths:
            try:
                yield from self._file(path)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path} is not a whole gzip file ({error}): pack it again or leave it out") from error
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from error

    def _file(self, path: Path) -> Iterator[tuple[str, bool]]:
        kind = Path(path.stem if path.suffix.lower() == ".gz" else path).suffix.lower()
        if kind != ".jsonl":  # a file is a document, or a list, in whole or not at all: so look at all of it first
            with opened(path) as stream:
                if not is_utf8(stream):
                    self._skip(str(path))
                    return
        with opened(path, self.told) as stream:
            if kind == ".jsonl":
                yield from ((text, True) for text in self._lines(stream, path))
            elif kind == ".json":
                yield from ((text, True) for text in JsonList(stream, path, self.entry))
            else:
                yield from text_pieces(stream)

    def _lines(self, stream: io.BufferedIOBase, path: Path) -> Iterator[str]:
        """The documents of a .jsonl; a line that isn't UTF-8 is skipped."""
        for number in itertools.count(1):
            line = stream.readline(RECORD + 1)
            if not line:
                return
            if len(line) > RECORD:
                raise UserError(f"{path}:{number} is longer than {RECORD >> 20} MB, the limit of an entry: cut it up")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                self._skip(f"{path}:{number}")
                continue
            if text.strip():
                yield self.entry(parsed(text, f"{path}:{number}"), f"{path}:{number}")

    def _skip(self, what: str) -> None:
        self.n_skipped += 1
        self.skipped = [*self.skipped, what][:10]


class Counted(io.FileIO):
    """A file that tells how many of its bytes are read."""

    def __init__(self, path: Path, told: Callable[[int], object]):
        super().__init__(path)
        self.told = told

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self.told(count)
        return count


@contextlib.contextmanager
def opened(path: Path, told: Callable[[int], object] = ignore) -> Iterator[io.BufferedIOBase]:
    """The file's bytes, unpacked where its name ends in .gz."""
    with io.BufferedReader(Counted(path, told), 1 << 16) as stream:
        if path.suffix.lower() != ".gz":
            yield stream
            return
        with gzip.GzipFile(fileobj=stream) as unpacked:
            yield unpacked


def is_utf8(stream: io.BufferedIOBase) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while data := stream.read(PIECE):
            decoder.decode(data)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def text_pieces(stream: io.BufferedIOBase) -> Iterator[tuple[str, bool]]:
    """A document in pieces of at most a megabyte, cut where the tokens of the pieces are the tokens of the whole."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text = ""
    while data := stream.read(PIECE):
        *pieces, text = segments(text + decoder.decode(data), PIECE)
        yield from ((piece, False) for piece in pieces)
    yield text + decoder.decode(b"", final=True), True


class JsonList:
    """The documents of a .json file: iterates over the entries of one list, and holds one entry and a megabyte."""

    SPACE = re.compile(r"[ \t\r\n]*")

    def __init__(self, stream: io.BufferedIOBase, path: Path, entry: Callable | None = None):
        self.entry = entry or entry_text
        self.source, self.path = io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), path
        self.buffer, self.at = "", 0
        self.decode = json.JSONDecoder().raw_decode

    def __iter__(self) -> Iterator[str]:
        self._expect("[", 1)
        mark = self._expect("]", 1) if self._peek() == "]" else ","
        for number in itertools.count(1):
            if mark == "]":
                break
            yield self.entry(self._entry(number), f"{self.path}: entry {number}")
            mark = self._expect(",]", number + 1)
        if self._peek():
            raise UserError(f"{self.path}: there is text after the list's end: {self.buffer[self.at:][:20]!r}")

    def _more(self, size: int) -> bool:
        text = self.source.read(size)
        self.buffer, self.at = self.buffer[self.at :] + text, 0
        return bool(text)

    def _peek(self) -> str:
        """The next character that isn't white space; "" at the end."""
        while True:
            self.at = self.SPACE.match(self.buffer, self.at).end()
            if self.at < len(self.buffer) or not self._more(PIECE):
                return self.buffer[self.at : self.at + 1]

    def _expect(self, marks: str, number: int) -> str:
        mark = self._peek()
        if not mark or mark not in marks:
            found = repr(mark) if mark else "the end of the file"
            raise UserError(f"{self.path}: a .json must be a list of strings or of {{\"text\": …}}, and at entry "
                            f"{number} comes {found}, not {' or '.join(marks)}; mend it, or name it .txt if it is one "
                            "text")
        self.at += 1
        return mark

    def _entry(self, number: int):
        self._peek()
        while True:
            try:
                value, self.at = self.decode(self.buffer, self.at)
                return value
            except (ValueError, RecursionError) as error:  # bad, or not all there: read twice as much and see
                size = len(self.buffer) - self.at
                if size > RECORD or not self._more(max(size, PIECE)):
                    told = f"over {RECORD >> 20} MB long, or not JSON" if size > RECORD else f"not JSON ({error})"
                    raise UserError(f"{self.path}: entry {number} is {told}: mend it or leave it out") from None


def parsed(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): mend it or leave it out") from None


def entry_text(entry, where: str) -> str:
    """The text of an entry, a string or {"text": string} with any other keys beside it."""
    text = entry.get("text") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise UserError(f"{where} is {json.dumps(entry)[:60]}, and must be a string or {{\"text\": a string}}")
    return text


def entry_pair(entry, where: str) -> tuple[str, str]:
    """(source, target) of an entry {"source": string, "target": string} with any other keys beside them."""
    pair = tuple(entry.get(key) for key in ("source", "target")) if isinstance(entry, dict) else ()
    if not pair or not all(isinstance(text, str) for text in pair):
        wanted = '{"source": a string, "target": a string}'
        raise UserError(f"{where} is {json.dumps(entry)[:60]}, and must be {wanted}")
    return pair


def entry_both(entry, where: str) -> str:
    """Both texts of an entry that is a pair, for an encoder to be trained on."""
    return "\n".join(entry_pair(entry, where))


# ---- finding files -------------------------------------------------------------------------------------------------


def find(inputs: Iterable[str], option: str = "--input", leave_out: Iterable[str | os.PathLike] = ()) -> list:
    """(name, path) of each file that the inputs mean, once: a file, a directory, or a glob.

    Names are within the input, with slashes, and sorted within each; hidden files and links to directories are left
    out, as is what `leave_out` lists.
    """
    found: dict[str, tuple[str, Path]] = {os.path.realpath(path): ("", Path(path)) for path in leave_out}
    hidden = set(found)
    for given in inputs:
        hits = [given] if os.path.exists(given) else sorted(glob.glob(os.path.expanduser(given), recursive=True))
        if not hits:
            raise UserError(f"{option} {given}: there is no such file or directory, and as a glob it matches nothing")
        for hit in hits:
            for name, path in walk(Path(hit)):
                found.setdefault(os.path.realpath(path), (name, path))
    return [entry for real, entry in found.items() if real not in hidden]


def walk(path: Path, leave_out: Iterable[str] = ()) -> list[tuple[str, Path]]:
    """(name, path) of a file, or of each file under a directory, sorted by name; not what is hidden, nor in folders of
    the names `leave_out`."""
    if not path.is_dir():
        return [(path.name, path)]
    files = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in leave_out]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((file.relative_to(path).as_posix(), file) for file in files if file.is_file())


# ---- corpora -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Source:
    """What a token file is made from: named files and some texts beside them."""

    name: str
    files: list[tuple[str, Path]]
    texts: list[str] = dataclasses.field(default_factory=list)
    identity: str = ""  # of a corpus that needs no look at its files
    entry: Callable = entry_text  # what its .json and .jsonl have for an encoder to be trained on
    pairs: Callable | None = None  # what reads pairs from it, (paths, told) -> a reader; None: it is running text
    longest: int = 0  # tokens of a pair's target

    @property
    def paths(self) -> list[Path]:
        return [path for _, path in self.files]

    @property
    def kind(self) -> str:
        """Of the token file that is made from it."""
        return "pairs" if self.pairs else "tokens"

    @property
    def digest(self) -> str:
        """SHA-256 of the files' names and sizes, wherever they lie; it stands in the token file's header."""
        about = f"pairs of {self.longest} " if self.pairs else ""
        digest = hashlib.sha256(f"{about}{self.identity}".encode())
        for name, path in [] if self.identity else self.files:
            digest.update(json.dumps([name, path.stat().st_size]).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def changed_since(self, when: float) -> bool:
        return not self.identity and any(path.stat().st_mtime > when for path in self.paths)


LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", ".."}  # folders
LEFT_OUT_FILE = re.compile(r"(test_.*|.*_test|conftest|sitecustomize|usercustomize|_sysconfigdata.*)\.py")
GENERATED_NAME = re.compile(r"(.*/)?(generated/.*|_?version\.py|__config__\.py|.*_pb2(_grpc)?\.py)")
GENERATED = re.compile(
    rb"@generated|auto-?generated|(do not|don't) (edit|modify)|(file|code|module)( was| is)? generated", re.IGNORECASE
)


def python_sources(root: Path, names: Iterable[str]) -> list[tuple[str, Path]]:
    """Those of the files `names`, under root, that are Python sources and no tests, sorted."""
    kept = []
    for name in sorted(set(names)):
        *folders, file = name.split("/")
        if file.endswith(".py") and not LEFT_OUT & set(folders) and not LEFT_OUT_FILE.fullmatch(file):
            kept.append((name, root / name))
    return kept


def stdlib() -> Source:
    """The standard library of the Python that runs, and the topics of its pydoc, each a document of its own."""
    root = Path(sysconfig.get_path("stdlib"))
    names = (name for name, _ in walk(root, LEFT_OUT)) if root.is_dir() else ()
    files = python_sources(root, set(names) - {"pydoc_data/topics.py"})
    if len(files) < 100:
        raise UserError(f"this Python keeps no sources of its standard library in {root} (found {len(files)} files; it "
                        "may be in a zip, or stripped): use a full install of Python, or your own text with --input")
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    return Source("the standard library's sources", files, [topics[name] for name in sorted(topics)], "stdlib")


def packages(requirements: Path) -> Source:
    """The Python sources of the packages that requirements.txt pins for every platform: no tests, nothing generated."""
    pins = read_pins(requirements)
    files = []
    for name, version in pins:
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise UserError(f"{requirements} pins {name}, which is missing: pip install -r {requirements}") from None
        if version not in (package.version, package.version.split("+")[0]):
            raise UserError(f"{requirements} pins {name} {version}, and {package.version} is installed: "
                            f"pip install -r {requirements}")
        listed = [file.as_posix() for file in package.files or ()]
        files += python_sources(Path(package.locate_file("")), listed)
    kept = [(name, path) for name, path in files if path.is_file() and not is_generated(name, path)]
    if not kept:
        raise UserError(f"the packages that {requirements} pins have no Python sources here: use --input")
    identity = "packages " + " ".join(f"{name}=={version}" for name, version in pins)
    return Source(f"the sources of {len(pins)} packages", kept, identity=identity)


def read_pins(requirements: Path) -> list[tuple[str, str]]:
    """(name, version) of each `name==version` line, sorted; lines for some platforms only (`; …`) are left out."""
    try:
        lines = requirements.read_text("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {requirements}: {error.strerror or error}") from error
    pins = (re.fullmatch(r"([\w.-]+)(?:\[.*\])?\s*==\s*([\w.+!-]+)", line.split("#")[0].strip()) for line in lines)
    return sorted({(pin[1], pin[2]) for pin in pins if pin})


def is_generated(name: str, path: Path) -> bool:
    with open(path, "rb") as file:
        return bool(GENERATED_NAME.fullmatch(name) or GENERATED.search(file.read(1000)))


# ---- pairs ---------------------------------------------------------------------------------------------------------


def pair_source(source: Source, longest: int) -> Source:
    """The same source, to be read as pairs: of a corpus' sources the docstrings, of .json and .jsonl the entries."""
    if source.identity:
        return dataclasses.replace(source, texts=[], pairs=Docstrings, longest=longest)
    for path in source.paths:
        if Path(path.stem if path.suffix.lower() == ".gz" else path).suffix.lower() not in (".json", ".jsonl"):
            raise UserError(f"--pairs {path}: pairs are read from .jsonl and .json, gzipped or not; leave it out")
    return dataclasses.replace(source, entry=entry_both, pairs=pair_reader, longest=longest)


def pair_reader(paths: Iterable[Path], told: Callable[[int], object]) -> Reader:
    """Reads ((source, target), True) from .json and .jsonl."""
    return Reader(paths, told=told, entry=entry_pair)


class Docstrings:
    """The pairs in Python sources: the docstring of each function is the source, the function without it the target.

    Iterates as Reader does. Files that Python cannot parse are left out and counted in .skipped.
    """

    def __init__(self, paths: Iterable[Path], told: Callable[[int], object] = ignore):
        self.paths, self.told = paths, told
        self.skipped: list[str] = []  # the first ten
        self.n_skipped = 0

    def __iter__(self) -> Iterator[tuple[tuple[str, str], bool]]:
        for path in self.paths:
            try:
                data = path.read_bytes()
                self.told(len(data))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of spellings that Python has come to dislike
                    pairs = list(documented(data.decode("utf-8-sig")))
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from error
            except (ValueError, SyntaxError, RecursionError):  # a UnicodeDecodeError is a ValueError
                self.n_skipped += 1
                self.skipped = [*self.skipped, str(path)][:10]
                continue
            yield from ((pair, True) for pair in pairs)


def documented(text: str) -> Iterator[tuple[str, str]]:
    """(docstring, code without it) of each function in a Python source, in the order of the text.

    >>> list(documented('def add(a, b):\\n    "Sum of two."\\n    return a + b\\n'))
    [('Sum of two.', 'def add(a, b):\\n    return a + b\\n')]
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in sorted(functions, key=lambda node: node.lineno):
        told, code = ast.get_docstring(node), without_docstring(node, lines)
        if told and len(told.split()) > 1 and code:
            yield told, code


def without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The source of a function, shifted to the margin, less its docstring; "" where nothing else is in it, or where the
    docstring shares a line with code."""
    doc = node.body[0]
    before = lines[doc.lineno - 1].encode()[: doc.col_offset]
    after = lines[doc.end_lineno - 1].encode()[doc.end_col_offset :].split(b"#")[0]
    if len(node.body) == 1 or before.strip() or after.strip():
        return ""
    body = lines[doc.end_lineno : node.end_lineno]
    while not body[0].strip():  # the blank line after a docstring
        body.pop(0)
    indent = node.col_offset
    kept = [*lines[node.lineno - 1 : doc.lineno - 1], *body]
    return "".join((line if line[:indent].strip() else line[indent:]) + "\n" for line in kept)


# ---- the encoder ---------------------------------------------------------------------------------------------------


def get_encoder(spec: str, vocab_size: int | None, source: Source) -> Encoder:
    """The encoder that `spec` names; trained on the source and saved there where it is missing."""
    if not spec.startswith(("tiktoken:", "chars:")) and not os.path.exists(spec):
        print(f"training an encoder of {vocab_size or 8192} tokens on {source.name}", flush=True)
        encoder = train(training_text(source), vocab_size or 8192)
        encoder.save(spec)
        return encoder
    encoder = load(spec)
    if vocab_size not in (None, encoder.vocab_size):
        raise UserError(f"--vocab_size {vocab_size}: the encoder {spec} is there and has {encoder.vocab_size} tokens; "
                        "leave --vocab_size out, or name a new file with --encoder")
    return encoder


def training_text(source: Source) -> Iterator[str]:
    """Text to train on: the files in shuffled order, the first TRAINING_TEXT characters of them."""
    paths = source.paths
    order = dataset.permute(np.arange(len(paths)), len(paths), dataset.keys(SEED, np.zeros(len(paths))))
    left = TRAINING_TEXT
    for text, _ in Reader((paths[i] for i in order), source.texts, entry=source.entry):
        if text:
            yield text[:left]
            left -= len(text)
        if left <= 0:
            return
    if left == TRAINING_TEXT:
        raise UserError(f"there is no text in {source.name}: every file is empty or not UTF-8")


# ---- writing the token file ----------------------------------------------------------------------------------------


class Spool:
    """Encoded documents on disk, in the order they came, to be read in a shuffled one. Its files have no names."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.dtype, self.n_tokens, self.n_documents, self.n_empty = dtype, 0, 0, 0
        self.tokens = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self.ends = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._mark(0)
        self._start = 0
        self.notes: list[str] = []  # what was left out on the way here

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_) -> None:
        self.tokens.close()
        self.ends.close()

    def _mark(self, end: int) -> None:
        self.ends.write(end.to_bytes(8, "little"))

    def add(self, tokens: np.ndarray, last: bool) -> None:
        self.tokens.write(tokens.astype(self.dtype).tobytes())
        self.n_tokens += len(tokens)
        if last and self.n_tokens == self._start:
            self.n_empty += 1
        elif last:
            self._mark(self.n_tokens)
            self.n_documents, self._start = self.n_documents + 1, self.n_tokens

    def shuffled(self, seed: int) -> Iterator[tuple[np.ndarray, bool]]:
        """(tokens, whether they end their document), each document whole and in order."""
        n = self.n_documents
        for first in range(0, n, 1 << 16):
            places = np.arange(first, min(first + (1 << 16), n))
            for document in dataset.permute(places, n, dataset.keys(seed, np.zeros(len(places)))):
                yield from self.read(*self.span(int(document)))

    def span(self, document: int) -> tuple[int, int]:
        """Where the document begins and ends, in tokens of the spool."""
        self.ends.seek(8 * document)
        return tuple(np.frombuffer(self.ends.read(16), "<u8").tolist())

    def read(self, start: int, end: int) -> Iterator[tuple[np.ndarray, bool]]:
        """(tokens, whether they are the last) of the tokens start … end − 1, in pieces."""
        self.tokens.seek(start * self.dtype.itemsize)
        for at in range(start, end, PIECE):
            data = self.tokens.read(min(PIECE, end - at) * self.dtype.itemsize)
            yield np.frombuffer(data, self.dtype), at + PIECE >= end


def encode_all(pieces: Iterable[tuple[str, bool]], encoder: Encoder, spool: Spool) -> int:
    """Encode pieces of documents into the spool, a batch at a time on all processors; returns the bytes of text."""
    n_bytes, size, texts, lasts = 0, 0, [], []

    def flush() -> None:
        for tokens, last in zip(encoder.encode_batch(texts, num_threads=os.cpu_count() or 1), lasts, strict=True):
            spool.add(tokens, last)
        texts.clear()
        lasts.clear()

    for text, last in pieces:
        texts.append(text)
        lasts.append(last)
        n_bytes += len(text.encode("utf-8", "surrogatepass"))
        size += len(text) + 256  # for short texts, the objects around them
        if size >= BATCH:
            flush()
            size = 0
    flush()
    return n_bytes


def encode_pairs(pairs: Iterable[tuple[tuple[str, str], bool]], encoder: Encoder, spool: Spool, longest: int) -> int:
    """Encode pairs into the spool, each as its source, an eot, and its target; returns the bytes of text.

    Sources are cut to `longest` tokens, the eot included; a pair whose target is longer is left out, since half a
    target is none. spool.notes says how many.
    """
    n_bytes = n_cut = n_long = 0
    for batch in batches(pair for pair, _ in pairs):
        sources, targets = zip(*batch, strict=True)
        n_threads = os.cpu_count() or 1
        encoded = zip(encoder.encode_batch(sources, n_threads), encoder.encode_batch(targets, n_threads), strict=True)
        for source, target in encoded:
            if not len(source) or not len(target):
                spool.n_empty += 1
            elif len(target) >= longest:
                n_long += 1
            else:
                if len(source) >= longest:
                    n_cut += 1
                    source = source[: longest - 1]
                spool.add(np.concatenate((source, [encoder.eot], target)), last=True)
                n_bytes += len(encoder.decode_bytes(source)) + len(encoder.decode_bytes(target))
    if n_long:
        spool.notes.append(f"left out {n_long:,} pairs with a target of more than {longest} tokens (--longest)")
    if n_cut:
        spool.notes.append(f"cut {n_cut:,} sources to {longest} tokens (--longest)")
    return n_bytes


def batches(pairs: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Lists of pairs, each of about BATCH characters."""
    batch, size = [], 0
    for pair in pairs:
        batch.append(pair)
        size += sum(map(len, pair)) + 512  # for short texts, the objects around them
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def put(writer: dataset.TokenFileWriter, tokens: np.ndarray, last: bool) -> None:
    """A document, or a part of one, or a pair, from the spool into the file."""
    if writer.kind == "pairs":
        middle = int(np.argmax(tokens == writer.encoder.eot))
        writer.add(tokens[:middle])
        tokens = tokens[middle + 1 :]
    writer.add(tokens, last)


def write(source: Source, encoder: Encoder, output: str) -> None:
    """Encode, shuffle and write the source; a line on stdout says what came of it."""
    began, what = time.perf_counter(), "pair" if source.pairs else "document"
    folder = Path(os.path.realpath(output)).parent
    size = sum(path.stat().st_size for path in source.paths)
    with (
        dataset.TokenFileWriter(output, encoder, source.digest, source.kind) as writer,
        Spool(folder, writer.dtype) as spool,
        tqdm(total=size, desc="encoding", unit="B", unit_scale=True, disable=None) as bar,
    ):
        try:
            if source.pairs:
                reader = source.pairs(source.paths, bar.update)
                n_bytes = encode_pairs(reader, encoder, spool, source.longest)
            else:
                reader = Reader(source.paths, source.texts, bar.update)
                n_bytes = encode_all(reader, encoder, spool)
            if not spool.n_documents:
                told = f" ({'; '.join(spool.notes)})" if spool.notes else ""
                raise UserError(f"there is no text in {source.name}: every {what} is empty or not UTF-8{told}")
            bar.reset(spool.n_tokens * spool.dtype.itemsize)
            bar.set_description("shuffling")
            for tokens, last in spool.shuffled(SEED):
                put(writer, tokens, last)
                bar.update(tokens.nbytes)
        except OSError as error:  # a full disk, above all
            raise UserError(f"cannot write beside {output}: {error.strerror or error}") from error
    print(f"{output}: {spool.n_documents:,} {what}s, {writer.n_tokens:,} tokens ({writer.dtype.name}), "
          f"{n_bytes / 1e6:.1f} MB of text, {n_bytes / writer.n_tokens:.2f} bytes per token, "
          f"in {time.perf_counter() - began:.1f} s")
    if spool.n_empty:
        print(f"left out {spool.n_empty:,} empty {what}s")
    for note in spool.notes:
        print(note)
    if reader.n_skipped:
        why = "Python cannot parse" if source.pairs is Docstrings else "are not UTF-8"
        print(f"left out {reader.n_skipped:,} that {why}: {', '.join(reader.skipped)}"
              + (" …" if reader.n_skipped > len(reader.skipped) else ""))


def is_up_to_date(output: str, source: Source, spec: str, vocab_size: int | None) -> bool:
    """Whether `output` is a token file made from this source with this encoder, and newer than its files."""
    if not os.path.exists(output) or not os.path.getsize(output):
        return False
    if not spec.startswith(("tiktoken:", "chars:")) and not os.path.exists(spec):
        return False
    try:
        header = dataset.TokenFile(output).header
    except UserError as error:
        print(f"{error}", file=sys.stderr)
        return False
    if header.source != source.digest or source.changed_since(os.stat(output).st_mtime):
        return False
    return header.encoder == get_encoder(spec, vocab_size, source).fingerprint


# ---- the command line ----------------------------------------------------------------------------------------------


def verify(path: str) -> None:
    file = dataset.TokenFile(path)
    header = file.header
    with tqdm(total=header.n_tokens, desc="verifying", unit="tokens", unit_scale=True, disable=None) as bar:
        file.verify(bar.update)
    what = "documents" if header.kind == "tokens" else "sources and targets"
    print(f"{path} is sound: {header.n_documents:,} {what}, {header.n_tokens:,} tokens ({header.dtype}, under "
          f"{header.vocab_size:,}), encoder {header.encoder[:12]}…, SHA-256 {header.sha256[:12]}…")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn text into a token file.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--input", nargs="+", action="extend", metavar="PATH", help="files, directories or globs of "
                      "text; .json is a list and .jsonl has lines of strings or of {\"text\": …}, .gz is unpacked")
    what.add_argument("--corpus", choices=("stdlib", "packages"), default="stdlib", help="instead of --input: the "
                      "sources of this Python's standard library (default), or of the packages in requirements.txt")
    what.add_argument("--verify", metavar="FILE", help="read all of a token file and check its hash; writes nothing")
    parser.add_argument("--pairs", nargs="*", metavar="PATH", help="make pairs for encoder-decoders: of .jsonl files "
                        "with lines of {\"source\": …, \"target\": …}; without a PATH, of the corpus, in which the "
                        "docstring of each function is a source, and its code the target")
    parser.add_argument("--longest", type=int, default=256, metavar="N", help="tokens of a pair, the <|eot|> included: "
                        "longer sources are cut, pairs with a longer target left out (default %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="the token file (default data/webtext.bin; data/packages.bin "
                        "for --corpus packages; data/pairs.bin for --pairs)")
    parser.add_argument("--encoder", default="bin/cl8k.bin", metavar="SPEC", help="an encoder file, trained on the "
                        "input where it is missing; tiktoken:NAME; chars:FILE (default %(default)s)")
    parser.add_argument("--vocab_size", type=int, help="size of the encoder to train (default 8192)")
    parser.add_argument("--force", action="store_true", help="write the output anew though it is up to date: made from "
                        "the same files or corpus by the same encoder (an encoder that is there is kept)")
    return parser.parse_args(argv)


def get_source(given: argparse.Namespace) -> tuple[Source, str]:
    """What a command line says to read, and where the token file goes by default."""
    inputs, option = (given.pairs, "--pairs") if given.pairs else (given.input, "--input")
    default = "data/packages.bin" if given.corpus == "packages" and not inputs else "data/webtext.bin"
    default = default if given.pairs is None else "data/pairs.bin"
    if given.pairs is not None and given.input:
        raise UserError("--pairs and --input exclude each other: name the files after --pairs")
    if not 2 <= given.longest <= LONGEST:
        raise UserError(f"--longest {given.longest}: allowed is 2 to {LONGEST:,}")
    if inputs:
        written = [Output("--output", given.output or default, "tokens"), Output("--encoder", given.encoder, "encoder")]
        files = find(inputs, option, leave_out=find_previous(written))
        if not files:
            raise UserError(f"{option} {' '.join(inputs)}: no files there, apart from what is to be written")
        source = Source(" ".join(inputs)[:80], files)
    else:
        source = packages(Path(__file__).with_name("requirements.txt")) if given.corpus == "packages" else stdlib()
    return source if given.pairs is None else pair_source(source, given.longest), default


def check_files(given: argparse.Namespace, source: Source, output: str) -> None:
    """Raises UserError where writing the token file, or the encoder if it is to be trained, would cost another file."""
    outputs = [Output("--output", output, "tokens")]
    if not given.encoder.startswith(("tiktoken:", "chars:")) and not os.path.exists(given.encoder):
        outputs.append(Output("--encoder", given.encoder, "encoder"))
    option = "--pairs" if given.pairs else "--input" if given.input else "--corpus"
    inputs = [Input(option, path) for path in source.paths]
    check_outputs(outputs, inputs + encoder_inputs("--encoder", given.encoder))


def main(argv: list[str]) -> None:
    given = parse(argv)
    check_path_arguments(given, "input", "verify", "pairs", "output", "encoder")
    if given.verify:
        verify(given.verify)
        return
    source, default = get_source(given)
    output = given.output or default
    check_files(given, source, output)
    if not given.force and is_up_to_date(output, source, given.encoder, given.vocab_size):
        print(f"{output} is up to date (--force writes it anew)")
        return
    write(source, get_encoder(given.encoder, given.vocab_size, source), output)


if __name__ == "__main__":
    options.run_cli(main)
