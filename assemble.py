"""A dataset from several files: mixed by weight, cleaned of duplicates, encoded, and divided, in one token file.

    python assemble.py mix.json data/mix      # writes data/mix/tokens.bin, encoder.bin and result.json

mix.json:  {"files": ["books/", "chat.jsonl.gz"], "weights": [1, 2.5], "deduplicate": "near", "validation_share": 0.05}

The files are what prepare.py reads. In their order, each document is measured against the limits of length, then
against all that were kept before it: the first of equal or alike documents stays. Of what is left a share validates,
each document once; the rest trains, as often as its file's weight says, shuffled. No document is in both, and with
"near" nothing alike is. What trains stands first in the file: `data_division` in result.json says where it ends, and
`train.py --dataset.path=data/mix/tokens.bin --encoder_path=data/mix/encoder.bin --dataset.data_division=…` keeps to it.

The same recipe and the same files give the same bytes. Texts stand on disk, in unnamed temporary files of about five
times their size with "near", which compares them by their bytes; in memory are some 100 bytes for each document.

Index:  the recipe · documents on disk · alike documents · what trains and what validates · progress · the command
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

import dataset
import encoder as encoders
import options
import prepare
from options import UserError, atomic_write, option
from strawberry.common import Input, Output, check_outputs, encoder_inputs, find_previous
from strawberry.data.documents import ERRORS, NO_TEXTS, NOT_UTF8, OTHER_KIND, Documents, expand_inputs, ignore_progress

REASONS = {"not_utf8": NOT_UTF8, "other_kinds": OTHER_KIND, "without_texts": NO_TEXTS}  # why a file is left out
TOKENS, ENCODER, RESULT, PROGRESS = "tokens.bin", "encoder.bin", "result.json", "progress.json"
KINDS = {TOKENS: "tokens", ENCODER: "encoder", RESULT: "dataset result", PROGRESS: "progress"}
VERSION = 2  # of what a recipe comes to: raised whenever the same recipe gives other bytes

# ---- the recipe ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Recipe:
    """What a dataset is made of, and how."""

    files: list[str] = option([], "what it is made of: files, folders or globs")
    weights: list[float] | None = option(
        None, "one for each of files: how often its documents are taken; 2: twice, 0.5: half of them; null: once",
        above=0, high=1000,
    )
    errors: str = option(
        "strict", "of bytes that are not UTF-8; strict: a file that is named is refused, one in a folder left out; "
        "replace: they become U+FFFD", choices=list(ERRORS),
    )
    deduplicate: str = option(
        "exact", "of documents with the same text, or of alike ones too, the first is kept",
        choices=["none", "exact", "near"],
    )
    similarity: float = option(
        0.8, "near: documents are alike from this share of common text on: the Jaccard index of their runs of 8 bytes, "
        "in lower case, all white space as one space", low=0.3, high=1,
    )
    min_chars: int = option(1, "shorter documents are left out", low=1, high=2**40)
    max_chars: int | None = option(None, "longer documents are left out", low=1, high=2**40)
    encoder: str | None = option(None, "what encodes it; chars: a token for each character; null: trained on the text")
    vocab_size: int | None = option(
        None, "of the encoder that is trained; null: 8192, or what the text gives", low=258, high=encoders.MAX_VOCAB
    )
    validation_share: float = option(0.1, "share of the tokens that validates", above=0, below=1)
    seed: int = option(0, "of the shuffle, and of what validates", low=0, high=2**31 - 1)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.files:
            yield "files", "must name at least one"
        if self.weights is not None and len(self.weights) != len(self.files):
            yield "weights", f"must be as many as files, {len(self.files)}"
        if self.max_chars is not None and self.max_chars < self.min_chars:
            yield "max_chars", f"must be >= min_chars ({self.min_chars})"
        if self.encoder is not None and self.vocab_size is not None:
            yield "vocab_size", "is that of an encoder to be trained, and encoder names one; leave one of them out"


# ---- documents on disk ---------------------------------------------------------------------------------------------


class Texts:
    """Documents on disk, each in the pieces in which it was read, so that its tokens are those of the whole."""

    def __init__(self, folder: Path):
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by close)
        self.ends = array("Q", [0])  # of the pieces, in bytes
        self.first = array("Q", [0])  # piece of each document, and of the next one

    def __len__(self) -> int:
        return len(self.first) - 1

    def write(self, piece: str) -> None:
        """One more piece of the document that is being read."""
        self.ends.append(self.ends[-1] + self.file.write(piece.encode("utf-8", "surrogatepass")))

    def keep(self) -> None:
        self.first.append(len(self.ends) - 1)

    def drop(self) -> None:
        """Forget what was written since the last document."""
        del self.ends[self.first[-1] + 1 :]
        self.file.seek(self.ends[-1])
        self.file.truncate()

    def pieces(self, document: int) -> Iterator[tuple[str, bool]]:
        """(text, whether it ends the document)"""
        first, stop = self.first[document], self.first[document + 1]
        for i in range(first, stop):
            self.file.seek(self.ends[i])
            data = self.file.read(self.ends[i + 1] - self.ends[i])
            yield data.decode("utf-8", "surrogatepass"), i == stop - 1

    def size(self, document: int) -> int:
        """In bytes."""
        return self.ends[self.first[document + 1]] - self.ends[self.first[document]]

    def close(self) -> None:
        self.file.close()


class Gatherer:
    """Reads files into Texts and leaves out what the recipe doesn't want; .left_out counts why.

    .sources[i] is the entry of recipe.files that document i is of.
    """

    def __init__(self, recipe: Recipe, texts: Texts, alike: Alike | None):
        self.recipe, self.texts, self.alike = recipe, texts, alike
        self.left_out = {"exact_duplicates": 0, "near_duplicates": 0, "too_short": 0, "too_long": 0,
                         **dict.fromkeys(REASONS, 0)}  # fmt: skip
        self.sources = array("I")
        self.seen: set[bytes] = set()

    def read(self, source: int, documents: Documents, told: Callable[[int], object]) -> None:
        documents.scan(told)
        chars, digest, pieces = 0, hashlib.sha256(), []
        for piece, last in encoders.cut_pieces(documents.read(progress=told), prepare.PIECE):
            chars += len(piece)
            if piece and chars <= self.longest:
                self.texts.write(piece)
                digest.update(piece.encode("utf-8", "surrogatepass"))
                if self.alike and chars <= LONG:
                    pieces.append(piece)
            if last:
                self.finish(source, chars, digest.digest(), "".join(pieces) if chars <= LONG else None)
                chars, digest, pieces = 0, hashlib.sha256(), []
        for name, reason in REASONS.items():
            self.left_out[name] += documents.count_left_out(reason)
        for note in documents.notes():
            print(note, file=sys.stderr)

    @property
    def longest(self) -> float:
        return self.recipe.max_chars or math.inf

    def finish(self, source: int, chars: int, digest: bytes, text: str | None) -> None:
        """A document is read: keep it, or leave it out and say why."""
        exact = self.recipe.deduplicate != "none"
        reasons = {"too_short": chars < self.recipe.min_chars, "too_long": chars > self.longest,
                   "exact_duplicates": exact and digest[:16] in self.seen}
        for reason, holds in reasons.items():
            if holds:
                self.left_out[reason] += 1
                self.texts.drop()
                return
        self.texts.keep()
        self.sources.append(source)
        if exact:
            self.seen.add(digest[:16])
        if self.alike:
            self.alike.add(text)


# ---- alike documents -----------------------------------------------------------------------------------------------
# MinHash with bands (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3): of each
# document 128 numbers, each of which two documents have in common with a probability that is their Jaccard index.
# Documents that agree in all rows of one band are compared by their runs of bytes themselves: no document is left out
# for less than `similarity`, and one that should be is missed with a probability of 1 in 1,000 at most.

HASHES = 128
WIDTH = 8  # bytes of a run: as many as an integer holds, so that different runs are different numbers
MISSED = 1e-3  # at most this probability that two documents just at `similarity` share no band
LONG = 1 << 22  # characters: longer documents are compared exactly only, since all their runs must fit into memory
MULTIPLY = dataset.mix(np.arange(1, HASHES + 1, dtype=np.uint64) * dataset.GOLDEN) | np.uint64(1)
ADD = dataset.mix(MULTIPLY)


def runs(text: str) -> np.ndarray:
    """The runs of WIDTH bytes of a text, in lower case and with single spaces, each once, as sorted uint64.

    >>> len(runs("a Text"))        # shorter than a run: one, filled up with zeros
    1
    """
    data = " ".join(text.lower().split()).encode("utf-8", "surrogatepass").ljust(WIDTH, b"\0")
    column = np.frombuffer(data, np.uint8).astype(np.uint64)
    n = len(column) - WIDTH + 1
    found = np.zeros(n, np.uint64)
    for i in range(WIDTH):
        found = found << np.uint64(8) | column[i : i + n]
    return np.unique(found)


def signature(found: np.ndarray) -> np.ndarray:
    """(HASHES,) uint64: for each of as many hash functions the least hash of the runs (n,)."""
    mixed, least = dataset.mix(found), np.full(HASHES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(mixed), 2048):
        part = mixed[start : start + 2048, None]
        np.minimum(least, (part * MULTIPLY + ADD).min(axis=0), out=least)
    return least


def bands(similarity: float) -> tuple[int, int]:
    """(bands, rows of each): the most rows with which documents of that similarity are still found.

    >>> bands(0.8)       # 1 − (1 − 0.8 ** 5) ** 25 = 0.99995
    (25, 5)
    """
    for rows in range(16, 1, -1):
        if (1 - similarity**rows) ** (HASHES // rows) <= MISSED:
            return HASHES // rows, rows
    return HASHES, 1


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sorted arrays without repetitions: what they share, by all that is in them."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


class Alike:
    """Finds documents that are alike: add(text) each in turn, then found() says which to leave out."""

    def __init__(self, folder: Path, similarity: float):
        self.similarity, (self.bands, self.rows) = similarity, bands(similarity)
        self.runs = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by close)
        self.keys = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.ends = array("Q", [0])  # of the documents in .runs, in numbers

    def add(self, text: str | None) -> None:
        """The next document; None for one that is not compared."""
        found = np.zeros(0, np.uint64) if text is None else runs(text)
        self.runs.write(found.tobytes())
        self.ends.append(self.ends[-1] + len(found))
        parts = signature(found)[: self.bands * self.rows].reshape(self.bands, self.rows)
        key = np.arange(self.bands, dtype=np.uint64)
        for row in range(self.rows):
            key = dataset.mix(key ^ parts[:, row])
        self.keys.write(key.tobytes())

    def read(self, document: int) -> np.ndarray:
        start, end = self.ends[document], self.ends[document + 1]
        self.runs.seek(8 * start)
        return np.frombuffer(self.runs.read(8 * (end - start)), np.uint64)

    def meetings(self) -> tuple[np.ndarray, np.ndarray]:
        """(documents, groups), sorted by document: who shares a band with whom. A document may be in several groups."""
        self.keys.flush()
        n = len(self.ends) - 1
        sizes = np.diff(np.frombuffer(self.ends, np.uint64))
        documents, groups, count = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        table = np.memmap(self.keys, np.uint64, mode="r", shape=(n, self.bands)) if n else np.zeros((0, self.bands))
        for band in range(self.bands):
            _, group, size = np.unique(np.array(table[:, band]), return_inverse=True, return_counts=True)
            shared = np.flatnonzero((size[group] > 1) & (sizes > 0))
            documents.append(shared)
            groups.append(group[shared] + count)
            count += len(size)
        documents, groups = np.concatenate(documents), np.concatenate(groups)
        order = np.argsort(documents, kind="stable")
        return documents[order], groups[order]

    def found(self, told: Callable[[float], object] = ignore_progress) -> np.ndarray:
        """(n,) bool: whether a document is alike to an earlier one that is itself not left out."""
        out = np.zeros(len(self.ends) - 1, bool)
        documents, groups = self.meetings()
        kept: dict[int, list[int]] = {}  # of each group, the documents that stay
        starts = np.flatnonzero(np.diff(documents, prepend=-1))
        for start, own in zip(starts, np.split(groups, starts[1:]) if len(starts) else [], strict=True):
            document, own = int(documents[start]), own.tolist()
            rivals = {rival for group in own for rival in kept.get(group, ())}
            if self.is_like(document, sorted(rivals)):
                out[document] = True
            else:
                for group in own:
                    kept.setdefault(group, []).append(document)
            told(start / len(documents))
        return out

    def is_like(self, document: int, rivals: list[int]) -> bool:
        size, mine = self.ends[document + 1] - self.ends[document], None
        for rival in rivals:
            other = self.ends[rival + 1] - self.ends[rival]
            if min(size, other) < self.similarity * max(size, other):  # they cannot have that much in common
                continue
            mine = self.read(document) if mine is None else mine
            if jaccard(mine, self.read(rival)) >= self.similarity:
                return True
        return False

    def close(self) -> None:
        self.runs.close()
        self.keys.close()


# ---- what trains and what validates --------------------------------------------------------------------------------

Span = tuple[int, int]  # tokens of the spool, start and end


def shuffle(n: int, seed: int) -> np.ndarray:
    """A permutation of 0 … n−1."""
    return dataset.permute(np.arange(n), n, dataset.keys(seed, np.zeros(n))).astype(np.int64)


def copies(sources: np.ndarray, weights: list[float], seed: int) -> np.ndarray:
    """How often each document is taken, by the weight of the file (n,) that it is of.

    A weight of 2.25 takes each document twice and a quarter of them, rounded up, once more.
    """
    times = np.zeros(len(sources), np.int64)
    for source, weight in enumerate(weights):
        own = np.flatnonzero(sources == source)
        more = math.ceil(round((weight % 1) * len(own), 6))
        times[own] = int(weight)
        times[own[shuffle(len(own), seed)[:more]]] += 1
    return times


def divide(spans: list[Span], share: float, seed: int) -> tuple[list[Span | None], list[Span]]:
    """(what trains of each document, what validates): whole documents, drawn so that they hold that share of tokens.

    A document longer than all of the share together is not drawn. Where less than half the share comes of it, because
    documents are few or long, the end of the longest one validates instead.

    >>> divide([(0, 100)], 0.1, seed=0)
    ([(0, 90)], [(90, 100)])
    """
    lengths = [end - start for start, end in spans]
    wanted, held = share * sum(lengths), 0
    training: list[Span | None] = list(spans)
    validation = []
    for i in shuffle(len(spans), seed).tolist():
        if len(validation) < len(spans) - 1 and held + lengths[i] <= max(wanted, 1):
            validation.append(spans[i])
            training[i], held = None, held + lengths[i]
    if held >= wanted / 2:
        return training, validation
    longest = int(np.argmax(lengths))
    start, end = spans[longest]
    middle = min(max(end - max(math.ceil(wanted), 1), start + 1), end)
    return [*spans[:longest], (start, middle), *spans[longest + 1 :]], [(middle, end)]


# ---- progress ------------------------------------------------------------------------------------------------------


class Progress:
    """Tells a file how far it is, twice a second at most: {"phase": "reading", "done": 0.31} of the phase."""

    def __init__(self, path: Path):
        self.path, self.at = path, 0.0
        self.phase = ""

    def begin(self, phase: str, total: float = 1) -> Progress:
        self.phase, self.total, self.n, self.at = phase, max(total, 1e-9), 0.0, 0.0
        self.add(0)
        return self

    def add(self, n: float) -> None:
        self.set(self.n + n)

    def set(self, n: float) -> None:
        self.n = n
        if time.monotonic() - self.at > 0.5:
            self.at = time.monotonic()
            about = {"phase": self.phase, "done": round(min(self.n / self.total, 1), 4)}
            with contextlib.suppress(UserError):  # a full disk will show elsewhere
                atomic_write(self.path, json.dumps(about).encode())


# ---- the command ---------------------------------------------------------------------------------------------------


def check_files(recipe: Recipe, paths: Iterable[Path], folder: Path, recipe_file: str | None) -> None:
    """Raises UserError where the dataset would cost one of the files that it is made from, or another one."""
    outputs = [Output("FOLDER", folder / name, kind) for name, kind in KINDS.items()]
    inputs = [Input("files", path) for path in paths] + encoder_inputs("encoder", recipe.encoder or "chars")
    check_outputs(outputs, inputs + [Input("RECIPE.json", recipe_file)] * bool(recipe_file))


def assemble(recipe: Recipe, folder: Path, recipe_file: str | None = None) -> dict:
    """Make the dataset in `folder`; returns what result.json says, which is written last."""
    began, progress = time.perf_counter(), Progress(folder / PROGRESS)
    previous = find_previous(Output("FOLDER", folder / name, kind) for name, kind in KINDS.items())
    found = [expand_inputs([name], "files", leave_out=previous) for name in recipe.files]
    check_files(recipe, (file.path for files in found for file in files), folder, recipe_file)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    with contextlib.ExitStack() as stack:
        texts = stack.enter_context(contextlib.closing(Texts(folder)))
        alike = None
        if recipe.deduplicate == "near":
            alike = stack.enter_context(contextlib.closing(Alike(folder, recipe.similarity)))
        gatherer = Gatherer(recipe, texts, alike)
        size = sum(file.size for inputs in found for file in inputs)
        told = progress.begin("reading", 2 * size).add  # once to check it, once for its documents
        for source, inputs in enumerate(found):
            gatherer.read(source, Documents(inputs, errors=recipe.errors, mend='"errors": "replace"'), told)
        out = np.zeros(len(texts), bool)
        if alike:
            out = alike.found(progress.begin("comparing").set)
            gatherer.left_out["near_duplicates"] = int(out.sum())
        kept = np.flatnonzero(~out)
        times = np.zeros(len(texts), np.int64)
        times[kept] = copies(np.array(gatherer.sources)[kept], recipe.weights or [1.0] * len(found), recipe.seed)
        if not times.any():
            told = ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in gatherer.left_out.items() if n)
            names = ", ".join(recipe.files[:5]) + (", …" if len(recipe.files) > 5 else "")
            raise UserError(f"no text is left of the files (left out: {told or 'nothing; they are empty'}): {names}")
        taken = np.flatnonzero(times)
        progress.begin("making the encoder")
        encoder = get_encoder(recipe, texts, taken, folder)
        result = write(recipe, texts, taken, times[taken], encoder, folder, progress)
    result |= {"left_out": gatherer.left_out, "seconds": round(time.perf_counter() - began, 2)}
    atomic_write(folder / RESULT, json.dumps(result, indent=1).encode())
    return result


def remove_unfinished(folder: Path) -> None:
    """Remove what a call that was killed had not finished."""
    for name in KINDS:
        for path in folder.glob(f".{name}.*.tmp"):
            if path.name.removeprefix(f".{name}.").removesuffix(".tmp").isdigit():
                path.unlink()


def get_encoder(recipe: Recipe, texts: Texts, taken: np.ndarray, folder: Path) -> encoders.Encoder:
    """The encoder that the recipe names, or one made of the texts; a copy of it is saved beside the tokens."""
    if recipe.encoder == "chars":
        chars = set()
        for document in taken:
            for piece, _ in texts.pieces(int(document)):
                chars.update(piece)
        encoder = encoders.from_characters(chars)
    elif recipe.encoder is not None:
        encoder = encoders.load(recipe.encoder)
    else:
        exact = recipe.vocab_size is not None
        encoder = encoders.train(training_text(texts, taken, recipe.seed), recipe.vocab_size or 8192, exact=exact)
    encoder.save(folder / ENCODER)
    return encoder


def training_text(texts: Texts, taken: np.ndarray, seed: int) -> Iterator[str]:
    """The documents in shuffled order, the first prepare.TRAINING_TEXT characters of them."""
    left = prepare.TRAINING_TEXT
    for document in taken[shuffle(len(taken), seed)].tolist():
        for piece, _ in texts.pieces(document):
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                return


def write(recipe: Recipe, texts: Texts, taken: np.ndarray, times: np.ndarray, encoder, folder: Path,
          progress: Progress) -> dict:
    """Encode the documents `taken`, each `times` times where it trains; returns what there is to say of them."""
    progress.begin("encoding", sum(texts.size(document) for document in taken.tolist()))

    def pieces() -> Iterator[tuple[str, bool]]:
        for document in taken.tolist():
            yield from texts.pieces(document)
            progress.add(texts.size(document))

    digest = hashlib.sha256(json.dumps(dataclasses.asdict(recipe), sort_keys=True).encode()).hexdigest()
    with (
        dataset.TokenFileWriter(folder / TOKENS, encoder, digest) as writer,
        prepare.Spool(folder, writer.dtype) as spool,
    ):
        n_bytes = prepare.encode_all(pieces(), encoder, spool)
        spans = [spool.span(i) for i in range(spool.n_documents)]
        training, validation = divide(spans, recipe.validation_share, recipe.seed)
        progress.begin("writing", spool.n_tokens)
        for i in once_or_more(training, times, recipe.seed):
            append(writer, spool, training[i], progress)
        n_train, n_train_documents = writer.n_tokens, writer.n_documents
        for span in validation:
            append(writer, spool, span, progress)
    return {
        "documents": len(taken), "bytes": n_bytes, "tokens": writer.n_tokens,
        "training": {"documents": n_train_documents, "tokens": n_train},
        "validation": {"documents": len(validation), "tokens": writer.n_tokens - n_train},
        "data_division": (n_train - 0.5) / writer.n_tokens,  # TokenFile.boundary rounds up, to n_train
        "encoder": {"vocab_size": encoder.vocab_size, "fingerprint": encoder.fingerprint},
    }


def once_or_more(training: list[Span | None], times: np.ndarray, seed: int) -> Iterable[int]:
    """The documents that train, each as often as it is taken, shuffled."""
    trains = np.array([span is not None for span in training])
    repeated = np.repeat(np.flatnonzero(trains), times[trains])
    return repeated[shuffle(len(repeated), seed)].tolist()


def append(writer: dataset.TokenFileWriter, spool: prepare.Spool, span: Span, progress: Progress) -> None:
    for tokens, last in spool.read(*span):
        writer.add(tokens, last)
        progress.add(len(tokens))


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[0].startswith("-"):
        raise UserError("usage: python assemble.py RECIPE.json FOLDER; the keys of a recipe:\n" + "\n".join(
            f"  {name} = {options.show(key.default)}: {key.doc} [{key.allowed}]"
            for name, key in options.declared(Recipe).items()))
    recipe, problems = options.check(Recipe, options.read_json(argv[0]))
    if problems:
        raise UserError(f"{argv[0]}: " + "\n  ".join(problems))
    folder = Path(argv[1])
    try:
        result = assemble(recipe, folder, argv[0])
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror or error}") from error
    left_out = ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in result["left_out"].items() if n)
    print(f"{folder / TOKENS}: {result['documents']:,} documents, {result['tokens']:,} tokens, of which "
          f"{result['validation']['tokens']:,} validate; data_division {result['data_division']:.6f}"
          + (f"; left out: {left_out}" if left_out else ""))


if __name__ == "__main__":
    options.run_cli(main)
