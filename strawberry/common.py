"""Functions that every command shares: errors, exit codes, atomic writes, parts of messages."""

from __future__ import annotations

import contextlib
import datetime
import difflib
import errno
import gc
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from strawberry import startup


class UserError(Exception):
    """An error that the user can fix: the message names the value, the limit and the fix."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in the place of a traceback."""
        return [f"error: {self}"]


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]


def run_cli(main: Callable[[list[str]], int | None], handles_signals: bool = False) -> None:
    """Run `main(argv)` as a program and exit: code 2 with `error: …` on a UserError, and where a file lacks rights or
    its disk room; 130 on Ctrl-C, 141 on a broken pipe, otherwise the value that `main` returns.

    handles_signals: `main` installs handlers itself, and until then a signal ends the program at once.
    """
    startup.replace_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        set_encoding(stream)
    try:
        try:
            if not handles_signals:
                startup.restore_handlers()
            gc.freeze()  # what is imported stays in use: collections skip it
            code = main(sys.argv[1:]) or 0
            sys.stdout.flush()
        finally:
            startup.exit_on(*startup.replaced)  # a second Ctrl-C, or one while the interpreter shuts down
    except UserError as error:
        with contextlib.suppress(OSError):  # a log on a full disk
            report_error(str(error))
        code = 2
    except KeyboardInterrupt as interrupt:
        print(f"{startup.start_line()}{str(interrupt) or 'interrupted'}", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader (`| head`) exited; the flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        if error.errno not in FIXES:
            raise
        with contextlib.suppress(OSError):
            report_error(f"{error.filename or 'cannot write'}: {error.strerror}; {FIXES[error.errno]}")
        if error.errno == errno.ENOSPC:  # of `> log`, maybe; the flush at exit must not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 2
    gc.freeze()  # the interpreter's last collection skips all: the process's end frees it
    sys.exit(code)


# What a user can do about errors of the system that no command expects at the file at which they occur.
RIGHTS = "change its rights, or name another path"
FIXES = {errno.EACCES: RIGHTS, errno.EPERM: RIGHTS, errno.EROFS: "name a path on another disk",
         errno.ENOSPC: "free some space, or name a path on another disk",
         errno.EDQUOT: "free some space, or name a path on another disk",
         errno.EMFILE: "allow more open files (ulimit -n), or close other programs",
         errno.ENAMETOOLONG: "name a shorter path", errno.EIO: "check the disk"}  # fmt: skip


def temporary_path(target: Path) -> Path:
    """The path at which a file is written before it is renamed to `target`."""
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def set_encoding(stream: Any) -> None:
    """Set a file's or pipe's encoding to UTF-8, independent of the locale and PYTHONIOENCODING. A terminal keeps its
    encoding, and shows "?" for characters that it cannot encode."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")


def report_error(message: str) -> None:
    """Print `error: message` on stderr. If several torchrun processes find the same error, one of them prints it."""
    if is_first_to_report(message):
        print(f"error: {message}", file=sys.stderr)


def is_first_to_report(message: str) -> bool:
    """Whether this process is the first to report the message, among those of this machine's torchrun.

    Every rank finds the same mistake in a config, but running out of GPU memory may affect one rank only, and torchrun
    terminates all ranks when the first one fails. So the first rank to find an error reports it; a counter in
    torchrun's store decides which one that is.
    """
    env = os.environ
    if env.get("WORLD_SIZE", "1") == "1" or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        from torch.distributed import TCPStore

        limit = datetime.timedelta(seconds=5)
        store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), wait_for_workers=False, timeout=limit)
        launch = f"{env.get('GROUP_RANK')}/{env.get('TORCHELASTIC_RESTART_COUNT')}"
        digest = hashlib.sha256(message.encode("utf-8", "backslashreplace")).hexdigest()
        return store.add(f"strawberry/error/{launch}/{digest}", 1) == 1
    except Exception:  # without the store, better to print an error twice than never
        return True


def atomic_write(path: str | os.PathLike, data: bytes | Callable) -> None:
    """Replace the file at `path` with `data`, or with the bytes that `data(file)` writes. The replacement is atomic,
    even if the power fails. Creates missing folders.

    Raises UserError, which names the path, if it cannot be written.
    """
    target = Path(os.path.realpath(path))  # replaces the target of a symbolic link, not the link
    temporary = temporary_path(target)
    if target.exists() and not target.is_file():
        raise UserError(f"cannot write {path}: it is there and is not a regular file; name another path")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            data(file) if callable(data) else file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        if os.name != "nt":  # the rename is on disk only after the folder is synced
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def nearest(name: str, valid: Iterable[str]) -> str:
    """The hint for a misspelled name; "" if no valid name is similar.

    >>> nearest("n_layers", ["n_layer", "n_head"])
    " (did you mean 'n_layer'?)"
    """
    by_lower = {str(v).lower().lstrip("-"): str(v) for v in valid}  # dashes make no option like another
    close = difflib.get_close_matches(str(name).lower().lstrip("-")[:200], by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def nearest_file(path: str | os.PathLike, is_folder: bool = False) -> str:
    """The hint for a misspelled file (or folder): one beside it with a similar name; "" if there is none."""
    folder, name = os.path.split(os.path.normpath(path) if is_folder else os.fspath(path))
    try:
        with os.scandir(folder or os.curdir) as entries:
            names = [entry.name for entry in entries if (entry.is_dir() if is_folder else entry.is_file())]
    except (OSError, ValueError):
        return ""
    return nearest(name, sorted(names))


def format_count(n: int, noun: str) -> str:
    """`1 file`, `2,000 files`."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
NO_PATH = "a path has no control characters, which \\n and \\t in quotes are; write / or \\\\ instead of \\"


def has_control_character(path: str) -> bool:
    r"""Whether a path has a control character, which is always a mistake: in JSON, the \t of "C:\table" is a tab."""
    return CONTROL.search(path) is not None


def check_path_arguments(given: Any, *names: str) -> None:
    """Raises UserError if one of these options of an argparse namespace, or a string in its list, has a control
    character and so cannot be a path."""
    for name in names:
        value = getattr(given, name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and has_control_character(text):
                raise UserError(f"--{name} {show(text)}: {NO_PATH}")


def show(value: Any) -> str:
    """A value in JSON notation for a message: at most 80 characters, all of which can be encoded as UTF-8."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    text = CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)  # control characters that JSON leaves as they are
    return text if len(text) <= 80 else text[:77] + "…"
