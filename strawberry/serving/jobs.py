"""JobSupervisor, a thread that starts, watches and concludes the child processes of jobs, and JobService, which owns
it.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fastapi.concurrency import run_in_threadpool

from strawberry.common import UserError
from strawberry.outputs import Output, check_outputs
from strawberry.serving.id_directory import LOG
from strawberry.serving.job import WAITING, ChildProcess, Job, classify_error
from strawberry.serving.job_commands import JOB_KINDS
from strawberry.serving.job_store import JobStore
from strawberry.serving.runs import RunIndex
from strawberry.serving.settings import MIB, Settings
from strawberry.serving.uploads import Uploads
from strawberry.training import plot
from strawberry.training.lock import LOCK, Lock

STOP_SECONDS = 60  # time for jobs to save when the server stops
POLL_SECONDS = 0.2  # interval between polls of all children
STOP_TIMEOUT = 120  # time for a child to exit after SIGTERM, before it is killed


class JobSupervisor:
    """The thread that starts, watches and concludes the child processes of all jobs. Up to `at_once` jobs of each kind
    run at the same time, oldest first.
    """

    def __init__(self, store: JobStore, at_once: int):
        self.store, self.at_once = store, at_once
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="jobs", daemon=True)

    def start(self) -> None:
        """Update the jobs of the previous server, and start the thread."""
        with self.store.lock:
            for job in self.store.jobs.values():
                job.catch_up()
                if job.status == "running" and job.about["wanted"] and not job.about.get("told"):
                    job.child.signal(signal.SIGTERM)
                    job.set(told=True)
                if job.status == "running" and job.about["wanted"]:
                    job.stop_requested_at = time.monotonic()
        self.thread.start()

    def stop_all(self, seconds: float) -> None:
        """Stop all children when the server stops, and wait up to `seconds`. Each child saves a checkpoint, from which
        the next server resumes the job.
        """
        with self.store.lock:
            self.closing.set()
            for job in self.store.list_running():
                if job.about["wanted"] is None:
                    self.store.request_stop(job, "queued")
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.store.list_running():
            time.sleep(0.05)
        self.thread.join(timeout=5)

    def watch(self) -> None:
        while not (self.closing.is_set() and not self.store.list_running()):
            try:
                with self.store.lock:
                    self.poll()
            except Exception as error:  # for example a full disk; the next poll may succeed
                print(f"jobs: {type(error).__name__}: {error}", file=sys.stderr)
            self.closing.wait(POLL_SECONDS) if not self.closing.is_set() else time.sleep(POLL_SECONDS)

    def poll(self) -> None:
        for job in list(self.store.jobs.values()):
            job.store()
        for job in self.store.list_running():
            ended = not job.child.alive()  # checked before the logs are read, so that the last lines are not missed
            self.log_metrics(job)
            self.log_warnings(job)
            if ended:
                self.conclude(job)
            elif time.monotonic() - job.stop_requested_at > STOP_TIMEOUT:
                job.log_event(f"did not end within {STOP_TIMEOUT} seconds and was killed", "warn")
                job.child.kill()
        if self.closing.is_set():
            return
        for kind in self.store.kinds:
            free = self.at_once - sum(job.kind == kind for job in self.store.list_running())
            waiting = [job for job in reversed(self.store.all(kind)) if job.status in WAITING]
            for job in waiting:
                if free > 0 and self.launch(job):
                    free -= 1

    def launch(self, job: Job) -> bool:
        """Start a job's child process if possible. Returns whether it runs."""
        if job.child.alive():  # a child of a server that was killed while it stopped
            job.set(status="running")
            return True
        try:
            command = self.store.kinds[job.kind].command(self.store, job)
        except (UserError, OSError) as error:
            message = self.store.names.rewrite(str(error))
            job.fail(message, getattr(error, "code", None) or classify_error(message))
            return False
        if command is None:
            return False
        log = job.folder / LOG
        job.stop_requested_at = math.inf
        job.set(
            status="running",
            wanted=None,
            told=False,
            result=str(command.result),
            started=time.time(),
            log_start=log.stat().st_size if log.exists() else 0,
        )
        job.child, job.n_warnings, job.warned = ChildProcess(job.folder), 0, job.first_warnings()
        try:
            job.child.start(command.argv, self.at_once)
        except OSError as error:
            job.fail(f"the process could not be started: {error.strerror}", "server_error")
            return False
        job.log_event("started")
        return True

    def conclude(self, job: Job) -> None:
        """Set a job's final status after its child has exited, from the result file, the exit code and the log."""
        wanted, code = job.about["wanted"], job.child.code
        if os.path.isfile(job.about["result"]):
            job.log_event("succeeded")
            job.set(status="succeeded", wanted=None, finished=time.time())
        elif wanted:
            unsaved = self.store.names.rewrite(job.unsaved())
            if unsaved:
                job.log_event(unsaved, "warn")
            job.log_event("stopped with the server, to go on with the next one" if wanted == "queued" else wanted)
            job.set(
                status=wanted,
                wanted=None,
                finished=time.time() if wanted == "cancelled" else None,
                error={"message": unsaved, "code": "not_saved"} if unsaved and wanted != "queued" else None,
            )
        else:
            ended = "ended while no server was there to see it" if code is None else f"ended with code {code}"
            if code is not None and code < 0:
                ended = f"was killed by {signal.Signals(-code).name}"
            words = self.store.names.rewrite(job.last_error()) if code is None or code > 0 else ""
            job.fail(
                words or f"the process {ended} before its work was done; it can be resumed",
                classify_error(words) if words and code == 2 else "interrupted",
            )

    def log_warnings(self, job: Job) -> None:
        for text in map(self.store.names.rewrite, job.new_warnings()):
            if text not in job.warned:
                job.log_event(text, "warn")

    def log_metrics(self, job: Job) -> None:
        for line in job.metrics.read():
            data = {"step": line["step"], "total_steps": job.about["max_iters"]}
            names = {"loss": "train_loss", "val_loss": "valid_loss"} if "loss" in line else {
                "train_loss": "full_train_loss", "val_loss": "full_valid_loss"}  # fmt: skip
            data |= {new: line[old] for old, new in names.items() if old in line}
            losses = ", ".join(
                f"{name.replace('_', ' ')} {value:.4f}"
                for name, value in data.items()
                if "loss" in name and value is not None
            )
            level = "warn" if "rollback" in line else "info"
            what = f"rollback: {line['why']}" if "rollback" in line else losses
            job.log_event(f"step {line['step']:,}/{job.about['max_iters']:,}: {what}", level, data)


class JobService:
    """The uploads and jobs of the data directory, which one server at a time may use."""

    def __init__(self, settings: Settings):
        self.settings, self.lock = settings, None
        self.uploads: Uploads | None = None  # set by start()
        self.jobs: JobStore | None = None
        self.supervisor: JobSupervisor | None = None
        self.runs: RunIndex | None = None  # set by the service: runs of the command line have checkpoints too
        self.drawn: tuple = ((), b"")  # (key of the last picture, its PNG)
        self.drawing = threading.Lock()  # a picture takes most of a second, so one is drawn at a time

    def register_gauges(self, gauge: Callable) -> None:
        gauge("jobs_running", "training runs whose process is alive", lambda: self.jobs.count("running"))
        gauge("jobs_queued", "training runs that wait", lambda: sum(map(self.jobs.count, WAITING)))

    def claim(self) -> None:
        """Lock the data directory. Raises UserError if another server has locked it or a directory cannot be made."""
        try:
            for name in (self.settings.data, self.settings.models):
                Path(name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {error.filename}: {error.strerror}; name another directory") from error
        check_outputs([Output("--data", Path(self.settings.data) / LOCK, "lock")])
        self.lock = Lock(self.settings.data, "--data")

    async def start(self) -> None:
        if self.lock is None:
            self.claim()
        root = Path(self.settings.data)
        self.uploads = Uploads(root.resolve() / "files", int(self.settings.max_upload * MIB))
        self.jobs = JobStore(root.resolve(), Path(self.settings.models), self.uploads, JOB_KINDS)
        self.supervisor = JobSupervisor(self.jobs, self.settings.max_jobs)
        self.supervisor.start()

    async def stop(self) -> None:
        await run_in_threadpool(self.supervisor.stop_all, STOP_SECONDS)
        self.lock.release()
        self.lock = None

    def find_checkpoint(self, name: str) -> Path | None:
        """The model file of the run's checkpoint with this name, if it still exists."""
        found = self.jobs.find_checkpoint_file(name) if self.jobs else None
        return found or (self.runs.find_checkpoint_file(name) if self.runs else None)

    def draw_curves(self, job: Job, sheet: str, x: str) -> bytes:
        """A sheet of the job's current curves as PNG, cached until its metrics change."""
        path = job.metrics.path
        with self.drawing:
            now = (job.id, sheet, x, path.stat().st_mtime_ns if path.exists() else 0)
            if self.drawn[0] != now:
                lines = plot.read_points(path) if path.exists() else []
                self.drawn = (now, plot.png(plot.SHEETS[f"{sheet}.png"]({job.about["model"]: lines}, x)))
            return self.drawn[1]
