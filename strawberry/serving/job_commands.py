"""The commands that jobs run as child processes: assemble.py for a dataset, train.py for a run.

To add a kind of job, write a function that returns its JobCommand and add a line to JOB_KINDS. Queueing, recovery, stop
and resume work for all kinds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import encoder as encoders
from model import CONFIGS
from strawberry.common import atomic_write
from strawberry.config import to_dict
from strawberry.data import assemble
from strawberry.data.objectives import count_extra_ids
from strawberry.run_config import Run, make_run
from strawberry.serving.id_directory import RequestError
from strawberry.serving.job import Job
from strawberry.serving.job_requests import is_public_encoder
from strawberry.serving.job_store import JobStore
from strawberry.serving.settings import REPOSITORY
from strawberry.training import checkpoint


class JobCommand(NamedTuple):
    """The command of a job: arguments for Python, and the file that exists only after success."""

    argv: list[str]
    result: Path


def dataset_command(jobs: JobStore, job: Job) -> JobCommand | None:
    """The command of a dataset: strawberry.data.assemble with the job's recipe, in which paths replace the ids of files
    and encoder.
    """
    recipe = dict(job.request["recipe"])
    recipe["files"] = [str(jobs.uploads.path(name, "files")) for name in recipe["files"]]
    given = recipe["encoder"]
    if given is not None and not is_public_encoder(given):
        recipe["encoder"] = str(job.folder / "given.bin")
        jobs.load_encoder(given).save(recipe["encoder"])
    atomic_write(job.folder / "recipe.json", json.dumps(recipe).encode())
    (job.folder / assemble.PROGRESS).unlink(missing_ok=True)
    return JobCommand(["-m", "strawberry.data.assemble", "recipe.json", "."], job.folder / assemble.RESULT)


def training_command(jobs: JobStore, job: Job) -> JobCommand | None:
    """The command of a training run: train.py with the job's configuration; None while its dataset is not ready. Raises
    RequestError if the dataset failed or was cancelled.
    """
    made_of = jobs.get("ds", job.request["dataset"], "training_file")
    if made_of.status in ("failed", "cancelled"):
        message = (made_of.about.get("error") or {}).get("message", made_of.status)
        raise RequestError(
            400, f"the dataset {made_of.id} could not be assembled: {message}", "training_file", "invalid_file"
        )
    if made_of.status != "succeeded":
        return None
    run = build_run(jobs, job, made_of.folder)
    atomic_write(job.folder / "run.json", json.dumps(to_dict(run)).encode())
    root = job.folder / "checkpoints"
    root.mkdir(exist_ok=True)
    saved = any(not path.name.startswith(checkpoint.UNFINISHED) for path in root.glob("*step_*"))
    resume = ["--init_from=resume"] if saved else []
    return JobCommand(
        [str(REPOSITORY / "train.py"), "--config", str(job.folder / "run.json"), *resume], Path(run.model_path)
    )


def build_run(jobs: JobStore, job: Job, made_of: Path) -> Run:
    """The Run of a job, with the paths, data_division and vocabulary of its dataset."""
    raw = json.loads(json.dumps(job.request["raw"]))
    result = json.loads((made_of / assemble.RESULT).read_bytes())
    raw.setdefault("dataset", {}).update(
        path=str(made_of / assemble.TOKENS), data_division=result["data_division"], load_from_file=True
    )
    raw.setdefault("checkpoints", {}).update(path=str(job.folder / "checkpoints"), create_checkpoints=True)
    raw |= {
        "encoder_path": str(made_of / assemble.ENCODER),
        "img_path": None,
        "model_path": str(jobs.models / job.about["model"]),
    }
    base = job.request["base"]
    raw["init_from"] = f"{jobs.find_model_file(base)},pretrained" if base else "scratch"
    run = make_run(raw, CONFIGS)
    hyper = run.model_hyperparams
    if not base and not job.request["vocab_size"]:
        encoder = encoders.load(made_of / assemble.ENCODER)
        spare = count_extra_ids(run.objective, getattr(hyper, "kind", "decoder"), hyper.block_size, encoder)
        hyper.vocab_size = encoder.vocab_size + spare
    return run


class JobKind(NamedTuple):
    """A kind of job: its folder, its name in messages, and a function that returns its command, or None if the job must
    wait.
    """

    folder: str
    what: str
    command: Callable[[JobStore, Job], JobCommand | None]


JOB_KINDS = {  # by the prefix of their ids
    "ds": JobKind("datasets", "dataset", dataset_command),
    "ftjob": JobKind("runs", "fine-tuning job", training_command),
}
