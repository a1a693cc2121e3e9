"""The routes of datasets and training runs: jobs, in the format of OpenAI's fine-tuning API."""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from fastapi import Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BeforeValidator, Field, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from strawberry.config import SENTENCE, declared, option, to_dict
from strawberry.data import assemble
from strawberry.serving.errors import ApiError
from strawberry.serving.id_directory import disk_use, paginate
from strawberry.serving.job import Job
from strawberry.serving.job_requests import TrainingRequest, create_dataset_job, create_training_job, find_presets
from strawberry.serving.protocol import After, Deleted, Limit
from strawberry.serving.service import Service, TheService
from strawberry.training import plot

WAIT_SECONDS = 45  # largest time that a response waits for a stopped job to end


MAX_FILES = 10_000
NO_NUL_PATTERN = "^[^\\u0000]*$"


@dataclass
class DatasetRequest(assemble.Recipe):
    """The contents and options of a dataset. The same files, by content, and the same options give the same dataset."""

    files: list[str] = option([], "ids of uploaded files; of equal documents the first is kept, in this order")
    encoder: str | None = option(
        None,
        "what encodes it: the id of a dataset or the name of a model, whose encoder it is; tiktoken:<name>; or "
        "chars, a token for each character; null: trained on the text",
    )
    name: str = option("", "what people call it")
    required: ClassVar = ("files",)
    schemas: ClassVar = {
        "files": {"type": "array", "items": {"type": "string", "pattern": "^file-[0-9a-f]{24}$"}, "minItems": 1,
                  "maxItems": MAX_FILES},
        "encoder": {"type": ["string", "null"], "pattern": NO_NUL_PATTERN, "minLength": 1},
        "name": {"type": "string", "pattern": NO_NUL_PATTERN, "maxLength": 255},
    }  # fmt: skip

    def problems(self) -> Iterator[tuple[str, str]]:
        """The rules that involve several keys are checked later, after the files are found."""
        if not 1 <= len(self.files) <= MAX_FILES:
            yield "files", f"must be 1 to {MAX_FILES:,}"
        if len(self.name) > 255:
            yield "name", "must have at most 255 characters"


@dataclass
class JobError:
    code: str
    message: str
    param: str | None = None


@dataclass
class Phase:
    """The progress of the assembly: `done` is the completed share of the phase."""

    phase: str
    done: float


@dataclass
class DatasetAnswer:
    id: str
    created_at: int
    name: str
    status: str
    recipe: dict[str, Any]
    progress: Phase
    result: dict[str, Any] | None
    error: JobError | None
    bytes: int  # on disk
    object: str = "dataset"


@dataclass
class DatasetList:
    data: list[DatasetAnswer]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


def format_dataset(job: Job) -> dict:
    phase, result = {"phase": job.status, "done": 0.0}, None
    with suppress(OSError, ValueError):
        if job.status == "running":
            phase = json.loads((job.folder / assemble.PROGRESS).read_bytes())
        elif job.status == "succeeded":
            phase, result = {"phase": "ready", "done": 1.0}, json.loads((job.folder / assemble.RESULT).read_bytes())
    return {"id": job.id, "object": "dataset", "created_at": int(job.about["created"]), "name": job.request["name"],
            "status": job.status, "recipe": job.request["recipe"], "progress": phase, "result": result,
            "error": job.about["error"], "bytes": disk_use(job.folder)}  # fmt: skip


async def create_dataset(body: DatasetRequest, service: TheService) -> DatasetAnswer:
    """Assemble a dataset from uploaded files. This is a job: retrieve it until its status is succeeded or failed."""
    recipe = assemble.Recipe(**{name: getattr(body, name) for name in declared(assemble.Recipe)})
    return format_dataset(await run_in_threadpool(create_dataset_job, service.job_service.jobs, recipe, body.name))


async def list_datasets(service: TheService, after: After = None, limit: Limit = 20) -> DatasetList:
    """List the datasets, newest first."""
    return await format_page(service.job_service.jobs.all("ds"), format_dataset, after, limit)


async def format_page(found: list[Job], answer: Callable[[Job], dict], after: str | None, limit: int) -> dict:
    """A page of jobs. Only the jobs on the page are read from disk."""
    chosen = paginate([{"id": job.id, "job": job} for job in found], after, limit)
    return chosen | {"data": await run_in_threadpool(lambda: [answer(item["job"]) for item in chosen["data"]])}


def find_dataset(service: Service, name: str) -> Job:
    return service.job_service.jobs.get("ds", name, "dataset_id")


async def retrieve_dataset(dataset_id: str, service: TheService) -> DatasetAnswer:
    """Get a dataset: its status, its progress and its result."""
    return format_dataset(find_dataset(service, dataset_id))


async def delete_dataset(dataset_id: str, service: TheService) -> Deleted:
    """Delete a dataset. Runs that were trained on it are kept, but cannot be resumed without it. Its files are kept."""
    await run_in_threadpool(service.job_service.jobs.remove, find_dataset(service, dataset_id))
    return Deleted(dataset_id, "dataset")


async def cancel_dataset(dataset_id: str, service: TheService) -> DatasetAnswer:
    """Stop the assembly of a dataset."""
    return format_dataset(await stop_job(service, find_dataset(service, dataset_id), "cancelled"))


def refuse_depth(value: Any, most: int = 16) -> Any:
    """Plain data, unless it is nested deeper than `most` levels. Checks level by level, without recursion."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
    if level:
        raise PydanticCustomError(SENTENCE, "is nested too deeply")
    return value


Shallow = BeforeValidator(refuse_depth)


class Supervised(TypedDict, total=False):
    hyperparameters: dict | None


@with_config(extra="allow")
class Method(TypedDict):
    type: Literal["supervised"]
    supervised: NotRequired[Supervised | None]


Suffix = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{0,64}$")]
MetadataKey, MetadataText = Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataText], Field(max_length=16)]


@dataclass
class TrainRequest:
    """A training run. A missing key takes the value of the preset, or of the run that trained the model."""

    model: str = option("tiny", "a preset of config/, such as tiny, or a model, which is trained further")
    training_file: str = option("none", "id of a file or of a dataset")
    hyperparameters: Annotated[dict | None, Shallow] = option(
        None, "any key of the JSON that train.py takes, nested or dotted, but for paths", must="an object, { … }"
    )
    suffix: Suffix | None = option(
        "", "part of the name of the model that is made: letters, digits, - and _",
        must="at most 64 letters, digits, - and _",
    )
    seed: int | None = option(None, "of weights, batches and dropout; null: drawn", low=0, high=2**31 - 1)
    metadata: Annotated[Metadata | None, Shallow] = option(
        None, "up to 16 texts, kept with the run", must="an object of at most 16 texts of up to 512 characters"
    )
    method: Annotated[Method | None, Shallow] = option(
        None, 'OpenAI\'s other place for hyperparameters: {"type": "supervised", "supervised": …}',
        must='{"type": "supervised", "supervised": {"hyperparameters": { … }}}',
    )
    validation_file: str | None = option(None, "none: a dataset's validation_share says what validates")
    integrations: Annotated[Any, Shallow] = option(None, "none are known here")
    required: ClassVar = ("model", "training_file")
    schemas: ClassVar = {
        "training_file": {"type": "string", "pattern": "^(file|ds)-[0-9a-f]{24}$"},
        "validation_file": {"type": "null"},
        "integrations": {"type": ["array", "null"], "maxItems": 0},
    }  # fmt: skip

    def __post_init__(self) -> None:
        self.suffix = self.suffix or None

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.validation_file is not None:
            yield "validation_file", "is not taken: a dataset's validation_share says what validates; leave it out"
        if self.integrations:
            yield "integrations", "none are known here; leave it out"

    @property
    def supervised(self) -> dict:
        """The hyperparameters in `method`."""
        return ((self.method or {}).get("supervised") or {}).get("hyperparameters") or {}


def update_run_schema(service: Service, properties: dict) -> None:
    names = [*find_presets(), *(service.job_service.jobs.list_models() if service.job_service.jobs else ())]
    properties["model"] = {"enum": names, "description": declared(TrainRequest)["model"].doc}


@dataclass
class RunProgress:
    """The latest values that the run has logged; null before it has logged them."""

    step: int
    max_iters: int
    train_loss: float | None
    val_loss: float | None
    tokens_per_s: float | None
    seconds: float | None


@dataclass
class RunAnswer:
    id: str
    created_at: int
    status: str
    model: str
    training_file: str
    hyperparameters: dict[str, Any]
    seed: int
    fine_tuned_model: str | None
    finished_at: int | None
    estimated_finish: int | None
    trained_tokens: int | None
    error: JobError | None
    metadata: dict[str, str] | None
    progress: RunProgress
    dataset: str
    result_files: list[str]
    integrations: list[str]
    bytes: int  # on disk, the model not included
    validation_file: str | None = None
    organization_id: str = "local"
    object: str = "fine_tuning.job"


@dataclass
class RunList:
    data: list[RunAnswer]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


def format_run(job: Job) -> dict:
    about, request, latest, done = job.about, job.request, job.metrics.latest, job.status == "succeeded"
    progress = {"step": latest.get("step", 0), "max_iters": about["max_iters"], "train_loss": latest.get("loss")}
    progress |= {name: latest.get(name) for name in ("val_loss", "tokens_per_s", "seconds")}
    left, speed = about["max_iters"] - progress["step"], (progress["seconds"] or 0) / max(progress["step"], 1)
    estimate = int(time.time() + left * speed) if job.status == "running" and speed else None
    return {
        "id": job.id, "object": "fine_tuning.job", "created_at": int(about["created"]), "status": job.status,
        "model": request["model"], "training_file": request["training_file"], "dataset": request["dataset"],
        "hyperparameters": request["chosen"], "seed": about["seed"],
        "fine_tuned_model": about["model"] if done else None,
        "finished_at": int(about["finished"]) if about["finished"] else None, "estimated_finish": estimate,
        "trained_tokens": latest.get("tokens"), "error": about["error"], "metadata": request["metadata"],
        "progress": progress, "bytes": disk_use(job.folder), "result_files": [], "integrations": [],
        "organization_id": "local",
    }  # fmt: skip


async def create_run(body: TrainRequest, request: Request, service: TheService) -> RunAnswer:
    """Train a model. Requests with the same Idempotency-Key and the same body create only one run."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= 255:
        raise ApiError(400, "Idempotency-Key must have 1 to 255 characters", "Idempotency-Key")
    asked = TrainingRequest(
        body.model, body.training_file, {**body.supervised, **(body.hyperparameters or {})}, body.suffix,
        body.seed, body.metadata, sha256_hex(key) if key else None,
        sha256_hex(json.dumps(to_dict(body), sort_keys=True)),
    )  # fmt: skip
    return format_run(await run_in_threadpool(create_training_job, service.job_service.jobs, asked))


def sha256_hex(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


async def list_runs(service: TheService, after: After = None, limit: Limit = 20) -> RunList:
    """List the runs, newest first."""
    return await format_page(service.job_service.jobs.all("ftjob"), format_run, after, limit)


def find_run(service: Service, name: str) -> Job:
    return service.job_service.jobs.get("ftjob", name, "job_id")


async def retrieve_run(job_id: str, service: TheService) -> RunAnswer:
    """Get a run: its status, its progress, and after it has succeeded the name of its model."""
    return format_run(find_run(service, job_id))


async def delete_run(job_id: str, service: TheService) -> Deleted:
    """Delete a run that is not running: its checkpoints, events and curves. Its model and its dataset are kept."""
    await run_in_threadpool(service.job_service.jobs.remove, find_run(service, job_id))
    return Deleted(job_id, "fine_tuning.job")


async def cancel_run(job_id: str, service: TheService) -> RunAnswer:
    """Cancel a run. It finishes its step and saves a checkpoint, so that it can be resumed. If it could not save, the
    answer has an `error` with the code not_saved, which says what is lost.
    """
    return format_run(await stop_job(service, find_run(service, job_id), "cancelled"))


async def pause_run(job_id: str, service: TheService) -> RunAnswer:
    """Pause a run: it saves a checkpoint and waits until it is resumed. If it could not save, the answer has an `error`
    with the code not_saved, which says what is lost.
    """
    return format_run(await stop_job(service, find_run(service, job_id), "paused"))


async def stop_job(service: Service, job: Job, wanted: str) -> Job:
    """Stop a job. Returns it after its process has exited, or after WAIT_SECONDS in its status at that time."""
    await run_in_threadpool(service.job_service.jobs.stop, job, wanted)
    until = time.monotonic() + WAIT_SECONDS
    while job.status == "running" and time.monotonic() < until and not service.closing.is_set():
        await asyncio.sleep(0.05)
    return job


async def resume_run(job_id: str, service: TheService) -> RunAnswer:
    """Resume a run that is paused, was cancelled or has failed, from its last checkpoint."""
    job = find_run(service, job_id)
    await run_in_threadpool(service.job_service.jobs.resume, job)
    return format_run(job)


@dataclass
class Event:
    id: str
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any]
    object: str = "fine_tuning.job.event"


@dataclass
class EventList:
    data: list[Event]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


async def list_run_events(job_id: str, service: TheService, after: After = None, limit: Limit = 20) -> EventList:
    """List the events of a run, newest first. Losses have type metrics. Warnings, and what the run could not save, have
    level warn.
    """
    return paginate(await run_in_threadpool(find_run(service, job_id).events), after, limit)


@dataclass
class CheckpointMetrics:
    step: int
    full_valid_loss: float | None


@dataclass
class CheckpointAnswer:
    id: str
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int
    object: str = "fine_tuning.job.checkpoint"


@dataclass
class CheckpointList:
    data: list[CheckpointAnswer]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


async def list_run_checkpoints(job_id: str, service: TheService, after: After = None,
                               limit: Limit = 10) -> CheckpointList:  # fmt: skip
    """List the checkpoints of a run, newest first: the newest few, and the best."""
    job = find_run(service, job_id)
    return paginate(await run_in_threadpool(job.checkpoints), after, limit)


@dataclass
class MetricList:
    data: list[dict[str, Any]]
    object: str = "list"


async def list_run_metrics(
    job_id: str, service: TheService, after: Annotated[int, Query(description="only of steps after this one")] = -1
) -> MetricList:
    """The lines of the run's metrics.jsonl: all evaluations, and up to 2,000 logged steps, evenly spaced."""
    path = find_run(service, job_id).metrics.path
    lines = await run_in_threadpool(plot.read_points, path) if path.exists() else []
    return MetricList([line for line in lines if line["step"] > after])


async def draw_run_curves(job_id: str, service: TheService,
                          sheet: Literal["loss", "learning_rate", "throughput"] = "loss",
                          x: Literal["step", "tokens", "seconds"] = "step") -> Response:  # fmt: skip
    """The run's current curves, as PNG."""
    data = await run_in_threadpool(service.job_service.draw_curves, find_run(service, job_id), sheet, x)
    return Response(data, media_type="image/png", headers={"Cache-Control": "no-cache"})


IDEMPOTENCY = {
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": False,
            "description": "with the same key, the same run",
            "schema": {"type": "string", "minLength": 1, "maxLength": 255},
        }
    ]
}
