"""A run's status file, which can be written even on a full disk: it has a fixed size, is allocated before the run, and
is overwritten in place.

The process that starts the run calls `allocate(path)`, sets the environment variable STRAWBERRY_STATUS to the path, and
calls `read(path)` at any time. Without that variable nothing is written.
"""

import contextlib
import json
import os
import re
from pathlib import Path

VARIABLE = "STRAWBERRY_STATUS"
SIZE = 4096  # bytes
MAX_WARNINGS = 8
MAX_LENGTH = 400  # characters of a warning


def allocate(path: str | os.PathLike) -> None:
    """Write the empty file and sync it, so that its disk blocks are allocated. Raises OSError if that fails."""
    with open(path, "wb") as file:
        file.write(b" " * SIZE)
        file.flush()
        os.fsync(file.fileno())


def read(path: str | os.PathLike) -> dict:
    """The run's latest report; empty if it has reported nothing, or is writing the file at this moment."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(Path(path).read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


class StatusFile:
    """The writer. `warnings` is a list of [number, text], numbered from 1, with the newest MAX_WARNINGS only.

    A warning that differs from an earlier one only in its digits is dropped, until the next checkpoint is saved.
    """

    def __init__(self, path: str | None):
        self.path, self.values = path, {"warnings": []}
        self.n_warnings, self.known = 0, set()

    def warn(self, text: str) -> None:
        kind = re.sub(r"\d+", "0", text)
        if kind in self.known:
            return
        self.known.add(kind)
        self.n_warnings += 1
        warnings = [*self.values["warnings"], [self.n_warnings, text[:MAX_LENGTH]]]
        self.update(warnings=warnings[-MAX_WARNINGS:])

    def update(self, **values) -> None:
        """Write new values. `step` and `saved`: the current step and the newest checkpoint's. `error`: the error that
        ends the run."""
        if "step" in values and values["step"] == values["saved"]:
            self.known.clear()
        self.values |= values
        if self.path is None:
            return
        data = json.dumps(self.values).encode()
        while len(data) > SIZE and self.values["warnings"]:
            self.values["warnings"].pop(0)
            data = json.dumps(self.values).encode()
        with contextlib.suppress(OSError), open(self.path, "r+b", buffering=0) as file:
            file.write(data[:SIZE].ljust(SIZE))
