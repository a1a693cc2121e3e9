"""Uploaded files, and jobs that run as processes of their own: what serve.py keeps on disk. Nothing here is HTTP.

    Uploads     files as they came, data/files/<id>/content.jsonl.gz and what is known of it
    Jobs        data/datasets/<id> and data/runs/<id>: a job each, made by a child process (assemble, train)

Files and jobs are named by ids that this program draws. An id is a word of a fixed form, checked before it meets a
path, and no link is followed, so that no name which a client gives reaches the file system.

A job outlives the server: its child is in a session of its own, its output goes to a file, and its process number and
start time are on disk before its first instruction. A server that starts, after a kill −9 too, finds each child alive
and watches it on, or finds it gone and judges by what it left. A job has succeeded where the one file is there that
its child writes last and in one piece; everything else is a failure that can be resumed.

A new kind of job is a function and a line in KINDS: the function says which command to run, and which file is there
once all is done. It queues, survives, and is stopped and resumed as the others are.

Index:  refusals · ids · uploads · child processes · a job · the kinds: datasets, runs · names in place of paths ·
        all jobs
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import checkpoint
import encoder as encoders
import options
from model import CONFIGS
from options import UserError, atomic_write, nearest, read_json, show
from strawberry import status_file
from strawberry.data import assemble
from strawberry.data.objectives import count_extra_ids
from strawberry.inference.loading import MODEL_SUFFIXES

HERE = Path(__file__).resolve().parent
ABOUT, LOG, EVENTS, PID, STATUS = "about.json", "log.txt", "events.jsonl", "pid.json", "status.json"

# ---- refusals ------------------------------------------------------------------------------------------------------


class Refused(UserError):
    """What a client asked for and can't have: the HTTP status, and the field that is to be mended."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


# ---- ids -----------------------------------------------------------------------------------------------------------


def new_id(kind: str) -> str:
    """`file-` and 24 digits, say."""
    return f"{kind}-{secrets.token_hex(12)}"


class Shelf:
    """The directories of one kind of thing, each named by its id."""

    def __init__(self, root: Path, kind: str, what: str):
        self.root, self.kind, self.what = root, kind, what
        root.mkdir(parents=True, exist_ok=True)
        for path in root.glob(".tmp_*"):  # what a killed server left
            if re.fullmatch(r"\.tmp_[0-9a-f]+", path.name):
                shutil.rmtree(path, ignore_errors=True)

    def folder(self, name: str, param: str | None = None) -> Path:
        """The directory of that id. Raises Refused (404) for everything else, whatever it looks like."""
        path = self.root / name if re.fullmatch(rf"{self.kind}-[0-9a-f]{{24}}", name, re.ASCII) else None
        if path is None or path.is_symlink() or not path.is_dir():
            raise Refused(404, f"there is no {self.what} {show(name)}", param or "id", "not_found")
        return path

    def names(self) -> Iterator[str]:
        for path in self.root.iterdir():
            with contextlib.suppress(Refused):
                yield self.folder(path.name).name

    def temporary(self) -> Path:
        """A directory that is to get its name by place()."""
        path = self.root / f".tmp_{secrets.token_hex(8)}"
        path.mkdir()
        return path

    def place(self, temporary: Path, name: str) -> Path:
        os.rename(temporary, self.root / name)
        return self.root / name

    def set_aside(self, name: str) -> Path:
        """Take its name from a directory, in one step; what is to be removed then, the next start removes too."""
        doomed = self.root / f".tmp_{secrets.token_hex(8)}"
        try:
            os.rename(self.folder(name), doomed)
        except OSError as error:
            raise Refused(507, f"the {self.what} {name} cannot be deleted: {error.strerror or error}", "id") from error
        return doomed

    def remove(self, name: str) -> None:
        shutil.rmtree(self.set_aside(name), ignore_errors=True)


def disk_use(folder: Path) -> int:
    """Bytes of all files in it. What goes away meanwhile is not counted."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def page(items: list[dict], after: str | None, limit: int) -> dict:
    """A list object of at most `limit` of the items behind the one with the id `after`, which are in order already."""
    if after is not None:
        places = [i for i, item in enumerate(items) if item["id"] == after]
        if not places:
            raise Refused(404, f"after = {show(after)}: nothing in this list has that id", "after", "not_found")
        items = items[places[0] + 1 :]
    data = items[:limit]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": len(items) > limit, **ends}


def read_about(folder: Path) -> dict:
    return json.loads((folder / ABOUT).read_bytes())


def write_about(folder: Path, about: dict) -> None:
    """Raises OSError where it cannot be written."""
    try:
        atomic_write(folder / ABOUT, json.dumps(about, indent=1).encode())
    except UserError as error:  # which names the path
        raise error.__cause__ or OSError("it is no file") from error


# ---- uploads -------------------------------------------------------------------------------------------------------

# What may be uploaded, by the end of its name: a document, or a list of documents. This is the only place that knows.
TEXT_KINDS = """
    txt text md markdown rst adoc org tex log srt html htm xml css toml yaml yml ini cfg sql
    py pyi js mjs ts jsx tsx c h cc cpp cxx hh hpp hxx cu cuh cs java kt scala go rs swift rb php pl lua r jl hs ml ex
    erl clj lisp el vim sh bash zsh ps1 bat
"""
TEXT_SUFFIXES = tuple(f".{kind}" for kind in TEXT_KINDS.split())
LIST_SUFFIXES = {".json": ".json", ".jsonl": ".jsonl", ".ndjson": ".jsonl", ".jsonlines": ".jsonl"}  # → stored as
SUFFIXES = (*TEXT_SUFFIXES, *LIST_SUFFIXES)
MAX_NAME = 255  # characters
PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")


class Upload:
    """A file on its way in: write(data) …, then finish() or abort()."""

    def __init__(self, uploads: Uploads):
        self.uploads, self.size, self.hash = uploads, 0, hashlib.sha256()
        try:
            self.folder = uploads.shelf.temporary()
            self.file = open(self.folder / "content", "xb")  # noqa: SIM115 (closed by finish and abort)
        except OSError as error:
            raise Refused(507, f"the file cannot be stored: {error.strerror}") from error

    def write(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > self.uploads.limit:
            raise too_large(self.uploads.limit)
        self.hash.update(data)
        try:
            self.file.write(data)
        except OSError as error:
            raise Refused(507, f"the file cannot be stored: {error.strerror}") from error

    def finish(self, name: str, purpose: str) -> dict:
        """Give it an id; returns what is known of it."""
        name, suffix = clean_name(name), kind_of(name)
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            if suffix.endswith(".gz"):
                check_gzip(self.folder / "content", self.uploads.limit)
            os.rename(self.folder / "content", self.folder / f"content{suffix}")
            about = {"id": new_id("file"), "filename": name, "bytes": self.size, "purpose": purpose, "suffix": suffix,
                     "sha256": self.hash.hexdigest(), "created": time.time()}
            write_about(self.folder, about)
            return self.uploads.add(self.folder, about)
        except OSError as error:
            raise Refused(507, f"the file cannot be stored: {error.strerror or error}") from error

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def too_large(limit: int, what: str = "the file") -> Refused:
    told = f"{what} is larger than {limit:,} bytes, the limit of this server (--max_upload): cut it up"
    return Refused(413, told, "file", "file_too_large")


def clean_name(name: str) -> str:
    """The last part of a path as clients send it. It is only shown: the file system never sees it."""
    name = re.split(r"[/\\]", name)[-1]
    if not name or len(name) > MAX_NAME or not name.isprintable():
        told = f"must have 1 to {MAX_NAME} printable characters"
        raise Refused(400, f"the file's name {show(name)} {told}; rename it", "file")
    return name


def kind_of(name: str) -> str:
    """The suffixes by which prepare.py will know what is in it; a name without any is a text's.

    >>> kind_of("notes.MD"), kind_of("chat.ndjson.gz"), kind_of("LICENSE")
    ('.md', '.jsonl.gz', '.txt')
    """
    lower = name.lower()
    stem, packed = (lower.removesuffix(".gz"), ".gz") if lower.endswith(".gz") else (lower, "")
    suffix = Path(stem).suffix or ".txt"
    if suffix not in SUFFIXES:
        allowed = f"must end in {', '.join(SUFFIXES)}, or in one of these and .gz, or have no ending"
        raise Refused(400, f"the file's name {show(name)} {allowed}; rename it if it is text", "file", "file_kind")
    return LIST_SUFFIXES.get(suffix, suffix) + packed


def check_gzip(path: Path, limit: int) -> None:
    """Unpack it, a piece at a time and to nowhere, up to the limit."""
    size = 0
    try:
        with gzip.open(path) as file:
            while data := file.read(1 << 20):
                size += len(data)
                if size > limit:
                    raise too_large(limit, "the file unpacked")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refused(400, f"the file is not a whole gzip file ({error}): pack it again", "file") from error


class Uploads:
    """The uploaded files. Everything about them is in memory too, but their content."""

    def __init__(self, root: Path, limit: int):
        self.shelf, self.limit, self.lock = Shelf(root, "file", "file"), limit, threading.Lock()
        self.known: dict[str, dict] = {}
        for name in self.shelf.names():
            with contextlib.suppress(OSError, ValueError):
                about = read_about(self.shelf.folder(name))
                self.known[about["id"]] = about

    def add(self, folder: Path, about: dict) -> dict:
        with self.lock:
            self.shelf.place(folder, about["id"])
            self.known[about["id"]] = about
        return about

    def get(self, name: str, param: str | None = None) -> dict:
        self.shelf.folder(name, param)
        if name not in self.known:
            raise Refused(404, f"there is no file {show(name)}", param or "id", "not_found")
        return self.known[name]

    def path(self, name: str, param: str | None = None) -> Path:
        """Where the content is. A link in its place is nothing that this program made."""
        path = self.shelf.folder(name, param) / f"content{self.get(name, param)['suffix']}"
        if path.is_symlink() or not path.is_file():
            raise Refused(404, f"the content of the file {name} is gone", param or "id", "not_found")
        return path

    def all(self) -> list[dict]:
        """The newest first."""
        with self.lock:
            return sorted(self.known.values(), key=lambda about: (-about["created"], about["id"]))

    def remove(self, name: str) -> None:
        self.get(name)
        with self.lock:
            self.known.pop(name, None)
            self.shelf.remove(name)


# ---- child processes -----------------------------------------------------------------------------------------------

# What a child does before it becomes the program: it says who it is. Its number and its start outlast the exec. It is
# also the first that a system out of memory ends, before the server.
LAUNCH = """
import json, os, sys
path, *argv = sys.argv[1:]
born = ""
try:
    born = open("/proc/self/stat").read().rpartition(")")[2].split()[19]
    open("/proc/self/oom_score_adj", "w").write("500")
except OSError:
    pass
with open(path + ".tmp", "w") as file:
    json.dump({"pid": os.getpid(), "born": born}, file)
    file.flush()
    os.fsync(file.fileno())
os.replace(path + ".tmp", path)
os.execv(sys.executable, [sys.executable, *argv])
"""


class Child:
    """The process of a job, started by this server or by one before it."""

    def __init__(self, folder: Path):
        self.folder, self.process = folder, None
        self.pid, self.born = 0, ""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads((folder / PID).read_bytes())
            self.pid, self.born = int(known["pid"]), str(known["born"])

    def start(self, argv: list[str]) -> None:
        """Run `python argv…` in the job's folder, its output at the end of LOG, its reports in STATUS."""
        (self.folder / PID).unlink(missing_ok=True)
        status_file.allocate(self.folder / STATUS)
        command = [sys.executable, "-c", LAUNCH, str(self.folder / PID), *argv]
        path = [str(Path(status_file.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), status_file.VARIABLE: str(self.folder / STATUS)}
        with open(self.folder / LOG, "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                            cwd=self.folder, env=env, start_new_session=True)  # fmt: skip
        self.pid = self.process.pid

    def alive(self) -> bool:
        if self.process:
            return self.process.poll() is None
        if self.pid < 1:
            return False
        try:
            state, *rest = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return state not in "ZX" and rest[18] == self.born
        except FileNotFoundError:
            pass
        except (OSError, IndexError):
            return False
        if Path("/proc/self/stat").exists():
            return False
        try:
            os.kill(self.pid, 0)
        except OSError:
            return False
        return True

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


# ---- a job ---------------------------------------------------------------------------------------------------------

WAITING, RUNNING, FINAL = ("validating_files", "queued"), ("running",), ("succeeded", "failed", "cancelled")


class Job:
    """What is known of a job: `about` is on disk, the same after each change.

    status    validating_files, queued, running, succeeded, failed, cancelled or paused
    wanted    of a running one that has been asked to end: the status that it is to get, and whether it was told
    request   what it is of, as its kind understands it
    """

    def __init__(self, folder: Path, about: dict):
        self.folder, self.about, self.child = folder, about, Child(folder)
        self.metrics = Tail(folder / "checkpoints" / "metrics.jsonl")
        self.n_warnings = 0  # of the child that were looked at
        self.warned: set[str] = set()  # those that were events before this server saw the child give them
        self.unwritten: list[bytes] = []  # events that a full disk did not take
        self.is_stored = True  # whether `about` is on disk
        self.asked_at = math.inf  # time.monotonic() of the signal
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
            write_about(self.folder, changed)
            self.is_stored = True
        except OSError:
            self.is_stored = False
        self.about = changed

    def tell(self, message: str, level: str = "info", data: dict | None = None) -> None:
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
        self.tell(message, "error")  # before it shows: who sees that it has failed finds the event too
        self.set(status="failed", wanted=None, finished=time.time(), error={"message": message, "code": code})

    def checkpoints(self) -> list[dict]:
        """The newest first; of each its number, its loss, and the name that it would have as a model."""
        return [{"id": f"ftckpt-{self.id.rpartition('-')[2]}-{found.step}", "object": "fine_tuning.job.checkpoint",
                 "created_at": int(found.path.stat().st_mtime), "fine_tuning_job_id": self.id,
                 "step_number": found.step, "fine_tuned_model_checkpoint": step_name(self.about["model"], found.step),
                 "metrics": {"step": found.step, "full_valid_loss": found.val_loss}}
                for found in checkpoint.listed(self.folder / "checkpoints")]

    def last_words(self) -> str:
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
        saved = next((found.step for found in checkpoint.listed(self.folder / "checkpoints")), 0)
        if saved >= reached:
            return ""
        what = f"steps {saved + 1:,} to {reached:,} were not saved, resuming goes on from step {saved:,}"
        if not saved:
            what = f"nothing was saved of {reached:,} steps, resuming starts again"
        why = [text.partition(";")[0] for _, text in report.get("warnings", []) if text.startswith("cannot save")]
        return f"{what}: {why[-1]}" if why else what


class Tail:
    """The new lines of a metrics.jsonl that another process writes, and rewrites when a run is resumed."""

    def __init__(self, path: Path):
        self.path, self.inode, self.at, self.seen = path, 0, 0, (-1, False, 0)
        self.latest: dict = {}  # step, tokens, train_loss, val_loss, … as last told

    def read(self) -> list[dict]:
        """What is behind the last line that was read: a step that is done again is not told again."""
        try:
            with open(self.path, "rb") as file:
                about = os.fstat(file.fileno())
                if about.st_ino != self.inode or about.st_size < self.at:
                    self.inode, self.at = about.st_ino, 0
                file.seek(self.at)
                data = file.read()
        except OSError:
            return []
        data = data[: data.rfind(b"\n") + 1]
        self.at += len(data)
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


# ---- the kinds: datasets -------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a job runs: arguments of Python, and the file that is there once all was done."""

    argv: list[str]
    result: Path


def dataset_work(jobs: Jobs, job: Job) -> Work | None:
    """strawberry.data.assemble with the job's recipe, whose files and encoder are put in as paths."""
    recipe = dict(job.request["recipe"])
    recipe["files"] = [str(jobs.uploads.path(name, "files")) for name in recipe["files"]]
    given = recipe["encoder"]
    if given is not None and not is_published(given):
        recipe["encoder"] = str(job.folder / "given.bin")
        jobs.encoder_of(given).save(recipe["encoder"])
    atomic_write(job.folder / "recipe.json", json.dumps(recipe).encode())
    (job.folder / assemble.PROGRESS).unlink(missing_ok=True)
    return Work(["-m", "strawberry.data.assemble", "recipe.json", "."], job.folder / assemble.RESULT)


def is_published(encoder: str) -> bool:
    """Whether it is one that anybody can make or fetch, and not the name of something here."""
    return encoder == "chars" or bool(re.fullmatch(r"tiktoken:[a-z0-9_]{1,40}", encoder))


# ---- the kinds: runs -----------------------------------------------------------------------------------------------

# The keys of the JSON that a client can't set: those that name paths, and those that would say what the path is of.
OWN_KEYS = {*options.path_names(options.Run), "dataset.load_from_file", "checkpoints.create_checkpoints"}
# OpenAI's hyperparameters that train.py does not have → the values that change nothing, which some clients send
NEUTRAL = {"n_epochs": ("auto", 1), "learning_rate_multiplier": ("auto", 1)}


def training_work(jobs: Jobs, job: Job) -> Work | None:
    """train.py with the job's configuration; None as long as its dataset isn't there."""
    made_of = jobs.get("ds", job.request["dataset"], "training_file")
    if made_of.status in ("failed", "cancelled"):
        told = (made_of.about.get("error") or {}).get("message", made_of.status)
        raise Refused(400, f"the dataset {made_of.id} could not be assembled: {told}", "training_file", "invalid_file")
    if made_of.status != "succeeded":
        return None
    run = complete_run(jobs, job, made_of.folder)
    atomic_write(job.folder / "run.json", json.dumps(options.to_dict(run)).encode())
    root = job.folder / "checkpoints"
    root.mkdir(exist_ok=True)
    saved = any(not path.name.startswith(checkpoint.UNFINISHED) for path in root.glob("*step_*"))
    resume = ["--init_from=resume"] if saved else []
    return Work([str(HERE / "train.py"), "--config", str(job.folder / "run.json"), *resume], Path(run.model_path))


def complete_run(jobs: Jobs, job: Job, made_of: Path) -> options.Run:
    """The run of a job, with the paths, the division and the vocabulary of its dataset."""
    raw = json.loads(json.dumps(job.request["raw"]))
    result = json.loads((made_of / assemble.RESULT).read_bytes())
    raw.setdefault("dataset", {}).update(
        path=str(made_of / assemble.TOKENS), data_division=result["data_division"], load_from_file=True
    )
    raw.setdefault("checkpoints", {}).update(path=str(job.folder / "checkpoints"), create_checkpoints=True)
    raw |= {"encoder_path": str(made_of / assemble.ENCODER), "img_path": None,
            "model_path": str(jobs.models / job.about["model"])}
    base = job.request["base"]
    raw["init_from"] = f"{jobs.model_file(base)},pretrained" if base else "scratch"
    run = options.make_run(raw, CONFIGS)
    hyper = run.model_hyperparams
    if not base and not job.request["vocab_size"]:
        encoder = encoders.load(made_of / assemble.ENCODER)
        spare = count_extra_ids(run.objective, getattr(hyper, "kind", "decoder"), hyper.block_size, encoder)
        hyper.vocab_size = encoder.vocab_size + spare
    return run


def nested(hyperparameters: dict) -> dict:
    """{"a.b": 1} and {"a": {"b": 1}} as the latter. Raises Refused where a key is given in both ways."""
    raw: dict = {}
    for name, value in hyperparameters.items():
        if name in NEUTRAL:
            check_neutral(name, value)
            continue
        *sections, last = name.split(".")
        target = raw
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise Refused(400, f"hyperparameters.{name}: {section} is a value, not a section", "hyperparameters")
        if last in target and not (isinstance(value, dict) and isinstance(target[last], dict)):
            raise Refused(400, f"hyperparameters.{name}: given twice; keep one", "hyperparameters")
        target[last] = {**target[last], **value} if last in target else value
    return raw


def check_neutral(name: str, value) -> None:
    """Raises Refused unless a key of NEUTRAL has a value that changes nothing."""
    if value is not None and (isinstance(value, bool) or value not in NEUTRAL[name]):
        instead = {"n_epochs": "max_iters says how long a run trains", "learning_rate_multiplier": "set learning_rate"}
        values = " or ".join(map(show, NEUTRAL[name]))
        raise Refused(400, f"hyperparameters.{name} = {show(value)}: is not supported; {instead[name]}; leave it out, "
                      f"or send {values}, which changes nothing", f"hyperparameters.{name}")


def merged(below: dict, above: dict) -> dict:
    """`below`, with what `above` says in its place, section by section."""
    out = dict(below)
    for name, value in above.items():
        old = out.get(name)
        out[name] = merged(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return out


def leaves(raw: dict, prefix: str = "") -> Iterator[str]:
    """The dotted names of all values."""
    for name, value in raw.items():
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [prefix + name]


def check_own(raw: dict) -> None:
    """Refuse what a client can't choose, at any depth of spelling."""
    names = set(leaves(raw))
    for name in sorted(names & OWN_KEYS):
        told = "names a path or belongs to one, which the server chooses; leave it out"
        raise Refused(400, f"hyperparameters.{name}: {told}", f"hyperparameters.{name}")


class Kind(NamedTuple):
    """A kind of job: where its directories are, what it is called, and what it runs; None where it must wait."""

    folder: str
    what: str
    work: Callable[[Jobs, Job], Work | None]


KINDS = {  # by what its ids begin with
    "ds": Kind("datasets", "dataset", dataset_work),
    "ftjob": Kind("runs", "fine-tuning job", training_work),
}

# ---- names in place of paths ---------------------------------------------------------------------------------------


class PathNames:
    """Rewrites messages that name paths of this server in names that a client knows.

    An uploaded file is its name and line, a dataset's token file the dataset, and a file in the folder of a job, or a
    model, what it is called there. Of any other path of this machine its last part is left.

        /srv/data/files/file-0123…/content.jsonl:2 is not JSON    →    book.jsonl, line 2 is not JSON
    """

    OTHER = re.compile(r"(?<![\w/.:])(?:/[\w.@%+-]+)+/[\w.@%+-]*")  # two names at least

    def __init__(self, jobs: Jobs, data: Path):
        self.jobs = jobs
        start, digits = r"(?<![\w.@%+-])", "[0-9a-f]{24}"
        root = start + re.escape(str(data))
        self.file = re.compile(rf"{root}/files/(file-{digits})(?:/[\w.-]*\w)*(?::(\d+)\b)?")
        self.dataset = re.compile(rf"{root}/datasets/(ds-{digits})/(tokens|encoder|given)\.bin\b")
        self.config = re.compile(rf"^(?:{root}/runs/ftjob-{digits}/run|recipe)\.json: ")
        within = sorted(map(str, (data, jobs.models, HERE)), key=len, reverse=True)  # one may be in another
        folders = (rf"{root}/(?:runs/ftjob|datasets/ds)-{digits}", *(start + re.escape(path) for path in within))
        self.folders = re.compile(f"(?:{'|'.join(folders)})/")

    def rewrite(self, text: str) -> str:
        text = self.file.sub(self.name_file, text)
        text = self.dataset.sub(self.name_dataset, text)
        text = self.folders.sub("", self.config.sub("", text))
        return self.OTHER.sub(self.shorten, text)

    def name_file(self, found: re.Match) -> str:
        name = self.jobs.uploads.known.get(found[1], {}).get("filename", found[1])
        return f"{name}, line {int(found[2]):,}" if found[2] else name

    def name_dataset(self, found: re.Match) -> str:
        job = self.jobs.jobs.get(found[1])
        name = job.request.get("name", "") if job else ""
        if job and not name and len(files := job.request.get("recipe", {}).get("files", ())) == 1:
            name = self.jobs.uploads.known.get(files[0], {}).get("filename", "")
        what = {"tokens": "", "encoder": "the encoder of "}
        if found[2] in what:
            return f"{what[found[2]]}the dataset {name or found[1]}"
        return f"the encoder of {job.request['recipe']['encoder']}" if job else "the encoder"

    @staticmethod
    def shorten(found: re.Match) -> str:
        path = found[0]
        return os.path.basename(path.rstrip("/")) if os.path.exists(os.path.dirname(path.rstrip("/"))) else path


# ---- all jobs ------------------------------------------------------------------------------------------------------

TICK = 0.2  # seconds between two looks at all children
PATIENCE = 120  # seconds that a child has to end after it was asked to, before it is killed


class Jobs:
    """Every job, and the thread that starts, watches and judges their children.

    Of each kind at most `at_once` run, oldest first. Only one server at a time has a data directory.
    """

    def __init__(self, data: Path, models: Path, uploads: Uploads, at_once: int):
        self.uploads, self.models, self.at_once = uploads, models.resolve(), at_once
        self.shelves = {name: Shelf(data / kind.folder, name, kind.what) for name, kind in KINDS.items()}
        self.lock = threading.RLock()
        self.jobs: dict[str, Job] = {}
        self.keys: dict[str, str] = {}  # of idempotency → job
        self.names = PathNames(self, data)
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="jobs", daemon=True)
        for shelf in self.shelves.values():
            for name in shelf.names():
                with contextlib.suppress(OSError, ValueError, KeyError):
                    self.take(Job(shelf.folder(name), read_about(shelf.folder(name))))

    def take(self, job: Job) -> None:
        self.jobs[job.id] = job
        if key := job.about.get("key"):
            self.keys[key] = job.id

    # -- asking

    def get(self, kind: str, name: str, param: str | None = None) -> Job:
        """The job of that kind and id. Raises Refused (404) for everything else."""
        self.shelves[kind].folder(name, param)
        if name not in self.jobs:  # a directory that is no whole job
            raise Refused(404, f"there is no {self.shelves[kind].what} {show(name)}", param or "id", "not_found")
        return self.jobs[name]

    def all(self, kind: str) -> list[Job]:
        """The newest first."""
        with self.lock:
            found = [job for job in self.jobs.values() if job.kind == kind]
        return sorted(found, key=lambda job: (-job.about["created"], job.id))

    def count(self, status: str, kind: str = "ftjob") -> int:
        return sum(job.status == status for job in self.all(kind))

    def model_file(self, name: str, param: str = "model") -> Path:
        """The file of a model's name, which is one that is listed, and so is no path."""
        known = self.model_names()
        if name not in known:
            raise Refused(404, f"there is no model {show(name)}{nearest(name, known)}", param, "model_not_found")
        return self.models / name

    def checkpoint_file(self, name: str) -> Path | None:
        """The model file of a checkpoint, by the name that step_name gives it; None where there is none."""
        asked = re.fullmatch(r"(.+)-step-(\d{1,18})(\.\w[\w-]*)", name, re.ASCII)
        for job in self.all("ftjob") if asked else ():
            if job.about["model"] == asked[1] + asked[3]:
                path = job.folder / "checkpoints" / f"step_{int(asked[2]):08d}" / checkpoint.MODEL
                return path if path.is_file() else None
        return None

    def encoder_of(self, name: str) -> encoders.Encoder:
        """The encoder of a dataset that is ready, or of a model."""
        if name.startswith("ds-"):
            made_of = self.get("ds", name, "encoder")
            if made_of.status != "succeeded":
                raise Refused(409, f"encoder = {show(name)}: that dataset is {made_of.status}, not ready", "encoder")
            return encoders.load(made_of.folder / assemble.ENCODER)
        return checkpoint.read_encoder(self.model_file(name, "encoder"))

    # -- models

    def remove_model(self, name: str) -> None:
        """Delete a model's file. Raises Refused where a job that is not over writes it or reads it."""
        path = self.model_file(name)
        with self.lock:
            if job := self.uses_model(name):
                raise Refused(409, f"the model {name} is needed by the job {job.id}, which is {job.status}; cancel "
                              "that first", "model", "model_in_use")
            try:
                path.unlink()
            except OSError as error:
                raise Refused(500, f"the model {name} cannot be deleted: {error.strerror or 'the system refuses'}",
                              "model") from error

    def uses_model(self, name: str) -> Job | None:
        """A job that is not over and trains into that model, starts from it, or takes its encoder."""
        for job in self.jobs.values():
            request = job.request
            needed = [request["recipe"]["encoder"]] if job.kind == "ds" else [job.about["model"], request["base"]]
            if job.status not in FINAL and name in needed:
                return job
        return None

    # -- making

    def new(self, kind: str, request: dict, name: str | None = None, **about) -> Job:
        """A job that waits for its turn."""
        shelf, folder = self.shelves[kind], None
        about = {"id": name or new_id(kind), "status": "queued", "created": time.time(), "started": None,
                 "finished": None, "wanted": None, "error": None, "request": request, **about}  # fmt: skip
        try:
            folder = shelf.temporary()
            write_about(folder, about)
            job = Job(shelf.place(folder, about["id"]), about)
        except OSError as error:
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
            raise Refused(507, f"the job cannot be stored: {error.strerror or error}") from error
        self.take(job)
        return job

    def assemble(self, recipe: assemble.Recipe, name: str = "") -> Job:
        """The dataset of a recipe of ids: the one that is there, where what it is made of is the same."""
        raw = options.to_dict(recipe)
        with self.lock, self.naming():
            files = [self.uploads.get(file, "files") for file in recipe.files]
            _, problems = options.check(assemble.Recipe, raw)
            if problems:
                raise Refused(400, "; ".join(problems), problems[0].partition(" = ")[0])
            given = recipe.encoder
            if given is not None and not is_published(given):
                given = self.encoder_of(given).fingerprint
            content = {**raw, "encoder": given, "files": [[file["sha256"], file["suffix"]] for file in files]}
            digest = hashlib.sha256(json.dumps([assemble.VERSION, content], sort_keys=True).encode()).hexdigest()
            job = self.jobs.get(f"ds-{digest[:24]}")
            if job is None:
                return self.new("ds", {"recipe": raw, "name": name, "hash": digest}, f"ds-{digest[:24]}")
            if job.status in ("failed", "cancelled"):  # perhaps the disk is no longer full
                job.set(status="queued", error=None, request={**job.request, "recipe": raw})
            return job

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """What is wrong is said without this server's paths."""
        try:
            yield
        except Refused:
            raise
        except UserError as error:
            raise Refused(400, self.names.rewrite(str(error))) from error

    def train(self, asked: Training) -> Job:
        """The run that was asked for: the one that is there, where it was asked for with the same key."""
        with self.lock, self.naming():
            if asked.key in self.keys:
                job = self.jobs[self.keys[asked.key]]
                if job.about["body"] != asked.body:
                    told = "this Idempotency-Key came with another request before; take another one"
                    raise Refused(409, told, "Idempotency-Key", "idempotency_key_reused")
                return job
            base, raw = self.starting_point(asked.model)
            self.find_data(asked.training_file)
            chosen = nested(asked.hyperparameters)
            check_own(chosen)
            raw = merged(raw, chosen)
            if asked.seed is not None:
                raw["seed"] = asked.seed
            run = options.make_run(raw, CONFIGS)
            raw["seed"] = secrets.randbits(31) if run.seed == "auto" else run.seed
            if len(json.dumps(raw)) > options.MAX_CONFIG_BYTES // 2:
                raise Refused(400, f"hyperparameters are longer than {options.MAX_CONFIG_BYTES // 2:,} bytes as JSON",
                              "hyperparameters")
            made_of = self.dataset_for(asked, run, base, chosen)
            request = {"model": asked.model, "training_file": asked.training_file, "dataset": made_of.id, "base": base,
                       "raw": raw, "chosen": chosen, "metadata": asked.metadata, "suffix": asked.suffix,
                       "vocab_size": chosen.get("model_hyperparams", {}).get("vocab_size")}
            name = new_id("ftjob")
            model = model_name(asked.model, asked.suffix, name, run.model_hyperparams.arch)
            job = self.new("ftjob", request, name, status="validating_files", model=model, key=asked.key,
                           body=asked.body, max_iters=run.max_iters, seed=raw["seed"])
            job.tell("created")
            for message in run.warnings():
                job.tell(message, "warn")
            return job

    def find_data(self, name: str) -> None:
        """Raises Refused (404) unless it is a dataset or a file."""
        if name.startswith("ds-"):
            self.get("ds", name, "training_file")
        else:
            self.uploads.get(name, "training_file")

    def starting_point(self, name: str) -> tuple[str | None, dict]:
        """(model file's name or None, configuration) of a preset's or a model's name."""
        known, stem = presets(), name.removesuffix(".json")
        if stem in known:
            raw = json.loads(json.dumps(read_json(known[stem])))
            for name in ("$schema", "seed"):  # a preset's seed is that of its published run
                raw.pop(name, None)
            return None, without_own(raw)
        try:
            path = self.model_file(name)
        except Refused as error:
            told = f"there is no preset and no model {show(name)}{nearest(name, [*known, *self.model_names()])}"
            told = f"{told}; presets are {', '.join(known)}"
            raise Refused(404, told, "model", "model_not_found") from error
        hyperparams, record = checkpoint.read_about(path)
        raw = record["run"] if isinstance(record.get("run"), dict) else {}
        raw = without_own({name: value for name, value in raw.items() if name != "seed"})
        if raw.get("lr_decay_iters") == raw.get("max_iters"):
            raw.pop("lr_decay_iters", None)  # it was not set: see Run.__post_init__
        return name, raw | {"model_hyperparams": hyperparams}

    def model_names(self) -> list[str]:
        return sorted(path.name for path in self.models.glob("*") if path.suffix in MODEL_SUFFIXES and path.is_file())

    def dataset_for(self, asked: Training, run: options.Run, base: str | None, chosen: dict) -> Job:
        """The dataset that `training_file` names, or one of that file alone, encoded as the model needs it."""
        division = chosen.get("dataset", {}).get("data_division")
        if not asked.training_file.startswith("ds-"):
            vocab_size = chosen.get("model_hyperparams", {}).get("vocab_size") if base is None else None
            share = round(1 - run.dataset.data_division, 9)
            return self.assemble(assemble.Recipe(files=[asked.training_file], encoder=base, vocab_size=vocab_size,
                                                 validation_share=share))
        made_of = self.get("ds", asked.training_file, "training_file")
        if division is not None:
            key, told = "hyperparameters.dataset.data_division", "the dataset's validation_share says what validates"
            raise Refused(400, f"{key}: {told}; leave it out", key)
        if made_of.status in ("failed", "cancelled"):
            told = f"training_file = {made_of.id}: that dataset has {made_of.status}; assemble it anew"
            raise Refused(400, told, "training_file")
        if base and made_of.status == "succeeded":
            own = checkpoint.read_encoder(self.model_file(base)).fingerprint
            if encoders.load(made_of.folder / assemble.ENCODER).fingerprint != own:
                raise Refused(400, f"training_file = {made_of.id}: was not encoded as the model {base} needs it; "
                              f'assemble it with "encoder": {show(base)}', "training_file")
        return made_of

    # -- stopping and going on

    def stop(self, job: Job, wanted: str) -> None:
        """Ask a job to become "cancelled" or "paused". A running one does so once its child has saved and ended."""
        with self.lock:
            self.check_there(job)
            if job.status in WAITING or (job.status == "paused" and wanted == "cancelled"):
                job.tell(wanted)
                job.set(status=wanted, finished=time.time() if wanted == "cancelled" else None)
            elif job.status == "running":
                self.ask(job, wanted)
            elif job.status != wanted:
                raise Refused(409, f"the job {job.id} has {job.status} and cannot become {wanted}", "id", "not_running")

    def ask(self, job: Job, wanted: str) -> None:
        before = job.about["wanted"]
        job.set(wanted=wanted)
        if before is None:  # a second signal would end it before it has saved
            job.child.signal(signal.SIGTERM)
            job.set(told=True)
            job.asked_at = time.monotonic()

    def resume(self, job: Job) -> None:
        """Let a job that is paused, cancelled or failed go on from where it was saved."""
        with self.lock:
            self.check_there(job)
            if job.status == "running" and job.about["wanted"]:
                raise Refused(409, f"the job {job.id} is still saving; try again in a moment", "id", "still_running")
            if job.status == "succeeded":
                raise Refused(409, f"the job {job.id} has succeeded: there is nothing to resume", "id", "not_paused")
            if job.status not in (*WAITING, "running"):
                made_of = self.jobs.get(needed := job.request.get("dataset", ""))
                if needed and not made_of:
                    told = f"the job {job.id} needs the dataset {needed}, which was deleted; make it again of the same"
                    raise Refused(409, f"{told} files, and it has the same id", "id", "dataset_deleted")
                if made_of and made_of.status in ("failed", "cancelled"):
                    made_of.set(status="queued", error=None, finished=None)
                job.tell("resumed")
                job.set(status="queued", error=None, finished=None, wanted=None)

    # -- deleting

    def check_there(self, job: Job) -> None:
        """Raises Refused (404) where it was deleted since it was found."""
        if self.jobs.get(job.id) is not job:
            raise Refused(404, f"there is no {self.shelves[job.kind].what} {show(job.id)}", "id", "not_found")

    def remove(self, job: Job) -> None:
        """Delete a job and all in its folder. Raises Refused (409) while it runs or what it made is needed."""
        what = self.shelves[job.kind].what
        with self.lock:
            self.check_there(job)
            if job.status in RUNNING or job.child.alive():
                raise Refused(409, f"the {what} {job.id} is {job.status}; cancel it first", "id", "still_running")
            if reader := self.reader_of(job):
                told = f"is needed by the {self.shelves[reader.kind].what} {reader.id}, which is {reader.status}"
                raise Refused(409, f"the {what} {job.id} {told}; cancel or delete that first", "id", "in_use")
            doomed = self.shelves[job.kind].set_aside(job.id)
            del self.jobs[job.id]
            self.keys = {key: name for key, name in self.keys.items() if name != job.id}
        shutil.rmtree(doomed, ignore_errors=True)  # a kill in the middle: the next server removes what is left

    def reader_of(self, made_of: Job) -> Job | None:
        """A job that is still to read that dataset: a run on it, or a dataset that takes its encoder."""
        for job in self.all("ftjob"):
            if job.request.get("dataset") == made_of.id and job.status in (*WAITING, *RUNNING, "paused"):
                return job
        waiting = (job for job in self.all("ds") if job.status in WAITING)
        return next((job for job in waiting if job.request["recipe"]["encoder"] == made_of.id), None)

    def remove_file(self, name: str) -> None:
        """Delete an uploaded file. Raises Refused (409) while a dataset is still to be made of it."""
        with self.lock:
            if job := self.uses(name):
                told = f"the file {name} is needed by the dataset {job.id}, which is {job.status}"
                raise Refused(409, told, "file_id", "in_use")
            self.uploads.remove(name)

    def uses(self, file: str) -> Job | None:
        """A dataset that is still to be made of that file."""
        waiting = (job for job in self.all("ds") if job.status in ("queued", "running"))
        return next((job for job in waiting if file in job.request["recipe"]["files"]), None)

    # -- watching

    def start(self) -> None:
        """Find out what became of the jobs of the server before, and begin to watch."""
        with self.lock:
            for job in self.jobs.values():
                job.catch_up()
                if job.status == "running" and job.about["wanted"] and not job.about.get("told"):
                    job.child.signal(signal.SIGTERM)
                    job.set(told=True)
                if job.status == "running" and job.about["wanted"]:
                    job.asked_at = time.monotonic()
        self.thread.start()

    def stop_all(self, seconds: float) -> None:
        """The server ends: so do its children, each at a step that is saved; the next server lets them go on."""
        with self.lock:
            self.closing.set()
            for job in self.running():
                if job.about["wanted"] is None:
                    self.ask(job, "queued")
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.running():
            time.sleep(0.05)
        self.thread.join(timeout=5)

    def running(self) -> list[Job]:
        with self.lock:
            return [job for job in self.jobs.values() if job.status == "running"]

    def watch(self) -> None:
        while not (self.closing.is_set() and not self.running()):
            try:
                with self.lock:
                    self.tick()
            except Exception as error:  # a full disk, above all: the next look may see another
                print(f"jobs: {type(error).__name__}: {error}", file=sys.stderr)
            self.closing.wait(TICK) if not self.closing.is_set() else time.sleep(TICK)

    def tick(self) -> None:
        for job in list(self.jobs.values()):
            job.store()
        for job in self.running():
            ended = not job.child.alive()  # before the last look at what it has told
            self.tell_metrics(job)
            self.tell_warnings(job)
            if ended:
                self.judge(job)
            elif time.monotonic() - job.asked_at > PATIENCE:
                job.tell(f"did not end within {PATIENCE} seconds and was killed", "warn")
                job.child.kill()
        if self.closing.is_set():
            return
        for kind in KINDS:
            free = self.at_once - sum(job.kind == kind for job in self.running())
            waiting = [job for job in reversed(self.all(kind)) if job.status in WAITING]
            for job in waiting:
                if free > 0 and self.begin(job):
                    free -= 1

    def begin(self, job: Job) -> bool:
        """Start a job's child, if it can be; whether it runs now."""
        if job.child.alive():  # of a server that was killed while it closed
            job.set(status="running")
            return True
        try:
            work = KINDS[job.kind].work(self, job)
        except (UserError, OSError) as error:
            message = self.names.rewrite(str(error))
            job.fail(message, getattr(error, "code", None) or error_code(message))
            return False
        if work is None:
            return False
        log = job.folder / LOG
        job.asked_at = math.inf
        job.set(status="running", wanted=None, told=False, result=str(work.result), started=time.time(),
                log_start=log.stat().st_size if log.exists() else 0)
        job.child, job.n_warnings, job.warned = Child(job.folder), 0, job.first_warnings()
        try:
            job.child.start(work.argv)
        except OSError as error:
            job.fail(f"the process could not be started: {error.strerror}", "server_error")
            return False
        job.tell("started")
        return True

    def judge(self, job: Job) -> None:
        """A child is gone. What it has left says what became of the job."""
        wanted, code = job.about["wanted"], job.child.code
        if os.path.isfile(job.about["result"]):
            job.tell("succeeded")
            job.set(status="succeeded", wanted=None, finished=time.time())
        elif wanted:
            unsaved = self.names.rewrite(job.unsaved())
            if unsaved:
                job.tell(unsaved, "warn")
            job.tell("stopped with the server, to go on with the next one" if wanted == "queued" else wanted)
            job.set(status=wanted, wanted=None, finished=time.time() if wanted == "cancelled" else None,
                    error={"message": unsaved, "code": "not_saved"} if unsaved and wanted != "queued" else None)
        else:
            ended = "ended while no server was there to see it" if code is None else f"ended with code {code}"
            if code is not None and code < 0:
                ended = f"was killed by {signal.Signals(-code).name}"
            words = self.names.rewrite(job.last_words()) if code is None or code > 0 else ""
            job.fail(words or f"the process {ended} before its work was done; it can be resumed",
                     error_code(words) if words and code == 2 else "interrupted")

    def tell_warnings(self, job: Job) -> None:
        for text in map(self.names.rewrite, job.new_warnings()):
            if text not in job.warned:
                job.tell(text, "warn")

    def tell_metrics(self, job: Job) -> None:
        for line in job.metrics.read():
            data = {"step": line["step"], "total_steps": job.about["max_iters"]}
            names = {"loss": "train_loss", "val_loss": "valid_loss"} if "loss" in line else {
                "train_loss": "full_train_loss", "val_loss": "full_valid_loss"}  # fmt: skip
            data |= {new: line[old] for old, new in names.items() if old in line}
            told = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in data.items()
                             if "loss" in name and value is not None)
            level = "warn" if "rollback" in line else "info"
            what = f"rollback: {line['why']}" if "rollback" in line else told
            job.tell(f"step {line['step']:,}/{job.about['max_iters']:,}: {what}", level, data)


def error_code(message: str) -> str:
    """Whether an error is of this server's disk or of what was asked for."""
    disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    return "server_error" if any(os.strerror(number) in message for number in disk) else "invalid_request"


def without_own(raw: dict, prefix: str = "") -> dict:
    """A configuration less the keys that the server sets itself."""
    return {name: without_own(value, f"{prefix}{name}.") if isinstance(value, dict) else value
            for name, value in raw.items() if f"{prefix}{name}" not in OWN_KEYS}


def presets() -> dict[str, Path]:
    """The configurations of config/, by name."""
    return {path.stem: path for path in sorted(options.CONFIG_FOLDER.glob("*.json")) if path.name != "schema.json"}


def model_name(base: str, suffix: str | None, job: str, arch: str) -> str:
    """The file name of what a run makes: ft-tiny-mine-0a1b2c3d.strawberry"""
    for ending in (*CONFIGS, "json", "safetensors"):
        base = base.removesuffix(f".{ending}")
    base = re.sub(r"[^A-Za-z0-9._-]", "-", re.sub(r"^ft-(.*)-[0-9a-f]{8}$", r"\1", base))[:40]
    return "-".join(part for part in ("ft", base, suffix, job[-8:]) if part) + f".{arch}"


def step_name(model: str, step: int) -> str:
    """The name under which a checkpoint of a run can be sampled: ft-tiny-mine-0a1b2c3d-step-200.strawberry"""
    stem, dot, arch = model.rpartition(".")
    return f"{stem}-step-{step}{dot}{arch}"


class Training(NamedTuple):
    """A request for a run. `key` and `body` are hashes: of the Idempotency-Key, if there is one, and of the body."""

    model: str
    training_file: str
    hyperparameters: dict
    suffix: str | None = None
    seed: int | None = None
    metadata: dict | None = None
    key: str | None = None
    body: str | None = None
