"""Assemble a dataset from several files: mixed by weight, deduplicated, encoded and split, in one token file.

    python -m strawberry.data.assemble mix.json data/mix      # writes data/mix/tokens.bin, encoder.bin and result.json

mix.json:  {"files": ["books/", "chat.jsonl.gz"], "weights": [1, 2.5], "deduplicate": "near", "validation_share": 0.05}

The files are of the kinds that prepare.py reads. Documents are processed in order. Each is checked against the length
limits, then compared with all documents kept so far: the first of equal or near-duplicate documents is kept. A share of
the kept documents forms the validation split, each document once. The others form the training split, repeated by the
weight of their file and shuffled. No document is in both splits; with "near", no near-duplicate is either. The training
split comes first in the file and ends at `data_division` of result.json:
`train.py --dataset.path=data/mix/tokens.bin --encoder_path=data/mix/encoder.bin --dataset.data_division=…` reads it.

The same recipe and files give the same bytes. Texts are stored on disk, in unnamed temporary files. With "near", which
compares documents by their bytes, these have about five times the size of the texts. Memory use is about 100 bytes for
each document.

Index:  the recipe · documents on disk · copies and splits · progress · the command
"""

from __future__ import annotations

import signal

from strawberry import startup

if __name__ == "__main__":
    startup.exit_on(signal.SIGINT)

import argparse
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

import encoder as encoders
from strawberry.argument_parser import ArgumentParser
from strawberry.common import UserError, atomic_write, format_count, run_cli, show
from strawberry.config import check, declared, option, read_json
from strawberry.data import encoding
from strawberry.data.documents import ERRORS, NO_TEXTS, NOT_UTF8, OTHER_KIND, Documents
from strawberry.data.encoding import Spool, encode_documents
from strawberry.data.inputs import expand_inputs
from strawberry.data.near_duplicates import MAX_COMPARED_CHARS, NearDuplicates
from strawberry.data.order import permutation
from strawberry.data.token_file import TokenFileWriter
from strawberry.outputs import Input, Output, check_outputs, encoder_inputs, find_previous

# key of "left_out" in result.json → why files are left out
LEFT_OUT_REASONS = {"not_utf8": NOT_UTF8, "other_kinds": OTHER_KIND, "without_texts": NO_TEXTS}
TOKENS, ENCODER, RESULT, PROGRESS = "tokens.bin", "encoder.bin", "result.json", "progress.json"
KINDS = {TOKENS: "tokens", ENCODER: "encoder", RESULT: "dataset result", PROGRESS: "progress"}
VERSION = 2  # incremented whenever the same recipe gives other bytes


@dataclasses.dataclass
class Recipe:
    """The contents and the processing of a dataset."""

    files: list[str] = option([], "files, folders or glob patterns")
    weights: list[float] | None = option(
        None,
        "one number for each of files: how often its documents are used; 2: twice, 0.5: half of them; null: once",
        above=0,
        high=1000,
    )
    errors: str = option(
        "strict",
        "bytes that are not UTF-8; strict: refuse a named file, leave out one in a folder; replace: use U+FFFD",
        choices=list(ERRORS),
    )
    deduplicate: str = option(
        "exact",
        "keep the first of documents with the same text (exact), or of similar ones too (near)",
        choices=["none", "exact", "near"],
    )
    similarity: float = option(
        0.8,
        "near: documents are similar from this Jaccard index of their 8-byte shingles on; case and amount of "
        "white space do not count",
        low=0.3,
        high=1,
    )
    min_chars: int = option(1, "leave out shorter documents", low=1, high=2**40)
    max_chars: int | None = option(None, "leave out longer documents", low=1, high=2**40)
    encoder: str | None = option(None, "encoder; chars: one token per character; null: train one on the text")
    vocab_size: int | None = option(
        None,
        "vocabulary size of a new encoder; null: 8192, or as many as the text gives", low=258, high=encoders.MAX_VOCAB
    )
    validation_share: float = option(0.1, "share of the tokens for validation", above=0, below=1)
    seed: int = option(0, "seed of the shuffle and of the split", low=0, high=2**31 - 1)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.files:
            yield "files", "must name at least one"
        if self.weights is not None and len(self.weights) != len(self.files):
            yield "weights", f"must be as many as files, {len(self.files)}"
        if self.max_chars is not None and self.max_chars < self.min_chars:
            yield "max_chars", f"must be >= min_chars ({self.min_chars})"
        if self.encoder is not None and self.vocab_size is not None:
            yield "vocab_size", "is that of an encoder to be trained, and encoder names one; leave one of them out"


class DocumentStore:
    """Documents on disk. Each keeps the pieces in which it was read, so that their tokens are those of the whole
    document.
    """

    def __init__(self, folder: Path):
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by close)
        self.ends = array("Q", [0])  # of the pieces, in bytes
        self.first = array("Q", [0])  # index of each document's first piece; the last entry is for the next document

    def __len__(self) -> int:
        return len(self.first) - 1

    def write(self, piece: str) -> None:
        """Append a piece to the document that is being read."""
        self.ends.append(self.ends[-1] + self.file.write(piece.encode("utf-8", "surrogatepass")))

    def commit(self) -> None:
        """End the current document."""
        self.first.append(len(self.ends) - 1)

    def rollback(self) -> None:
        """Remove the pieces of the current document."""
        del self.ends[self.first[-1] + 1 :]
        self.file.seek(self.ends[-1])
        self.file.truncate()

    def read_pieces(self, document: int) -> Iterator[tuple[str, bool]]:
        """Yield (text, whether it is the document's last piece)."""
        first, stop = self.first[document], self.first[document + 1]
        for i in range(first, stop):
            self.file.seek(self.ends[i])
            data = self.file.read(self.ends[i + 1] - self.ends[i])
            yield data.decode("utf-8", "surrogatepass"), i == stop - 1

    def size(self, document: int) -> int:
        """Bytes of a document."""
        return self.ends[self.first[document + 1]] - self.ends[self.first[document]]

    def close(self) -> None:
        self.file.close()


class DocumentCollector:
    """Reads files into a DocumentStore, without the documents that the recipe excludes. .left_out counts them by
    reason.

    .sources[i] is the index of document i's entry in recipe.files.
    """

    def __init__(self, recipe: Recipe, store: DocumentStore, near_duplicates: NearDuplicates | None):
        self.recipe, self.store, self.near_duplicates = recipe, store, near_duplicates
        self.left_out = {"exact_duplicates": 0, "near_duplicates": 0, "too_short": 0, "too_long": 0,
                         **dict.fromkeys(LEFT_OUT_REASONS, 0)}  # fmt: skip
        self.sources = array("I")
        self.seen: set[bytes] = set()

    def read(self, source: int, documents: Documents, progress: Callable[[int], object]) -> None:
        documents.scan(progress)
        chars, digest, pieces = 0, hashlib.sha256(), []
        for piece, last in encoders.cut_pieces(documents.read(progress=progress), encoding.PIECE):
            chars += len(piece)
            if piece and chars <= self.longest:
                self.store.write(piece)
                digest.update(piece.encode("utf-8", "surrogatepass"))
                if self.near_duplicates and chars <= MAX_COMPARED_CHARS:
                    pieces.append(piece)
            if last:
                self.finish(source, chars, digest.digest(), "".join(pieces) if chars <= MAX_COMPARED_CHARS else None)
                chars, digest, pieces = 0, hashlib.sha256(), []
        for name, reason in LEFT_OUT_REASONS.items():
            self.left_out[name] += documents.count_left_out(reason)
        for note in documents.notes():
            print(note, file=sys.stderr)

    @property
    def longest(self) -> float:
        return self.recipe.max_chars or math.inf

    def finish(self, source: int, chars: int, digest: bytes, text: str | None) -> None:
        """At the end of a document: commit it, or roll it back and count the reason."""
        exact = self.recipe.deduplicate != "none"
        reasons = {
            "too_short": chars < self.recipe.min_chars,
            "too_long": chars > self.longest,
            "exact_duplicates": exact and digest[:16] in self.seen,
        }
        for reason, holds in reasons.items():
            if holds:
                self.left_out[reason] += 1
                self.store.rollback()
                return
        self.store.commit()
        self.sources.append(source)
        if exact:
            self.seen.add(digest[:16])
        if self.near_duplicates:
            self.near_duplicates.add(text)


Span = tuple[int, int]  # start and end, in tokens of the spool


def count_copies(sources: np.ndarray, weights: list[float], seed: int) -> np.ndarray:
    """The number of copies of each document, (n,), by the weight of its file.

    A weight of 2.25 takes each document twice, and a quarter of the documents (rounded up) a third time.
    """
    times = np.zeros(len(sources), np.int64)
    for source, weight in enumerate(weights):
        own = np.flatnonzero(sources == source)
        more = math.ceil(round((weight % 1) * len(own), 6))
        times[own] = int(weight)
        times[own[permutation(len(own), seed)[:more]]] += 1
    return times


def split_documents(spans: list[Span], share: float, seed: int) -> tuple[list[Span | None], list[Span]]:
    """(training span of each document or None, validation spans). Whole documents are drawn at random for validation,
    until they have that share of the tokens.

    A document that exceeds the share's total is not drawn. If the drawn documents have less than half the share,
    because documents are few or long, the end of the longest document is used for validation instead.

    >>> split_documents([(0, 100)], 0.1, seed=0)
    ([(0, 90)], [(90, 100)])
    """
    lengths = [end - start for start, end in spans]
    wanted, drawn = share * sum(lengths), 0
    training: list[Span | None] = list(spans)
    validation = []
    for i in permutation(len(spans), seed).tolist():
        if len(validation) < len(spans) - 1 and drawn + lengths[i] <= max(wanted, 1):
            validation.append(spans[i])
            training[i], drawn = None, drawn + lengths[i]
    if drawn >= wanted / 2:
        return training, validation
    longest = int(np.argmax(lengths))
    start, end = spans[longest]
    middle = min(max(end - max(math.ceil(wanted), 1), start + 1), end)
    return [*spans[:longest], (start, middle), *spans[longest + 1 :]], [(middle, end)]


class ProgressFile:
    """Writes the progress of the current phase to a file, at most twice a second: {"phase": "reading", "done": 0.31}.
    """

    def __init__(self, path: Path):
        self.path, self.written_at = path, 0.0
        self.phase = ""

    def begin(self, phase: str, total: float = 1) -> ProgressFile:
        self.phase, self.total, self.n, self.written_at = phase, max(total, 1e-9), 0.0, 0.0
        self.add(0)
        return self

    def add(self, n: float) -> None:
        self.set(self.n + n)

    def set(self, n: float) -> None:
        self.n = n
        if time.monotonic() - self.written_at > 0.5:
            self.written_at = time.monotonic()
            status = {"phase": self.phase, "done": round(min(self.n / self.total, 1), 4)}
            with contextlib.suppress(UserError):  # other writes report a full disk
                atomic_write(self.path, json.dumps(status).encode())


def check_files(recipe: Recipe, paths: Iterable[Path], folder: Path, recipe_file: str | None) -> None:
    """Raises UserError if the dataset would overwrite one of its input files or an unrelated file."""
    outputs = [Output("FOLDER", folder / name, kind) for name, kind in KINDS.items()]
    inputs = [Input("files", path) for path in paths] + encoder_inputs("encoder", recipe.encoder or "chars")
    check_outputs(outputs, inputs + [Input("RECIPE.json", recipe_file)] * bool(recipe_file))


def assemble(recipe: Recipe, folder: Path, recipe_file: str | None = None) -> dict:
    """Assemble the dataset in `folder`. Writes result.json last and returns its contents. Raises UserError if no text
    is left.
    """
    began, progress = time.perf_counter(), ProgressFile(folder / PROGRESS)
    previous = find_previous(Output("FOLDER", folder / name, kind) for name, kind in KINDS.items())
    found = [expand_inputs([name], "files", leave_out=previous) for name in recipe.files]
    check_files(recipe, (file.path for files in found for file in files), folder, recipe_file)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(DocumentStore(folder)))
        near_duplicates = None
        if recipe.deduplicate == "near":
            near_duplicates = stack.enter_context(contextlib.closing(NearDuplicates(folder, recipe.similarity)))
        collector = DocumentCollector(recipe, store, near_duplicates)
        size = sum(file.size for inputs in found for file in inputs)
        advance = progress.begin("reading", 2 * size).add  # each file is read twice: to check it, and for its documents
        for source, inputs in enumerate(found):
            collector.read(source, Documents(inputs, errors=recipe.errors, mend='"errors": "replace"'), advance)
        out = np.zeros(len(store), bool)
        if near_duplicates:
            out = near_duplicates.find(progress.begin("comparing").set)
            collector.left_out["near_duplicates"] = int(out.sum())
        kept = np.flatnonzero(~out)
        times = np.zeros(len(store), np.int64)
        times[kept] = count_copies(np.array(collector.sources)[kept], recipe.weights or [1.0] * len(found), recipe.seed)
        if not times.any():
            reasons = ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in collector.left_out.items() if n)
            names = ", ".join(recipe.files[:5]) + (", …" if len(recipe.files) > 5 else "")
            raise UserError(f"no text is left of the files (left out: {reasons or 'nothing; they are empty'}): {names}")
        selected = np.flatnonzero(times)
        progress.begin("making the encoder")
        encoder = make_encoder(recipe, store, selected, folder)
        result = write_dataset(recipe, store, selected, times[selected], encoder, folder, progress)
    result |= {"left_out": collector.left_out, "seconds": round(time.perf_counter() - began, 2)}
    atomic_write(folder / RESULT, json.dumps(result, indent=1).encode())
    return result


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of a process that was killed."""
    for name in KINDS:
        for path in folder.glob(f".{name}.*.tmp"):
            if path.name.removeprefix(f".{name}.").removesuffix(".tmp").isdigit():
                path.unlink()


def make_encoder(recipe: Recipe, store: DocumentStore, selected: np.ndarray, folder: Path) -> encoders.Encoder:
    """The encoder that the recipe names, or one built from the texts. Saves a copy of it beside the tokens."""
    if recipe.encoder == "chars":
        chars = set()
        for document in selected:
            for piece, _ in store.read_pieces(int(document)):
                chars.update(piece)
        encoder = encoders.from_characters(chars)
    elif recipe.encoder is not None:
        encoder = encoders.load(recipe.encoder)
    else:
        exact = recipe.vocab_size is not None
        texts = read_training_text(store, selected, recipe.seed)
        encoder = encoders.train(texts, recipe.vocab_size or 8192, exact=exact)
    encoder.save(folder / ENCODER)
    return encoder


def read_training_text(store: DocumentStore, selected: np.ndarray, seed: int) -> Iterator[str]:
    """Yield the documents in shuffled order, up to MAX_TRAINING_CHARS characters in total."""
    left = encoding.MAX_TRAINING_CHARS
    for document in selected[permutation(len(selected), seed)].tolist():
        for piece, _ in store.read_pieces(document):
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                return


def write_dataset(
    recipe: Recipe,
    store: DocumentStore,
    selected: np.ndarray,
    times: np.ndarray,
    encoder,
    folder: Path,
    progress: ProgressFile,
) -> dict:
    """Encode the documents `selected` and write the token file; times[i] is the number of copies of selected[i] in the
    training split. Returns this part of result.json.
    """
    progress.begin("encoding", sum(store.size(document) for document in selected.tolist()))

    def read_pieces() -> Iterator[tuple[str, bool]]:
        for document in selected.tolist():
            yield from store.read_pieces(document)
            progress.add(store.size(document))

    digest = hashlib.sha256(json.dumps(dataclasses.asdict(recipe), sort_keys=True).encode()).hexdigest()
    with (
        TokenFileWriter(folder / TOKENS, encoder, digest) as writer,
        Spool(folder, writer.dtype) as spool,
    ):
        n_bytes = encode_documents(read_pieces(), encoder, spool)
        spans = [spool.find_span(i) for i in range(spool.n_documents)]
        training, validation = split_documents(spans, recipe.validation_share, recipe.seed)
        progress.begin("writing", spool.n_tokens)
        for i in repeat_shuffled(training, times, recipe.seed):
            append_tokens(writer, spool, training[i], progress)
        n_train, n_train_documents = writer.n_tokens, writer.n_documents
        for span in validation:
            append_tokens(writer, spool, span, progress)
    return {
        "documents": len(selected),
        "bytes": n_bytes,
        "tokens": writer.n_tokens,
        "training": {"documents": n_train_documents, "tokens": n_train},
        "validation": {"documents": len(validation), "tokens": writer.n_tokens - n_train},
        "data_division": (n_train - 0.5) / writer.n_tokens,  # TokenFile.find_boundary rounds up, to n_train
        "encoder": {"vocab_size": encoder.vocab_size, "fingerprint": encoder.fingerprint},
    }


def repeat_shuffled(training: list[Span | None], times: np.ndarray, seed: int) -> Iterable[int]:
    """The indexes of the documents in the training split, each repeated `times` times, shuffled."""
    trains = np.array([span is not None for span in training])
    repeated = np.repeat(np.flatnonzero(trains), times[trains])
    return repeated[permutation(len(repeated), seed)].tolist()


def append_tokens(writer: TokenFileWriter, spool: Spool, span: Span, progress: ProgressFile) -> None:
    for tokens, last in spool.read(*span):
        writer.add(tokens, last)
        progress.add(len(tokens))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    keys = [f"  {name} = {show(key.default)}: {key.doc} [{key.allowed}]" for name, key in declared(Recipe).items()]
    parser = ArgumentParser(
        "-m strawberry.data.assemble",
        "Mix, deduplicate, encode and split texts into one token file.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["the keys of a recipe:", *keys]),
    )
    parser.add_argument("recipe", help="a JSON file that says what is mixed")
    parser.add_argument("folder", type=Path, help="where tokens.bin, encoder.bin and result.json are written")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    recipe, problems = check(Recipe, read_json(arguments.recipe))
    if problems:
        raise UserError(f"{arguments.recipe}: " + "\n  ".join(problems))
    folder = arguments.folder
    try:
        result = assemble(recipe, folder, arguments.recipe)
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror or error}") from error
    left_out = ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in result["left_out"].items() if n)
    print(
        f"{folder / TOKENS}: {format_count(result['documents'], 'document')}, {result['tokens']:,} tokens, of which "
        f"{result['validation']['tokens']:,} validate; data_division {result['data_division']:.6f}"
        + (f"; left out: {left_out}" if left_out else "")
    )


if __name__ == "__main__":
    run_cli(main)
