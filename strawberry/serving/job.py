"""One job: what is known of it on disk, its events, and its child process.

A job outlives the server: its child has a session of its own, its output goes to a file, and its process number and
start time are on disk before its first instruction. A server that starts, after a kill −9 too, finds each child alive
and watches it on, or finds it gone and judges by what it left. A job has succeeded where the one file is there that
its child writes last and in one piece; everything else is a failure that can be resumed.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from strawberry import machine, status_file
from strawberry.serving.id_directory import EVENTS, LOG, PID, STATUS, write_job_file
from strawberry.training.checkpoint import list_checkpoints

# What a child does before it becomes the program: it says who it is. Its number and its start outlast the exec. It is
# also the first that a system out of memory ends, before the server.
LAUNCH = """
import json, os, sys
from strawberry.machine import start_time
path, *argv = sys.argv[1:]
try:
    open("/proc/self/oom_score_adj", "w").write("500")
except OSError:
    pass
with open(path + ".tmp", "w") as file:
    json.dump({"pid": os.getpid(), "born": start_time(os.getpid())}, file)
    file.flush()
    os.fsync(file.fileno())
os.replace(path + ".tmp", path)
os.execv(sys.executable, [sys.executable, *argv])
"""


class ChildProcess:
    """The process of a job, started by this server or by one before it."""

    def __init__(self, folder: Path):
        self.folder, self.process = folder, None
        self.pid, self.born = 0, ""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads((folder / PID).read_bytes())
            self.pid, self.born = int(known["pid"]), str(known["born"])

    def start(self, argv: list[str], n_jobs: int = 1) -> None:
        """Run `python argv…` in the job's folder, its output at the end of LOG, its reports in STATUS. Of `n_jobs` at
        once each gets its share of the cores, unless the server's environment has OMP_NUM_THREADS."""
        (self.folder / PID).unlink(missing_ok=True)
        status_file.allocate(self.folder / STATUS)
        command = [sys.executable, "-c", LAUNCH, str(self.folder / PID), *argv]
        path = [str(Path(status_file.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), status_file.VARIABLE: str(self.folder / STATUS)}
        if n_jobs > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_jobs)))
        with open(self.folder / LOG, "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                            cwd=self.folder, env=env, start_new_session=True)  # fmt: skip
        self.pid = self.process.pid

    def alive(self) -> bool:
        if self.process:
            return self.process.poll() is None
        return machine.is_running(self.pid, self.born)

    @property
    def code(self) -> int | None:
        """How it ended; None where another server's child did."""
        return self.process.returncode if self.process else None

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.alive():
                os.kill(self.pid, number)

    def kill(self) -> None:
        """It and whatever it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.alive():
                os.killpg(self.pid, signal.SIGKILL)


WAITING, RUNNING, FINAL = ("validating_files", "queued"), ("running",), ("succeeded", "failed", "cancelled")


class Job:
    """What is known of a job: `about` is on disk, the same after each change.

    status    validating_files, queued, running, succeeded, failed, cancelled or paused
    wanted    of a running one that has been asked to end: the status that it is to get, and whether it was told
    request   what it is of, as its kind understands it
    """

    def __init__(self, folder: Path, about: dict):
        self.folder, self.about, self.child = folder, about, ChildProcess(folder)
        self.metrics = MetricsTail(folder / "checkpoints" / "metrics.jsonl")
        self.n_warnings = 0  # of the child that were looked at
        self.warned: set[str] = set()  # those that were events before this server saw the child give them
        self.unwritten: list[bytes] = []  # events that a full disk did not take
        self.is_stored = True  # whether `about` is on disk
        self.stop_requested_at = math.inf  # time.monotonic() of the signal
        self.n_events, whole = 0, True
        with contextlib.suppress(OSError), open(folder / EVENTS, "rb+") as file:
            for line in file:
                self.n_events, whole = self.n_events + 1, line.endswith(b"\n")
            file.write(b"" if whole else b"\n")  # a kill left half a line

    @property
    def id(self) -> str:
        return self.about["id"]

    @property
    def kind(self) -> str:
        return self.id.partition("-")[0]

    @property
    def status(self) -> str:
        return self.about["status"]

    @property
    def request(self) -> dict:
        return self.about["request"]

    def set(self, **changes) -> None:
        """Change what is known, on disk before it shows. What a full disk doesn't take shows all the same, and is
        written by a later store(): a job can be stopped when the disk is full."""
        changed = self.about | changes
        try:
            write_job_file(self.folder, changed)
            self.is_stored = True
        except OSError:
            self.is_stored = False
        self.about = changed

    def log_event(self, message: str, level: str = "info", data: dict | None = None) -> None:
        """One more event. What a full disk doesn't take is kept in memory, and written by a later store()."""
        self.n_events += 1
        event = {"id": f"ftevent-{self.id.rpartition('-')[2]}-{self.n_events}", "created_at": int(time.time())}
        event |= {"level": level, "message": message, "object": "fine_tuning.job.event"}
        event |= {"type": "metrics" if data else "message", "data": data or {}}
        self.unwritten.append(json.dumps(event).encode() + b"\n")
        self.store_events()

    def store_events(self) -> None:
        with contextlib.suppress(OSError), open(self.folder / EVENTS, "ab") as file:
            end = file.tell()
            try:
                file.write(b"".join(self.unwritten))
                file.flush()
            except OSError:
                file.truncate(end)  # no half line
                raise
            self.unwritten = []

    def store(self) -> None:
        """Try again to write what a full disk did not take."""
        if self.unwritten:
            self.store_events()
        if not self.is_stored:
            self.set()

    def events(self) -> list[dict]:
        """The newest first."""
        found, unwritten = [], list(self.unwritten)
        with contextlib.suppress(OSError):
            for line in (self.folder / EVENTS).read_bytes().splitlines():
                with contextlib.suppress(ValueError):  # what a kill left half written
                    found.append(json.loads(line))
        found += map(json.loads, unwritten)
        return list({event["id"]: event for event in found}.values())[::-1]  # some may have been written meanwhile

    def catch_up(self) -> None:
        """After a start of the server: tell no step again, and none too few of a child that ran on without it."""
        if self.status != "running":
            self.metrics.read()
            return
        events = self.events()
        self.warned = {event["message"] for event in events if event["level"] == "warn"}
        told = next((event["data"] for event in events if event.get("type") == "metrics"), None)
        if told:
            self.metrics.seen = (told["step"], "full_valid_loss" in told, 0)

    def fail(self, message: str, code: str) -> None:
        self.log_event(message, "error")  # before it shows: who sees that it has failed finds the event too
        self.set(status="failed", wanted=None, finished=time.time(), error={"message": message, "code": code})

    def checkpoints(self) -> list[dict]:
        """The newest first; of each its number, its loss, and the name that it would have as a model."""
        return [
            {
                "id": f"ftckpt-{self.id.rpartition('-')[2]}-{found.step}",
                "object": "fine_tuning.job.checkpoint",
                "created_at": int(found.saved_at),
                "fine_tuning_job_id": self.id,
                "step_number": found.step,
                "fine_tuned_model_checkpoint": checkpoint_name(self.about["model"], found.step),
                "metrics": {"step": found.step, "full_valid_loss": found.val_loss},
            }
            for found in list_checkpoints(self.folder / "checkpoints")
        ]

    def last_error(self) -> str:
        """The error that the child's output ends with, if it does, or that it has reported."""
        with contextlib.suppress(OSError), open(self.folder / LOG, "rb") as file:
            file.seek(max(self.about.get("log_start", 0), os.fstat(file.fileno()).st_size - 65536))
            text = file.read().decode("utf-8", "replace").replace("\r", "\n")
            found = re.findall(r"^(?:error: |\w*(?:Error|Exception): )(.*(?:\n  .*)*)", text, re.MULTILINE)
            if found:
                return found[-1].strip()[:2000]
        return str(self.report().get("error", ""))

    def report(self) -> dict:
        """What the child says in STATUS."""
        return status_file.read(self.folder / STATUS)

    def new_warnings(self) -> list[str]:
        """Those of the child that were not given before."""
        found = []
        for number, text in self.report().get("warnings", []):
            if number > self.n_warnings:
                self.n_warnings = number
                found.append(text)
        return found

    def first_warnings(self) -> set[str]:
        """Those that were events before the job first ran, which its child gives again."""
        before = itertools.takewhile(lambda event: event["message"] != "started", reversed(self.events()))
        return {event["message"] for event in before if event["level"] == "warn"}

    def unsaved(self) -> str:
        """Which steps of the child that has ended no checkpoint holds, in a sentence; empty where there are none."""
        report = self.report()
        reached = max(report.get("step", 0), self.metrics.latest.get("step", 0))
        saved = next((found.step for found in list_checkpoints(self.folder / "checkpoints")), 0)
        if saved >= reached:
            return ""
        what = f"steps {saved + 1:,} to {reached:,} were not saved, resuming goes on from step {saved:,}"
        if not saved:
            what = f"nothing was saved of {reached:,} steps, resuming starts again"
        why = [text.partition(";")[0] for _, text in report.get("warnings", []) if text.startswith("cannot save")]
        return f"{what}: {why[-1]}" if why else what


class MetricsTail:
    """The new lines of a metrics.jsonl that another process writes, and rewrites when a run is resumed."""

    def __init__(self, path: Path):
        self.path, self.inode, self.offset, self.seen = path, 0, 0, (-1, False, 0)
        self.latest: dict = {}  # step, tokens, train_loss, val_loss, … as last told

    def read(self) -> list[dict]:
        """What is behind the last line that was read: a step that is done again is not told again."""
        try:
            with open(self.path, "rb") as file:
                about = os.fstat(file.fileno())
                if about.st_ino != self.inode or about.st_size < self.offset:
                    self.inode, self.offset = about.st_ino, 0
                file.seek(self.offset)
                data = file.read()
        except OSError:
            return []
        data = data[: data.rfind(b"\n") + 1]
        self.offset += len(data)
        lines = []
        for text in data.splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                line = json.loads(text)
                self.latest |= {"rollback": None} | line
                key = (line["step"], "val_loss" in line, line.get("rollback", 0))
                if key > self.seen or "rollback" in line:
                    self.seen = max(self.seen, key)
                    lines.append(line)
        return lines


def classify_error(message: str) -> str:
    """Whether an error is of this server's disk or of what was asked for."""
    disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    return "server_error" if any(os.strerror(number) in message for number in disk) else "invalid_request"


def checkpoint_name(model: str, step: int) -> str:
    """The name under which a checkpoint of a run can be sampled: ft-tiny-mine-0a1b2c3d-step-200.strawberry"""
    stem, dot, arch = model.rpartition(".")
    return f"{stem}-step-{step}{dot}{arch}"
