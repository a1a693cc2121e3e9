"""What a run prints: a table of steps, evaluations, warnings; and streams that survive a full disk."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable

from tqdm import tqdm

from strawberry import status_file

STATUS = status_file.StatusFile(os.environ.get(status_file.VARIABLE))  # of a run that serve.py has started
COLUMNS = {"step": 8, "loss": 8, "learning rate": 13, "grad norm": 9, "tokens/s": 10, "elapsed": 8, "remaining": 9}
HEADER_EVERY = 20  # printed lines


class Console:
    """What a run prints on stdout, each line at once: a table with a row for each logged step, and its evaluations.

    On a terminal a bar stays on stderr, below the lines; it writes nothing to a file. The header of the table is
    printed again once HEADER_EVERY lines of any kind have followed it. Elapsed and remaining are wall-clock time from
    this start's first step on, evaluations and checkpoints included.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.since_header = HEADER_EVERY
        self.began: float | None = None  # of the first step
        self.resumed, self.first_step = 0.0, 0  # where the pace is counted from: there, or where a rollback led to

    def start(self, step: int, total: int, hidden: bool) -> tqdm:
        """The bar of a run that goes on after `step`."""
        self.resumed, self.first_step = time.monotonic(), step
        self.began = self.began or self.resumed
        style = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
        shown = {"bar_format": style, "mininterval": 0.2, "maxinterval": 60, "dynamic_ncols": True, "leave": False}
        return tqdm(total=total, initial=step, disable=hidden or self.quiet or not sys.stderr.isatty(), **shown)

    def print(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)  # above the bar
            sys.stdout.flush()
            self.since_header += text.count("\n") + 1

    def print_step(self, step: int, total: int, loss: float, lr: float, grad_norm: float, speed: float) -> None:
        now = time.monotonic()
        remaining = (now - self.resumed) / max(step - self.first_step, 1) * (total - step)
        times = (tqdm.format_interval(seconds) for seconds in (now - self.began, remaining))
        cells = (f"{step:,}", format_decimal(loss), f"{lr:.2e}", format_decimal(grad_norm), f"{speed:,.0f}", *times)
        if self.since_header >= HEADER_EVERY:
            self.print(format_row(COLUMNS))
            self.since_header = 0
        self.print(format_row(cells))


def format_row(cells: Iterable[str]) -> str:
    """One line of the table, each cell at the right end of its column."""
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True))


def format_decimal(value: float) -> str:
    """Four decimals, or four digits where these would not show the number: 0.1234, 1.234e-05"""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1000 else f"{value:.3g}"


class DiskFullSafeStream:
    """A stream whose full disk ends no run: what cannot be written is lost, or comes when there is room again.

    Warnings, and that the stream cannot be written, go to STATUS too.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        if text.startswith("warning: "):
            STATUS.warn(text.removeprefix("warning: ").strip())
        with self.sparing():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.sparing():
            self.stream.flush()

    @staticmethod
    @contextlib.contextmanager
    def sparing():
        try:
            yield
        except BrokenPipeError:  # its reader left on purpose
            raise
        except OSError as error:
            STATUS.warn(f"cannot write the log ({error.strerror}); lines of it are lost")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)


def format_bytes(n: float) -> str:
    """1_500_000_000 → 1.5 GB"""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if n >= scale:
            return f"{n / scale:,.1f} {unit}"
    return f"{n / 1e3:,.1f} kB"
