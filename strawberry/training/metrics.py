"""metrics.jsonl: every logged step and every evaluation, one JSON object per line."""

import json
import math
from pathlib import Path

from strawberry.common import atomic_write
from strawberry.training import plot
from strawberry.training.console import warn
from strawberry.training.loggers import Loggers

METRICS = "metrics.jsonl"


class Metrics:
    """metrics.jsonl: one JSON object per line, in order of steps. If the disk is full, lines are kept in memory and
    written later. `loggers` are given each line too."""

    def __init__(self, path: Path):
        self.path, self.pending, self.loggers = path, [], Loggers()

    def rewind(self, step: int) -> list[dict]:
        """Remove the lines that an interrupted run logged after `step`, since these steps will be repeated. Returns the
        remaining lines."""
        lines = plot.read_metrics(self.path) if self.path.exists() else []
        kept = [line for line in lines if line["step"] <= step]
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.loggers.rewind(kept)
        return kept

    def add(self, **values) -> None:
        line = {key: to_json_value(value) for key, value in values.items()}
        self.pending.append(json.dumps(line) + "\n")
        try:
            with open(self.path, "ab") as file:
                end = file.tell()
                try:
                    file.write("".join(self.pending).encode())
                    file.flush()
                except OSError:
                    file.truncate(end)  # no partial line
                    raise
            self.pending = []
        except OSError as error:
            warn(f"cannot write {self.path} ({error.strerror}); its lines are kept and written later")
        self.loggers.add(line, lambda: plot.read_metrics(self.path))


def to_json_value(value):
    """The value, or None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
