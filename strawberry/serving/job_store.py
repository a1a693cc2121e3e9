"""All jobs of the data directory, data/datasets/<id> and data/runs/<id>: lookup, creation, stop, resume, deletion."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import encoder as encoders
from strawberry import model_file as model_files
from strawberry.common import nearest, show
from strawberry.data import assemble
from strawberry.inference.loading import MODEL_SUFFIXES
from strawberry.serving.id_directory import IdDirectory, RequestError, new_id, read_job_file, write_job_file
from strawberry.serving.job import FINAL, RUNNING, WAITING, Job
from strawberry.serving.settings import REPOSITORY
from strawberry.serving.uploads import Uploads
from strawberry.training import checkpoint


class PathNames:
    """Replaces paths of this server in messages by names that the client knows.

    An uploaded file becomes its file name and line, a dataset's token file the dataset's name, and a file in a job's
    folder, or a model, its name there. Any other path of this machine is shortened to its last part.

        /srv/data/files/file-0123…/content.jsonl:2 is not JSON    →    book.jsonl, line 2 is not JSON
    """

    OTHER = re.compile(r"(?<![\w/.:])(?:/[\w.@%+-]+)+/[\w.@%+-]*")  # a path of at least two parts

    def __init__(self, jobs: JobStore, data: Path):
        self.jobs = jobs
        start, digits = r"(?<![\w.@%+-])", "[0-9a-f]{24}"
        root = start + re.escape(str(data))
        self.file = re.compile(rf"{root}/files/(file-{digits})(?:/[\w.-]*\w)*(?::(\d+)\b)?")
        self.dataset = re.compile(rf"{root}/datasets/(ds-{digits})/(tokens|encoder|given)\.bin\b")
        self.config = re.compile(rf"^(?:{root}/runs/ftjob-{digits}/run|recipe)\.json: ")
        within = sorted(map(str, (data, jobs.models, REPOSITORY)), key=len, reverse=True)  # may be nested
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


class JobStore:
    """Every job of a data directory. Only one server at a time may use the directory."""

    def __init__(self, data: Path, models: Path, uploads: Uploads, kinds: dict):
        self.uploads, self.models, self.kinds = uploads, models.resolve(), kinds
        self.directories = {name: IdDirectory(data / kind.folder, name, kind.what) for name, kind in kinds.items()}
        self.lock = threading.RLock()
        self.jobs: dict[str, Job] = {}
        self.keys: dict[str, str] = {}  # idempotency key → job
        self.names = PathNames(self, data)
        for directory in self.directories.values():
            for name in directory.names():
                with contextlib.suppress(OSError, ValueError, KeyError):
                    self.register(Job(directory.folder(name), read_job_file(directory.folder(name))))

    def register(self, job: Job) -> None:
        self.jobs[job.id] = job
        if key := job.about.get("key"):
            self.keys[key] = job.id

    def get(self, kind: str, name: str, param: str | None = None) -> Job:
        """The job of that kind and id. Raises RequestError (404) if there is none."""
        self.directories[kind].folder(name, param)
        if name not in self.jobs:  # the directory has no readable job file
            raise RequestError(
                404, f"there is no {self.directories[kind].what} {show(name)}", param or "id", "not_found"
            )
        return self.jobs[name]

    def all(self, kind: str) -> list[Job]:
        """The jobs of a kind, newest first."""
        with self.lock:
            found = [job for job in self.jobs.values() if job.kind == kind]
        return sorted(found, key=lambda job: (-job.about["created"], job.id))

    def count(self, status: str, kind: str = "ftjob") -> int:
        return sum(job.status == status for job in self.all(kind))

    def find_model_file(self, name: str, param: str = "model") -> Path:
        """The path of a model. Only listed names are accepted, so a client cannot name a path. Raises RequestError
        (404).
        """
        known = self.list_models()
        if name not in known:
            raise RequestError(404, f"there is no model {show(name)}{nearest(name, known)}", param, "model_not_found")
        return self.models / name

    def find_checkpoint_file(self, name: str) -> Path | None:
        """The model file of the checkpoint with a name from checkpoint_name; None if it does not exist."""
        asked = re.fullmatch(r"(.+)-step-(\d{1,18})(\.\w[\w-]*)", name, re.ASCII)
        for job in self.all("ftjob") if asked else ():
            if job.about["model"] == asked[1] + asked[3]:
                path = job.folder / "checkpoints" / f"step_{int(asked[2]):08d}" / checkpoint.MODEL
                return path if path.is_file() else None
        return None

    def load_encoder(self, name: str) -> encoders.Encoder:
        """The encoder of a dataset that has succeeded, or of a model. Raises RequestError."""
        if name.startswith("ds-"):
            made_of = self.get("ds", name, "encoder")
            if made_of.status != "succeeded":
                raise RequestError(
                    409, f"encoder = {show(name)}: that dataset is {made_of.status}, not ready", "encoder"
                )
            return encoders.load(made_of.folder / assemble.ENCODER)
        return model_files.read_encoder(self.find_model_file(name, "encoder"))

    def remove_model(self, name: str) -> None:
        """Delete a model's file. Raises RequestError (409) if an unfinished job writes or reads it."""
        path = self.find_model_file(name)
        with self.lock:
            if job := self.find_job_of_model(name):
                raise RequestError(
                    409,
                    f"the model {name} is needed by the job {job.id}, which is {job.status}; cancel that first",
                    "model",
                    "model_in_use",
                )
            try:
                path.unlink()
            except OSError as error:
                raise RequestError(
                    500, f"the model {name} cannot be deleted: {error.strerror or 'the system refuses'}", "model"
                ) from error

    def find_job_of_model(self, name: str) -> Job | None:
        """An unfinished job that writes the model, starts from it, or uses its encoder; None if there is none."""
        for job in self.jobs.values():
            request = job.request
            needed = [request["recipe"]["encoder"]] if job.kind == "ds" else [job.about["model"], request["base"]]
            if job.status not in FINAL and name in needed:
                return job
        return None

    def new(self, kind: str, request: dict, name: str | None = None, **about) -> Job:
        """Create a job with status queued, or the status in `about`. Raises RequestError (507) if it cannot be stored.
        """
        directory, folder = self.directories[kind], None
        about = {"id": name or new_id(kind), "status": "queued", "created": time.time(), "started": None,
                 "finished": None, "wanted": None, "error": None, "request": request, **about}  # fmt: skip
        try:
            folder = directory.make_temporary()
            write_job_file(folder, about)
            job = Job(directory.publish(folder, about["id"]), about)
        except OSError as error:
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
            raise RequestError(507, f"the job cannot be stored: {error.strerror or error}") from error
        self.register(job)
        return job

    def list_models(self) -> list[str]:
        return sorted(path.name for path in self.models.glob("*") if path.suffix in MODEL_SUFFIXES and path.is_file())

    def stop(self, job: Job, wanted: str) -> None:
        """Request that a job becomes "cancelled" or "paused". A running job does so after its child has saved and
        exited. Raises RequestError (409) if the job's status does not allow it.
        """
        with self.lock:
            self.check_there(job)
            if job.status in WAITING or (job.status == "paused" and wanted == "cancelled"):
                job.log_event(wanted)
                job.set(status=wanted, finished=time.time() if wanted == "cancelled" else None)
            elif job.status == "running":
                self.request_stop(job, wanted)
            elif job.status != wanted:
                raise RequestError(
                    409, f"the job {job.id} has {job.status} and cannot become {wanted}", "id", "not_running"
                )

    def request_stop(self, job: Job, wanted: str) -> None:
        before = job.about["wanted"]
        job.set(wanted=wanted)
        if before is None:  # a second signal would kill the child before it has saved
            job.child.signal(signal.SIGTERM)
            job.set(told=True)
            job.stop_requested_at = time.monotonic()

    def resume(self, job: Job) -> None:
        """Queue a paused, cancelled or failed job again; it resumes from its last checkpoint. Raises RequestError (409)
        if it cannot.
        """
        with self.lock:
            self.check_there(job)
            if job.status == "running" and job.about["wanted"]:
                raise RequestError(
                    409, f"the job {job.id} is still saving; try again in a moment", "id", "still_running"
                )
            if job.status == "succeeded":
                raise RequestError(
                    409, f"the job {job.id} has succeeded: there is nothing to resume", "id", "not_paused"
                )
            if job.status not in (*WAITING, "running"):
                made_of = self.jobs.get(needed := job.request.get("dataset", ""))
                if needed and not made_of:
                    told = f"the job {job.id} needs the dataset {needed}, which was deleted; make it again of the same"
                    raise RequestError(409, f"{told} files, and it has the same id", "id", "dataset_deleted")
                if made_of and made_of.status in ("failed", "cancelled"):
                    made_of.set(status="queued", error=None, finished=None)
                job.log_event("resumed")
                job.set(status="queued", error=None, finished=None, wanted=None)

    def check_there(self, job: Job) -> None:
        """Raises RequestError (404) if the job was deleted after it was looked up."""
        if self.jobs.get(job.id) is not job:
            raise RequestError(404, f"there is no {self.directories[job.kind].what} {show(job.id)}", "id", "not_found")

    def remove(self, job: Job) -> None:
        """Delete a job and its folder. Raises RequestError (409) while it runs or another job needs it."""
        what = self.directories[job.kind].what
        with self.lock:
            self.check_there(job)
            if job.status in RUNNING or job.child.alive():
                raise RequestError(409, f"the {what} {job.id} is {job.status}; cancel it first", "id", "still_running")
            if reader := self.find_reader(job):
                told = f"is needed by the {self.directories[reader.kind].what} {reader.id}, which is {reader.status}"
                raise RequestError(409, f"the {what} {job.id} {told}; cancel or delete that first", "id", "in_use")
            doomed = self.directories[job.kind].rename_for_removal(job.id)
            del self.jobs[job.id]
            self.keys = {key: name for key, name in self.keys.items() if name != job.id}
        shutil.rmtree(doomed, ignore_errors=True)  # if this process is killed here, the next server removes the rest

    def find_reader(self, made_of: Job) -> Job | None:
        """An unfinished job that reads this dataset: a training run on it, or a dataset that uses its encoder; None if
        there is none.
        """
        for job in self.all("ftjob"):
            if job.request.get("dataset") == made_of.id and job.status in (*WAITING, *RUNNING, "paused"):
                return job
        waiting = (job for job in self.all("ds") if job.status in WAITING)
        return next((job for job in waiting if job.request["recipe"]["encoder"] == made_of.id), None)

    def remove_file(self, name: str) -> None:
        """Delete an uploaded file. Raises RequestError (409) while an unfinished dataset needs it."""
        with self.lock:
            if job := self.find_dataset_of(name):
                told = f"the file {name} is needed by the dataset {job.id}, which is {job.status}"
                raise RequestError(409, told, "file_id", "in_use")
            self.uploads.remove(name)

    def find_dataset_of(self, file: str) -> Job | None:
        """An unfinished dataset that reads this file; None if there is none."""
        waiting = (job for job in self.all("ds") if job.status in ("queued", "running"))
        return next((job for job in waiting if file in job.request["recipe"]["files"]), None)

    def list_running(self) -> list[Job]:
        with self.lock:
            return [job for job in self.jobs.values() if job.status == "running"]
