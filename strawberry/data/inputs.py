"""The files that a command line names: a file, a folder, a glob, a pipe or standard input.

    for file in expand_inputs(["book.txt", "notes/", "logs/*.jsonl.gz", "-"]):    # paths only, nothing is read
        with file.open() as stream:                                                # decompressed, any number of times
            ...

Each may be compressed with gzip. Pipes, FIFOs and "-" (standard input) are read once, into an unnamed temporary file.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import gzip
import io
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from strawberry.common import UserError, nearest_file

STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
PIECE = 1 << 20  # bytes per read


def ignore_progress(n_bytes: int) -> None:
    """The default progress callback, which does nothing."""


class CountedFile(io.FileIO):
    """A file that reports the number of bytes of each read."""

    def __init__(self, file: Path | int, progress: Callable[[int], object]):
        super().__init__(file)
        self.progress = progress

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self.progress(count)
        return count


class InputFile:
    """A file, a pipe or standard input. open() can be called any number of times.

    .path      the path; for standard input, /dev/stdin
    .name      the path within the folder that it was found in, with slashes: files of a folder are sorted by it
    .is_named  whether the user named it; otherwise it was found in a folder or by a glob
    """

    def __init__(self, path: str | os.PathLike, name: str = "", is_named: bool = True):
        is_stdin = os.fspath(path) in STANDARD_INPUT
        self.path, self.name, self.is_named = Path("/dev/stdin" if is_stdin else path), name or str(path), is_named
        self.label = "standard input" if is_stdin else str(path)
        self.is_stdin = is_stdin
        self._spool: BinaryIO | None = None

    def __repr__(self) -> str:
        return f"InputFile({self.label!r})"

    @property
    def is_stream(self) -> bool:
        """Whether it can be read only once: standard input, a pipe, a FIFO, a device."""
        return self.is_stdin or (self.path.exists() and not stat.S_ISREG(self.path.stat().st_mode))

    @property
    def size(self) -> int:
        """Bytes, without decompression. Reads a stream to its end."""
        with self._refuse_unreadable(), self._open_raw(ignore_progress) as raw:
            return os.fstat(raw.fileno()).st_size

    @contextlib.contextmanager
    def open(self, progress: Callable[[int], object] = ignore_progress) -> Iterator[io.BufferedIOBase]:
        """The bytes, decompressed if they are gzip. `progress` receives the number of bytes of each read from disk.

        A stream is spooled; files from simultaneous calls share one position in the spool.
        """
        with self._refuse_unreadable(), io.BufferedReader(self._open_raw(progress), 1 << 16) as stream:
            if self.path.suffix.lower() != ".gz" and stream.peek(2)[:2] != b"\x1f\x8b":
                yield stream
                return
            with gzip.GzipFile(fileobj=stream) as unpacked:
                yield unpacked

    @contextlib.contextmanager
    def _refuse_unreadable(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            message = f"{self.label} is not a whole gzip file ({error}): pack it again or leave it out"
            raise UserError(message) from error
        except OSError as error:
            raise UserError(f"cannot read {self.label}: {error.strerror or error}") from error

    def _open_raw(self, progress: Callable[[int], object]) -> CountedFile:
        if self._spool is None and self.is_stream:
            self._spool = self._copy_stream()
        if self._spool is None:
            try:
                return CountedFile(self.path, progress)
            except ValueError as error:  # the path contains a NUL
                raise OSError(errno.EINVAL, str(error)) from error
        self._spool.seek(0)
        return CountedFile(os.dup(self._spool.fileno()), progress)

    def _copy_stream(self) -> BinaryIO:
        """Copy the stream to an unnamed temporary file, which disappears when closed."""
        if self.is_stdin and sys.stdin is None:
            raise UserError("standard input is closed: name a file, or pipe some text in")
        source = contextlib.nullcontext(sys.stdin.buffer) if self.is_stdin else open(self.path, "rb")  # noqa: SIM115
        spool = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the input)
        try:
            with source as stream:
                shutil.copyfileobj(stream, spool, PIECE)
            spool.flush()
        except OSError as error:
            spool.close()
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(f"{tempfile.gettempdir()} has no space for {self.label}: set TMPDIR to a folder on a "
                            "larger disk") from error
        return spool


def expand_inputs(
    names: Iterable[str], option: str = "--input", leave_out: Iterable[str | os.PathLike] = ()
) -> list[InputFile]:
    """The files that the names refer to, each once: a file, a folder (all of it), a glob, or "-" for standard input.

    Files of a folder are sorted by name. Hidden files, links to folders and the paths in `leave_out` are left out. No
    file is opened. Raises UserError if a name matches nothing, or if there is no file in total.
    """
    names = list(names)
    hidden = {os.path.realpath(path) for path in leave_out}
    found: dict[str, InputFile] = {}
    for name in names:
        for file in _expand_name(name, option):
            known = found.setdefault(os.path.realpath(file.path), file)
            known.is_named |= file.is_named
    kept = [file for real, file in found.items() if real not in hidden]
    if not kept:
        raise UserError(f"{option} {' '.join(names)}: no files there" + " but those that are written" * bool(found))
    return kept


def _expand_name(name: str, option: str) -> Iterator[InputFile]:
    if name in STANDARD_INPUT or (os.path.exists(name) and not os.path.isdir(name)):
        yield InputFile(name, Path(name).name)
        return
    paths = [name] if os.path.exists(name) else sorted(glob.glob(os.path.expanduser(name), recursive=True))
    if not paths:
        if (problem := explain_missing(name)) is not None:
            raise UserError(f"{option} {name}: {problem}")
        raise UserError(f"{option} {name}: there is no such file or directory, and as a glob it matches nothing"
                        + nearest_file(name))  # fmt: skip
    is_named = not glob.has_magic(name) or os.path.exists(name)
    for path in map(Path, paths):
        if path.is_dir():
            yield from (InputFile(file, inner, is_named=False) for inner, file in walk_folder(path))
        else:
            yield InputFile(path, path.name, is_named)


def explain_missing(path: str) -> str | None:
    """Why a path cannot be looked up, such as the rights of its folder; None if it is missing."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        return f"cannot be read ({error.strerror}); change its rights, or name another path"
    return None


def walk_folder(root: Path, leave_out: Iterable[str] = ()) -> list[tuple[str, Path]]:
    """(name, path) of each regular file under a folder, sorted by name, without hidden files and folders and without
    folders whose names are in `leave_out`. Raises UserError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; change its rights, or name the others")

    files = []
    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in leave_out]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((file.relative_to(root).as_posix(), file) for file in files if file.is_file())
