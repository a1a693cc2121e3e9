"""What every command shares: errors, how a program ends, whole files, words of a message."""

from __future__ import annotations

import contextlib
import datetime
import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake that the user can mend: the message names the value, the limit and the mend."""


def run_cli(main: Callable[[list[str]], int | None]) -> None:
    """Run `main(argv)` as a program and exit: 2 with `error: …` on a UserError, 130 on Ctrl-C, else what it returns."""
    for stream in (sys.stdout, sys.stderr):
        set_encoding(stream)
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except UserError as error:
        with contextlib.suppress(OSError):  # a log on a full disk
            report_error(str(error))
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader (`| head`) left: point stdout elsewhere, or the exit's flush complains again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def temporary_path(target: Path) -> Path:
    """Where a file is written before it gets its name."""
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def set_encoding(stream: Any) -> None:
    """UTF-8 for what goes to a file or a pipe, whatever the locale or PYTHONIOENCODING says. A terminal keeps its own
    encoding, and shows "?" for a character that it lacks."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")


def report_error(message: str) -> None:
    """Print `error: message` on stderr. Of several processes of torchrun that find the same error, one prints it."""
    if is_first_to_report(message):
        print(f"error: {message}", file=sys.stderr)


def is_first_to_report(message: str) -> bool:
    """Whether no other process that this machine's torchrun has started has reported the message before this one.

    Every rank finds the same mistake in a config, but a full GPU may be an error of one rank alone, and torchrun ends
    all ranks when the first one fails. So the first one to find an error reports it, and torchrun's own store counts.
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
    except Exception:  # without the store, an error printed twice is better than one that nobody sees
        return True


def atomic_write(path: str | os.PathLike, data: bytes | Callable) -> None:
    """Replace the file at `path` with `data`, or with what `data(file)` writes, wholly or not at all, through power
    cuts too. Makes missing folders.

    Raises UserError, naming the path, where it cannot be written.
    """
    target = Path(os.path.realpath(path))  # through a symbolic link, which stays one
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
        if os.name != "nt":  # the rename itself is on disk once the folder is
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
    """The hint for a misspelt name, or nothing.

    >>> nearest("n_layers", ["n_layer", "n_head"])
    " (did you mean 'n_layer'?)"
    """
    by_lower = {str(v).lower(): str(v) for v in valid}
    close = difflib.get_close_matches(str(name).lower()[:200], by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
NO_PATH = "a path has no control characters, which \\n and \\t in quotes are; write / or \\\\ instead of \\"


def has_control_character(path: str) -> bool:
    r"""Whether a path has a character that none has on purpose; "C:\table" in JSON has one, for \t is a tab."""
    return CONTROL.search(path) is not None


def check_path_arguments(given: Any, *names: str) -> None:
    """Raises UserError where an option of an argparse namespace, or one of its texts, cannot be a path."""
    for name in names:
        value = getattr(given, name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and has_control_character(text):
                raise UserError(f"--{name} {show(text)}: {NO_PATH}")


def show(value: Any) -> str:
    """A value as JSON spells it, short enough for a message, in characters that every stream can carry."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    text = CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)  # those that JSON does not escape
    return text if len(text) <= 80 else text[:77] + "…"
