"""What a run reports when the disk is full too: a file of fixed size, allocated before the run, overwritten in place.

Who starts the run calls `allocate(path)`, names the file in the environment variable STRAWBERRY_STATUS, and calls
`read(path)` whenever it likes. Without that variable nothing is written.
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
    """Write the empty file through to the disk, so that its blocks are there. Raises OSError where they are not."""
    with open(path, "wb") as file:
        file.write(b" " * SIZE)
        file.flush()
        os.fsync(file.fileno())


def read(path: str | os.PathLike) -> dict:
    """What the run has reported; empty where it has reported nothing, or is writing just now."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(Path(path).read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


class StatusFile:
    """The writing side. `warnings` are [number, text]: the last few, numbered from 1.

    A warning that differs from an earlier one in its numbers only is not a new one until something was saved again.
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
        """`step` and `saved`: the step reached and the newest checkpoint's. `error`: what ends the run."""
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
