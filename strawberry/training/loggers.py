"""Copies of metrics.jsonl for TensorBoard and Weights & Biases, which the key `log_to` asks for.

metrics.jsonl remains the record of a run; a logger is given each of its lines. Its package is imported only here and
only if it is asked for. A logger that fails never stops a run: it gives one warning.

Index:  choosing · values · TensorBoard · Weights & Biases
"""

import contextlib
import html
import importlib
import json
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from strawberry.common import UserError, atomic_write, show
from strawberry.config import to_dict
from strawberry.training.console import warn

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"

# ---- choosing --------------------------------------------------------------------------------------------------------


class Loggers:
    """The loggers of a run, as one. A logger has rewind(lines), which sets its content to these lines of metrics.jsonl,
    add(line) and close(finished). `can_retry`: after a failure, the next evaluation rewinds it to all lines."""

    def __init__(self, loggers=()):
        self.working, self.failed = list(loggers), []

    def rewind(self, lines: list[dict]) -> None:
        self.each(self.working, lambda logger: logger.rewind(lines))

    def add(self, line: dict, read_lines) -> None:
        """Give a line to each logger. `read_lines()` returns all lines so far, this one included."""
        retried = [logger for logger in self.failed if logger.can_retry and "val_loss" in line]
        self.each(self.working, lambda logger: logger.add(line))
        self.each(retried, lambda logger: logger.rewind(read_lines()))

    def close(self, finished: bool) -> None:
        """finished: whether all steps are done. Closes each logger once."""
        working, self.working = self.working, []
        self.each(working, lambda logger: logger.close(finished))

    def each(self, loggers: list, act) -> None:
        """`act(logger)` for each. The first failure of a logger gives a warning."""
        for logger in list(loggers):
            try:
                act(logger)
                if logger in self.failed:
                    self.failed.remove(logger)
                    self.working.append(logger)
            except Exception as error:  # any error of a package: a full disk, a lost server, a bug
                if logger in self.working:
                    self.working.remove(logger)
                if logger not in self.failed:
                    self.failed.append(logger)
                    reason = " ".join(str(error).split()) or type(error).__name__
                    warn(f'log_to = "{logger.name}": {reason}; the run continues, and metrics.jsonl has every line')


def make_loggers(state) -> Loggers:
    """The loggers that `log_to` asks for. Writes nothing. Raises UserError if a package is missing, or if wandb has no
    API key."""
    return Loggers(LOGGERS[name](state) for name in dict.fromkeys(listed(state.run.log_to)))


def listed(log_to: str | list[str] | None) -> list[str]:
    return [log_to] if isinstance(log_to, str) else log_to or []


def import_package(name: str, module: str):
    """A module of the package `name`. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        reason = f"the package {name} is not installed" if missing else f"{name} cannot be imported ({error})"
        raise UserError(f'log_to = "{name}": {reason}: pip install {pinned(name)}') from error


def pinned(name: str) -> str:
    """`name==version` as in requirements.txt, or the name alone if that file is not there."""
    with contextlib.suppress(OSError):
        for line in REQUIREMENTS.read_text("utf-8").splitlines():
            if line.startswith(f"{name}=="):
                return line.split(";")[0].strip()
    return name


# ---- values ----------------------------------------------------------------------------------------------------------


def flatten(values: dict | list, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of each value, nested ones with a slash.

    >>> dict(flatten({"loss": 1.5, "loads": {"block_1": [3, 1]}}))
    {'loss': 1.5, 'loads/block_1/0': 3, 'loads/block_1/1': 1}
    """
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, (dict, list)):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def split_line(line: dict) -> tuple[dict[str, float], dict[str, str]]:
    """(numbers, texts) of a line of metrics.jsonl, without its step. Null, which stands for NaN, is left out."""
    flat = {name: value for name, value in flatten(line) if name != "step"}
    numbers = {name: value for name, value in flat.items() if isinstance(value, (int, float))}
    return numbers, {name: value for name, value in flat.items() if isinstance(value, str)}


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


class TensorBoard:
    """checkpoints.path/tensorboard: the same names, values and steps as metrics.jsonl, in one event file.

    A rewind writes a new file with the remaining lines and removes the older ones, so that no step is there twice. The
    file starts with an event after which a running TensorBoard forgets what it has read. TensorBoard has no axis of
    training seconds, so the times of rewritten lines lie as far apart as their steps in training.

    Events are written here, not by torch's SummaryWriter, in whose thread a full disk could not be handled.
    """

    name, can_retry = "tensorboard", True

    def __init__(self, state):
        self.folder, self.run, self.file = state.root / "tensorboard", state.run, None
        import_package("tensorboard", "tensorboard")
        self.summary = import_package("tensorboard", "torch.utils.tensorboard.summary")
        self.events = import_package("tensorboard", "tensorboard.compat.proto.event_pb2")

    def rewind(self, lines: list[dict]) -> None:
        with contextlib.suppress(OSError):  # the file of a failed logger has bytes that it cannot write
            self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        older = list(self.folder.glob("events.out.tfevents.*"))
        self.open()
        config = to_dict(self.run)
        flat = {name: show(None) if value is None else value for name, value in flatten(config)}
        now = time.time()
        for summary in self.summary.hparams(flat, {"loss": 0, "val_loss": 0, "val_bpb": 0}):  # columns of its table
            self.write(now, summary=summary)
        self.write(now, summary=self.summary.text("hyperparameters", as_code(json.dumps(config, indent=2))))
        shift = now - max((line.get("seconds") or 0 for line in lines), default=0)
        seconds = 0.0
        for line in lines:
            seconds = line.get("seconds") or seconds
            self.write_line(line, shift + seconds)
        self.file.flush()
        for path in older:
            path.unlink()

    def open(self) -> None:
        """Create the event file. Readers take a directory's files in the order of their names, by time."""
        writers = import_package("tensorboard", "tensorboard.summary.writer.record_writer")
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = open(self.folder / name, "wb")  # noqa: SIM115
        self.records = writers.RecordWriter(self.file)
        self.write(time.time(), file_version="brain.Event:2")
        self.write(time.time(), session_log=self.events.SessionLog(status=self.events.SessionLog.START))

    def add(self, line: dict) -> None:
        self.write_line(line, time.time())
        self.file.flush()

    def write_line(self, line: dict, at: float) -> None:
        numbers, texts = split_line(line)
        summaries = [self.summary.scalar(name, value) for name, value in numbers.items()]
        summaries += [self.summary.text(name, as_code(text)) for name, text in texts.items()]
        for summary in summaries:
            self.write(at, step=line["step"], summary=summary)

    def write(self, at: float, **content) -> None:
        """Write an event with its time, in seconds since 1970."""
        self.records.write(self.events.Event(wall_time=at, **content).SerializeToString())

    def close(self, finished: bool = False) -> None:
        file, self.file = self.file, None
        if file is not None:
            file.close()


def as_code(text: str) -> str:
    """A text as Markdown shows it unchanged: TensorBoard renders Markdown."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


# ---- Weights & Biases ------------------------------------------------------------------------------------------------


class WandB:
    """A run of Weights & Biases, with its local files in checkpoints.path/wandb.

    A resumed run continues under the same id. W&B cannot take lines back, so STATE has the last position of each kind
    of line that is in its files, and a resumed run sends only what comes after. Its process writes them once a second,
    and a kill loses what it has not written, so a line counts as written after WRITTEN_AFTER seconds; those after it
    may be sent twice. After a rollback the repeated steps are sent, since their values differ. Rows are drawn against
    `step`, a value of each row.
    """

    name, can_retry = "wandb", False  # its package tries again by itself, and gives up after minutes
    STATE = "run.json"
    WRITTEN_AFTER = 3.0

    def __init__(self, state):
        self.root, self.run, self.quiet = state.root, state.run, state.console.quiet
        self.logged, self.id, self.sent = None, None, {}  # sent: kind of line → its last position
        self.recent: deque[tuple[float, dict[str, int]]] = deque()  # what was sent before, with the time of the change
        self.package = import_package("wandb", "wandb")
        if self.package.setup().settings.mode == "online":
            try:
                self.package.login()  # asks for the key at a terminal
            except (self.package.errors.UsageError, self.package.errors.AuthenticationError) as error:
                raise UserError(f'log_to = "wandb": {error} Or set WANDB_MODE=offline.') from error

    def rewind(self, lines: list[dict]) -> None:
        if self.logged is None:
            self.open()
        else:  # a rollback
            last = lines[-1]["step"] if lines else -1
            self.sent = {kind: min(n, last) if kind != "rollback" else n for kind, n in self.sent.items()}
        for line in lines:
            self.add(line)

    def open(self) -> None:
        """Start the run, or continue the run of STATE if this one is resumed."""
        resumed = None
        if self.run.init_from == "resume":
            with contextlib.suppress(OSError, ValueError, KeyError):
                state = json.loads((self.root / "wandb" / self.STATE).read_bytes())
                self.id, self.sent, resumed = state["id"], state["sent"], "allow"
        self.id = self.id or secrets.token_hex(4)
        folder = str(self.root.resolve())  # its service process keeps the working directory of its start
        settings = self.package.Settings(
            console="off", silent=self.quiet, finish_timeout=300, x_transaction_log_flush_interval=1
        )
        self.logged = self.package.init(
            id=self.id, resume=resumed, dir=folder, config=to_dict(self.run), allow_val_change=True,
            project=os.environ.get("WANDB_PROJECT", "strawberry"), settings=settings,
            name=os.environ.get("WANDB_NAME", Path(self.run.model_path).stem),
        )  # fmt: skip
        self.logged.define_metric("step")
        self.logged.define_metric("*", step_metric="step")
        self.write_state(self.sent)

    def add(self, line: dict) -> None:
        kind, position = kind_and_position(line)
        if position <= self.sent.get(kind, -1):
            return
        numbers, texts = split_line(line)
        pages = {name: self.package.Html(f"<pre>{html.escape(text)}</pre>") for name, text in texts.items()}
        self.logged.log({"step": line["step"], **numbers, **pages})
        self.recent.append((time.monotonic(), self.sent))
        self.sent = self.sent | {kind: position}
        while self.recent[0][0] < time.monotonic() - self.WRITTEN_AFTER:
            self.recent.popleft()
        self.write_state(self.recent[0][1])

    def write_state(self, sent: dict[str, int]) -> None:
        atomic_write(self.root / "wandb" / self.STATE, json.dumps({"id": self.id, "sent": sent}).encode())

    def close(self, finished: bool = False) -> None:
        logged, self.logged = self.logged, None
        if logged is not None:
            logged.finish(exit_code=0 if finished else 1)
            self.write_state(self.sent)


def kind_and_position(line: dict) -> tuple[str, int]:
    """A line's kind (a step, an evaluation, a rollback), and its place among those of its kind."""
    if "rollback" in line:
        return "rollback", line["rollback"]
    return "evaluation" if "val_loss" in line else "step", line["step"]


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB}
FOLDERS = ("tensorboard", "wandb")  # in checkpoints.path
