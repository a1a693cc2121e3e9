"""The console output of a run: a table of steps, evaluations, warnings; and streams that tolerate a full disk."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable

from tqdm import tqdm

from strawberry import status_file

STATUS = status_file.StatusFile(os.environ.get(status_file.VARIABLE))  # used if serve.py started the run
COLUMNS = {"step": 8, "loss": 8, "learning rate": 13, "grad norm": 9, "tokens/s": 10, "elapsed": 8, "remaining": 9}
HEADER_EVERY = 20  # printed lines


class Console:
    """Prints a run's output on stdout and flushes each line: a table with a row for each logged step, and evaluations.

    A progress bar is shown on stderr below the lines, only if stderr is a terminal. The table's header is printed again
    after HEADER_EVERY lines of any kind. Elapsed and remaining are wall-clock times since the first step of this
    process, including evaluations and checkpoints.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.since_header = HEADER_EVERY
        self.began: float | None = None  # time of the first step
        self.resumed, self.first_step = 0.0, 0  # start of the rate measurement: the first step, or the last rollback

    def start(self, step: int, total: int, hidden: bool) -> tqdm:
        """The progress bar of a run that continues after `step`."""
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
    """One line of the table, with right-aligned cells."""
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True))


def format_decimal(value: float) -> str:
    """Four decimals, or three significant digits for very small and large numbers: 0.1234, 1.23e-05."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1000 else f"{value:.3g}"


class DiskFullSafeStream:
    """A stream that does not raise an error on a full disk: text that cannot be written is lost, or is written when
    there is space again.

    Warnings, and the failure to write the stream, are also reported in STATUS.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        if text.startswith("warning: "):
            STATUS.warn(text.removeprefix("warning: ").strip())
        with self.report_disk_errors():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.report_disk_errors():
            self.stream.flush()

    @staticmethod
    @contextlib.contextmanager
    def report_disk_errors():
        try:
            yield
        except BrokenPipeError:  # the reader closed the pipe on purpose
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
