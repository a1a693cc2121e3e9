"""Every run that the server knows: its own jobs, and those that train.py wrote below the folders of --runs.

A run from the command line is a folder with a metrics.jsonl. It is found by looking for that file, read as it grows,
and named by the model that it makes. What it is comes from its record.json, or, where an earlier version trained it,
from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from model import CONFIGS
from strawberry import machine
from strawberry.common import UserError, atomic_write, show
from strawberry.config import parse_config, to_dict
from strawberry.run_config import make_run, parse_arguments
from strawberry.serving.id_directory import RequestError, disk_use
from strawberry.serving.job import Job, MetricsTail, checkpoint_name
from strawberry.serving.job_requests import SERVER_KEYS, find_presets, find_starting_point, iterate_keys
from strawberry.serving.job_store import JobStore
from strawberry.training import plot
from strawberry.training.checkpoint import LATEST, MODEL, Checkpoint, list_checkpoints
from strawberry.training.lock import LOCK, is_dead, read_holder
from strawberry.training.metrics import METRICS
from strawberry.training.record import NOTES, RECORD, read_record

MAX_DEPTH, MAX_RUNS = 4, 1000  # folders below one of --runs that are searched, runs that are found
SCAN_SECONDS = 3  # between searches
MAX_NOTES = 100_000  # characters
MAX_SAMPLES = 200  # newest evaluations whose text is told
UNCOMPARED = {*SERVER_KEYS, "seed"}  # keys whose values are not shown as changes of a preset


def flatten(raw: dict) -> dict:
    """{"a": {"b": 1}} as {"a.b": 1}. An empty section is left out."""
    flat = {}
    for name in iterate_keys(raw):
        value = raw
        for part in name.split("."):
            value = value[part]
        if value != {}:
            flat[name] = value
    return flat


def without_paths(run: dict) -> dict:
    return {name: value for name, value in flatten(run).items() if name not in SERVER_KEYS}


def changed_values(run: dict, base: dict) -> dict:
    """The dotted keys of `run` whose value is not that of `base`; keys that `base` lacks too."""
    flat, below = flatten(run), flatten(base)
    changed = {name: value for name, value in flat.items()
               if name not in UNCOMPARED and (name not in below or below[name] != value)}  # fmt: skip
    if flat.get("lr_decay_iters") == flat.get("max_iters") and below.get("lr_decay_iters") == below.get("max_iters"):
        changed.pop("lr_decay_iters", None)  # it was not set: see Run.__post_init__
    return changed


class FolderRun:
    """A run that train.py wrote from the command line."""

    source = "command line"

    def __init__(self, folder: Path):
        self.folder = folder
        self.id = f"run-{hashlib.sha256(str(folder).encode()).hexdigest()[:24]}"
        self.metrics, self.name, self.own_name = MetricsTail(folder / METRICS), folder.name, folder.name
        self.stamp, self.about = None, {}

    def refresh(self) -> None:
        """Read what is new."""
        self.metrics.read()
        stamp = self._stamp()
        if stamp != self.stamp:
            about = read_record(self.folder) or self._read_checkpoint()
            self.stamp, self.about = stamp, about if is_usable(about) else {}
            self.own_name = self._find_name()

    def _stamp(self) -> tuple:
        """Changes when the run starts, goes on or has another first checkpoint."""
        with contextlib.suppress(OSError):
            about = os.stat(self.folder / RECORD)
            return (about.st_mtime_ns, about.st_size)
        return (self.metrics.inode, (self.folder / LATEST).exists())

    def _read_checkpoint(self) -> dict:
        """What the newest checkpoint says, of a run without a record."""
        for found in list_checkpoints(self.folder)[:1]:
            run = found.meta.get("run")
            return {"run": run} if isinstance(run, dict) else {}
        return {}

    def _find_name(self) -> str:
        path = self.run.get("model_path")
        stem = re.sub(r"\.[A-Za-z][\w-]*$", "", re.split(r"[/\\]", path)[-1]) if isinstance(path, str) else ""
        archived = re.fullmatch(r"earlier_\d+", self.folder.name)
        name = f"{stem or self.folder.name}-{self.folder.name}" if archived else stem or self.folder.name
        return re.sub(r"[^A-Za-z0-9._-]", "-", name)

    @property
    def run(self) -> dict:
        return self.about.get("run", {})

    @property
    def latest(self) -> dict:
        return self.metrics.latest

    @property
    def holder(self) -> dict:
        """The process that writes here, as its lock names it; empty where none does."""
        holder = read_holder(self.folder / LOCK) if (self.folder / LOCK).exists() else {}
        return {} if not holder or is_dead(holder) else holder

    @property
    def status(self) -> str:
        if self.holder:
            return "running"
        step, end = self.latest.get("step"), self.run.get("max_iters")
        return "succeeded" if isinstance(step, int) and isinstance(end, int) and step >= end else "stopped"

    @property
    def max_iters(self) -> int | None:
        return self.run.get("max_iters")

    @property
    def started(self) -> float:
        with contextlib.suppress(OSError):
            return self.about.get("started") or os.stat(self.folder / METRICS).st_ctime
        return 0.0

    @property
    def preset(self) -> str:
        """The name of its config file, without .json where that is a preset."""
        name = re.split(r"[/\\]", self.about.get("config") or "")[-1]
        return name.removesuffix(".json") if name.removesuffix(".json") in find_presets() else name

    @property
    def dataset(self) -> str:
        return re.split(r"[/\\]", self.run.get("dataset", {}).get("path", "").rstrip("/\\"))[-1]

    def base(self, index: RunIndex) -> dict:
        """Every key of its config file as that is now; where it is gone, the defaults of its arch."""
        with contextlib.suppress(UserError):
            return index.resolve(Path(self.about["config"])) if self.about.get("config") else {}
        return {}

    def changed(self, index: RunIndex) -> dict:
        arch = self.run.get("model_hyperparams", {}).get("arch")
        base = self.base(index) or (index.defaults(arch) if arch in CONFIGS else {})
        changed = changed_values(self.run, base)
        if self.about.get("config") and self.about.get("command"):  # the others follow from these
            asked = self.overrides()
            changed = {name: value for name, value in changed.items() if name in asked}
        return changed

    def overrides(self) -> set[str]:
        """The keys that its command line sets."""
        with contextlib.suppress(ValueError):
            words = shlex.split(self.about["command"])
            script = next((i for i, word in enumerate(words) if word.endswith("train.py")), len(words))
            return {name for name, _ in parse_arguments(words[script + 1 :])[1]}
        return set()

    def command(self, index: RunIndex) -> str | None:
        command, seed = self.about.get("command"), self.run.get("seed")
        return f"{command} --seed={seed}" if command and "--seed" not in command and seed is not None else command

    def checkpoints(self) -> list[Checkpoint]:
        return list_checkpoints(self.folder)

    def checkpoint_model(self, step: int) -> str:
        return checkpoint_name(f"{self.name}.{self.run.get('model_hyperparams', {}).get('arch', 'safetensors')}", step)

    def events(self) -> list[dict]:
        """What its metrics tell, the newest first: evaluations and rollbacks."""
        found = []
        for line in plot.each_line(self.folder / METRICS):
            if "rollback" in line:
                found.append({"level": "warn", "message": f"step {line['step']:,}: rollback: {line.get('why')}"})
            elif line.get("val_loss") is not None:
                message = f"step {line['step']:,}: validation loss {line['val_loss']:.4f}"
                found.append({"level": "info", "message": message})
        return found[-100:][::-1]

    def stop(self) -> None:
        """Ask its process to save and end. Raises RequestError (409) if there is none on this machine."""
        holder = self.holder
        if holder.get("host") != socket.gethostname() or not machine.is_running(holder["pid"], holder["born"]):
            raise RequestError(409, f"the run {self.name} has no process on this machine", "run_id", "not_running")
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(holder["pid"], signal.SIGTERM)

    def remove(self) -> None:
        """Delete what train.py wrote in its folder. Raises RequestError (409) while it runs."""
        if self.holder:
            raise RequestError(409, f"the run {self.name} is running; stop it first", "run_id", "still_running")
        for path in self.folder.glob("*step_*"):
            if re.fullmatch(r"(\.old_|\.tmp_)?step_\d{8,18}(_\d+)?", path.name) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
        for name in (METRICS, RECORD, NOTES, LATEST, LOCK):
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # other files that are there stay


class JobRun:
    """A run that was started over HTTP, in the same words."""

    source = "server"

    def __init__(self, job: Job, jobs: JobStore, about: dict):
        self.job, self.jobs, self.id = job, jobs, job.id
        self.folder, self.metrics, self.latest = job.folder / "checkpoints", job.metrics, job.metrics.latest
        self.status, self.max_iters = job.status, job.about["max_iters"]
        self.started = job.about["started"] or job.about["created"]
        self.preset, self.about = job.request["model"], about
        self.name = re.sub(r"\.[A-Za-z][\w-]*$", "", job.about["model"]).removeprefix("ft-")

    @property
    def run(self) -> dict:
        return self.about.get("run") or self.job.request["raw"]

    @property
    def dataset(self) -> str:
        made_of = self.jobs.jobs.get(self.job.request["dataset"])
        if made_of is None:
            return "deleted"
        files = made_of.request["recipe"]["files"]
        known = self.jobs.uploads.known.get(files[0], {}).get("filename", "") if len(files) == 1 else ""
        return made_of.request["name"] or known or made_of.id[:11]

    def base(self, index: RunIndex) -> dict:
        with contextlib.suppress(UserError):
            return index.resolve_starting_point(self.preset)
        return {}

    def changed(self, index: RunIndex) -> dict:
        return index.get_cached(("changed", self.id), self._find_changed)

    def _find_changed(self, index: RunIndex) -> dict:
        chosen, base = flatten(self.job.request["chosen"]), flatten(self.base(index))
        return {name: value for name, value in chosen.items() if name not in base or base[name] != value}

    def command(self, index: RunIndex) -> str | None:
        """train.py with the keys that differ, on the dataset in the server's --data."""
        if self.preset not in find_presets():
            return None
        folder = f"{index.data_name}/datasets/{self.job.request['dataset']}"
        model = self.job.about["model"].removeprefix("ft-")
        given = {**self.changed(index), "seed": self.job.about["seed"], "dataset.path": f"{folder}/tokens.bin",
                 "encoder_path": f"{folder}/encoder.bin", "model_path": f"bin/{model}",
                 "checkpoints.path": f"bin/ck_{self.name}"}  # fmt: skip
        for name in ("dataset.data_division", "model_hyperparams.vocab_size"):
            if (value := flatten(self.run).get(name)) is not None and self.about:
                given[name] = value
        words = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given.items()]
        return shlex.join(["python", "train.py", "--config", f"{self.preset}.json", *words])

    def checkpoints(self) -> list[Checkpoint]:
        return list_checkpoints(self.folder)

    def checkpoint_model(self, step: int) -> str:
        return checkpoint_name(self.job.about["model"], step)

    def events(self) -> list[dict]:
        return [{"level": event["level"], "message": event["message"]} for event in self.job.events()[:100]]


class RunIndex:
    """All runs, by id. The folders are searched again after SCAN_SECONDS."""

    def __init__(self, folders: list[str], data: str, jobs: Callable[[], JobStore]):
        self.folders, self.get_jobs = [Path(folder).resolve() for folder in folders], jobs
        self.data, self.data_name = Path(data).resolve(), Path(data).name
        self.found: dict[str, FolderRun] = {}
        self.searched_at, self.lock = -float("inf"), threading.Lock()
        self.resolved: dict[tuple, dict] = {}  # what takes a moment to read, by what it is

    def all(self) -> list[FolderRun | JobRun]:
        """The newest first."""
        jobs = self.get_jobs()
        with self.lock:
            if time.monotonic() - self.searched_at > SCAN_SECONDS:
                self.search()
            for run in self.found.values():
                run.refresh()
            self.separate_names()
            found = [*self.found.values(), *map(self.of_job, jobs.all("ftjob"))]
        return sorted(found, key=lambda run: (-run.started, run.id))

    def get(self, name: str) -> FolderRun | JobRun:
        """Raises RequestError (404) if there is no such run."""
        if name.startswith("ftjob-"):
            return self.of_job(self.get_jobs().get("ftjob", name, "run_id"))
        found = next((run for run in self.all() if run.id == name), None)
        if found is None:
            raise RequestError(404, f"there is no run {show(name)}", "run_id", "not_found")
        return found

    def of_job(self, job: Job) -> JobRun:
        folder = job.folder / "checkpoints"
        with contextlib.suppress(OSError):
            stamp = os.stat(folder / RECORD).st_mtime_ns
            return JobRun(job, self.get_jobs(), self.get_cached((job.id, stamp), lambda _: read_record(folder)))
        return JobRun(job, self.get_jobs(), {})

    def get_cached(self, key: tuple, find: Callable[[RunIndex], dict]) -> dict:
        """find(self), once for each key."""
        if key not in self.resolved:
            self.resolved[key] = find(self)
        return self.resolved[key]

    def search(self) -> None:
        paths = dict.fromkeys(path for folder in self.folders for path in self.walk(folder))
        runs = [self.found.get(id_of(path)) or FolderRun(path) for path in list(paths)[:MAX_RUNS]]
        self.found = {run.id: run for run in runs}
        self.searched_at = time.monotonic()

    def walk(self, folder: Path) -> Iterator[Path]:
        """The folders with a metrics.jsonl, without this server's own jobs."""
        for parent, folders, files in os.walk(folder):
            depth = len(Path(parent).relative_to(folder).parts)
            folders[:] = sorted(name for name in folders if depth < MAX_DEPTH and not re.match(r"\.|step_\d", name)
                                and Path(parent, name) != self.data)  # fmt: skip
            if METRICS in files and not Path(parent, METRICS).is_symlink():
                yield Path(parent)

    def separate_names(self) -> None:
        """Runs with the same model's name get their folder's too, and where that is the same, the end of their id."""
        for run in self.found.values():
            run.name = run.own_name
        for attempt in ("folder", "id"):
            names: dict[str, list[FolderRun]] = {}
            for run in self.found.values():
                names.setdefault(run.name, []).append(run)
            for run in (run for runs in names.values() if len(runs) > 1 for run in runs):
                more = re.sub(r"[^A-Za-z0-9._-]", "-", run.folder.name) if attempt == "folder" else run.id[-6:]
                run.name += "" if run.name.endswith(f"-{more}") else f"-{more}"

    def resolve(self, path: Path) -> dict:
        """Every key of a config file, with defaults. Raises UserError."""
        try:
            key = (path, path.stat().st_mtime_ns)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        return self.get_cached(key, lambda _: read_config(path))

    def resolve_starting_point(self, name: str) -> dict:
        """Every key of a preset or a model, with defaults. Raises UserError if there is none."""
        if name in (presets := find_presets()):
            return self.resolve(presets[name])
        _, raw = find_starting_point(self.get_jobs(), name)
        return to_dict(make_run(raw, CONFIGS))

    def defaults(self, arch: str) -> dict:
        raw = {"model_hyperparams": {"arch": arch}}
        return self.get_cached(("defaults", arch), lambda _: to_dict(make_run(raw, CONFIGS)))

    def find_checkpoint_file(self, name: str) -> Path | None:
        """The model file of the checkpoint of that name, of a run from the command line."""
        asked = re.fullmatch(r"(.+)-step-(\d{1,18})(\.\w[\w-]*)", name, re.ASCII)
        for run in self.all() if asked else ():
            if isinstance(run, FolderRun) and run.checkpoint_model(int(asked[2])) == name:
                path = run.folder / f"step_{int(asked[2]):08d}" / MODEL
                return path if path.is_file() else None
        return None


def read_config(path: Path) -> dict:
    """Every key of a config file, with defaults. Raises UserError."""
    raw = parse_config(path)
    raw.pop("$schema", None)
    return to_dict(make_run(raw, CONFIGS))


def is_usable(record: dict) -> bool:
    """Whether a record, which may be of another program, has what is read of it."""
    run = record.get("run", {})
    sections = [run.get("model_hyperparams"), run.get("dataset")]
    texts = [record.get("command") or "", record.get("config") or "", run.get("model_path", "")]
    return (all(isinstance(one, dict) for one in sections) and all(isinstance(text, str) for text in texts)
            and isinstance(record.get("started", 0), (int, float)))  # fmt: skip


def id_of(folder: Path) -> str:
    return FolderRun(folder).id


def read_notes(run: FolderRun | JobRun) -> str:
    with contextlib.suppress(OSError):
        return (run.folder / NOTES).read_text("utf-8", "replace")[:MAX_NOTES]
    return ""


def write_notes(run: FolderRun | JobRun, text: str) -> None:
    """Keep what a person wrote of the run beside it. Raises RequestError (507) where the disk refuses."""
    try:
        run.folder.mkdir(exist_ok=True)
        atomic_write(run.folder / NOTES, text.encode("utf-8", "replace"))
    except (OSError, UserError) as error:
        cause = error.__cause__ if isinstance(error, UserError) else error
        raise RequestError(507, f"the notes cannot be stored: {getattr(cause, 'strerror', cause)}", "text") from error


def read_samples(run: FolderRun | JobRun) -> list[dict]:
    """The text of each evaluation, the newest first."""
    path = run.folder / METRICS
    lines = plot.each_line(path) if path.exists() else ()
    found = [{"step": line["step"], "text": line["sample"], "val_loss": line.get("val_loss")} for line in lines
             if isinstance(line.get("sample"), str)]  # fmt: skip
    return found[-MAX_SAMPLES:][::-1]


def own_disk_use(run: FolderRun | JobRun) -> int:
    """Bytes of its folder; earlier runs that were moved into it count as themselves."""
    inner = sum(disk_use(path) for path in run.folder.glob("earlier_*") if path.is_dir())
    return disk_use(run.job.folder if isinstance(run, JobRun) else run.folder) - inner
