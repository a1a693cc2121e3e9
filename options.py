"""Configuration: every key of the JSON files, declared once.

A config is a dataclass whose fields are made with `option(default, doc, bounds …)`. Type (the annotation), default,
bounds and meaning stand there and nowhere else; validation, `train.py --help`, the README's table and
config/schema.json are all made from them.

Index:  shared helpers · declaring · reading JSON · checking · the run's keys · loading · help, table and schema
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# ---- shared helpers ------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can mend: the message names the value, the limit and the mend."""


def run_cli(main: Callable[[list[str]], int | None]) -> None:
    """Run `main(argv)` as a program and exit: 2 with `error: …` on a UserError, 130 on Ctrl-C, else what main returns."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows "?" instead of a traceback
            stream.reconfigure(errors="replace")
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader (`| head`) left: point stdout elsewhere, or the exit's flush complains again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def atomic_write(path: str | os.PathLike, data: bytes) -> None:
    """Replace the file at `path` with `data`, wholly or not at all, through power cuts too. Makes missing folders.

    Raises UserError, naming the path, where it cannot be written.
    """
    target = Path(os.path.realpath(path))  # through a symbolic link, which stays one
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if target.exists() and not target.is_file():
        raise UserError(f"cannot write {path}: it is there and is not a regular file; name another path")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
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


# ---- declaring -----------------------------------------------------------------------------------------------------


def option(default: Any, doc: str, *, low=None, high=None, above=None, below=None, choices=None) -> Any:
    """A dataclass field with its meaning and bounds: low and high inclusive, above and below exclusive.

    On a list the bounds hold for each item; a list, dict or dataclass given as default is copied for each instance.
    `choices` are the valid strings (other types in the annotation are bounded as usual: `int | str`, choices ["auto"]).
    """
    metadata = {"doc": doc, "low": low, "high": high, "above": above, "below": below, "choices": choices}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    if dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: dataclasses.replace(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
