"""Uploaded files: data/files/<id>/content.jsonl.gz, say, and what is known of it."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import re
import shutil
import threading
import time
import zlib
from pathlib import Path

from strawberry.common import show
from strawberry.serving.id_directory import IdDirectory, RequestError, new_id, read_job_file, write_job_file

# What may be uploaded, by the end of its name: a document, or a list of documents. This is the only place that knows.
TEXT_KINDS = """
    txt text md markdown rst adoc org tex log srt html htm xml css toml yaml yml ini cfg sql
    py pyi js mjs ts jsx tsx c h cc cpp cxx hh hpp hxx cu cuh cs java kt scala go rs swift rb php pl lua r jl hs ml ex
    erl clj lisp el vim sh bash zsh ps1 bat
"""


TEXT_SUFFIXES = tuple(f".{kind}" for kind in TEXT_KINDS.split())
LIST_SUFFIXES = {".json": ".json", ".jsonl": ".jsonl", ".ndjson": ".jsonl", ".jsonlines": ".jsonl"}  # → stored as
SUFFIXES = (*TEXT_SUFFIXES, *LIST_SUFFIXES)
MAX_FILENAME = 255  # characters
PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")


class Upload:
    """A file on its way in: write(data) …, then finish() or abort()."""

    def __init__(self, uploads: Uploads):
        self.uploads, self.size, self.hash = uploads, 0, hashlib.sha256()
        try:
            self.folder = uploads.directory.make_temporary()
            self.file = open(self.folder / "content", "xb")  # noqa: SIM115 (closed by finish and abort)
        except OSError as error:
            raise RequestError(507, f"the file cannot be stored: {error.strerror}") from error

    def write(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > self.uploads.limit:
            raise size_error(self.uploads.limit)
        self.hash.update(data)
        try:
            self.file.write(data)
        except OSError as error:
            raise RequestError(507, f"the file cannot be stored: {error.strerror}") from error

    def finish(self, name: str, purpose: str) -> dict:
        """Give it an id; returns what is known of it."""
        name, suffix = clean_filename(name), stored_suffix(name)
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            if suffix.endswith(".gz"):
                check_gzip(self.folder / "content", self.uploads.limit)
            os.rename(self.folder / "content", self.folder / f"content{suffix}")
            about = {
                "id": new_id("file"),
                "filename": name,
                "bytes": self.size,
                "purpose": purpose,
                "suffix": suffix,
                "sha256": self.hash.hexdigest(),
                "created": time.time(),
            }
            write_job_file(self.folder, about)
            return self.uploads.add(self.folder, about)
        except OSError as error:
            raise RequestError(507, f"the file cannot be stored: {error.strerror or error}") from error

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def size_error(limit: int, what: str = "the file") -> RequestError:
    told = f"{what} is larger than {limit:,} bytes, the limit of this server (--max_upload): cut it up"
    return RequestError(413, told, "file", "file_too_large")


def clean_filename(name: str) -> str:
    """The last part of a path as clients send it. It is only shown: the file system never sees it."""
    name = re.split(r"[/\\]", name)[-1]
    if not name or len(name) > MAX_FILENAME or not name.isprintable():
        told = f"must have 1 to {MAX_FILENAME} printable characters"
        raise RequestError(400, f"the file's name {show(name)} {told}; rename it", "file")
    return name


def stored_suffix(name: str) -> str:
    """The suffixes by which prepare.py will know what is in it; a name without any is a text's.

    >>> stored_suffix("notes.MD"), stored_suffix("chat.ndjson.gz"), stored_suffix("LICENSE")
    ('.md', '.jsonl.gz', '.txt')
    """
    lower = name.lower()
    stem, packed = (lower.removesuffix(".gz"), ".gz") if lower.endswith(".gz") else (lower, "")
    suffix = Path(stem).suffix or ".txt"
    if suffix not in SUFFIXES:
        allowed = f"must end in {', '.join(SUFFIXES)}, or in one of these and .gz, or have no ending"
        raise RequestError(400, f"the file's name {show(name)} {allowed}; rename it if it is text", "file", "file_kind")
    return LIST_SUFFIXES.get(suffix, suffix) + packed


def check_gzip(path: Path, limit: int) -> None:
    """Unpack it, a piece at a time and to nowhere, up to the limit."""
    size = 0
    try:
        with gzip.open(path) as file:
            while data := file.read(1 << 20):
                size += len(data)
                if size > limit:
                    raise size_error(limit, "the file unpacked")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(400, f"the file is not a whole gzip file ({error}): pack it again", "file") from error


class Uploads:
    """The uploaded files. Everything about them is in memory too, but their content."""

    def __init__(self, root: Path, limit: int):
        self.directory, self.limit, self.lock = IdDirectory(root, "file", "file"), limit, threading.Lock()
        self.known: dict[str, dict] = {}
        for name in self.directory.names():
            with contextlib.suppress(OSError, ValueError):
                about = read_job_file(self.directory.folder(name))
                self.known[about["id"]] = about

    def add(self, folder: Path, about: dict) -> dict:
        with self.lock:
            self.directory.publish(folder, about["id"])
            self.known[about["id"]] = about
        return about

    def get(self, name: str, param: str | None = None) -> dict:
        self.directory.folder(name, param)
        if name not in self.known:
            raise RequestError(404, f"there is no file {show(name)}", param or "id", "not_found")
        return self.known[name]

    def path(self, name: str, param: str | None = None) -> Path:
        """Where the content is. A link in its place is nothing that this program made."""
        path = self.directory.folder(name, param) / f"content{self.get(name, param)['suffix']}"
        if path.is_symlink() or not path.is_file():
            raise RequestError(404, f"the content of the file {name} is gone", param or "id", "not_found")
        return path

    def all(self) -> list[dict]:
        """The newest first."""
        with self.lock:
            return sorted(self.known.values(), key=lambda about: (-about["created"], about["id"]))

    def remove(self, name: str) -> None:
        self.get(name)
        with self.lock:
            self.known.pop(name, None)
            self.directory.remove(name)
