"""The routes of runs, wherever they were started: the table, one run, its metrics, notes and checkpoints."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from fastapi import Query
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from strawberry.config import option
from strawberry.serving.errors import ApiError
from strawberry.serving.id_directory import disk_use
from strawberry.serving.protocol import Deleted
from strawberry.serving.runs import (
    MAX_NOTES,
    FolderRun,
    JobRun,
    own_disk_use,
    read_notes,
    read_samples,
    without_paths,
    write_notes,
)
from strawberry.serving.service import TheService
from strawberry.training import plot
from strawberry.training.checkpoint import MODEL


@dataclass
class RunSummary:
    """A row of the table of runs; null for what is not known (yet)."""

    id: str
    name: str
    source: str  # "server", or "command line"
    preset: str  # or the config file, or the model that was trained further
    changed: dict[str, Any]  # dotted keys whose values differ from the preset's
    dataset: str
    status: str
    step: int
    max_iters: int | None
    parameters: int | None
    train_loss: float | None
    val_loss: float | None
    val_bpb: float | None
    tokens: int | None
    tokens_per_s: float | None
    seconds: float | None
    started: int
    flops_per_token: float | None
    device: str | None
    has_notes: bool
    object: str = "run"


@dataclass
class RunSummaries:
    data: list[RunSummary]
    object: str = "list"


@dataclass
class Sample:
    step: int
    text: str
    val_loss: float | None


@dataclass
class RunCheckpoint:
    step: int
    saved_at: int
    val_loss: float | None
    bytes: int
    model: str  # its name for completions


@dataclass
class RunEvent:
    level: str
    message: str


@dataclass
class RunDetails:
    """Everything about a run but its metrics."""

    summary: RunSummary
    values: dict[str, Any]  # every key, dotted, but for paths
    preset_values: dict[str, Any]
    command: str | None
    notes: str
    samples: list[Sample]
    checkpoints: list[RunCheckpoint]
    events: list[RunEvent]
    model: str | None  # the model that it has made
    error: str | None
    bytes: int  # on disk, the model not included
    object: str = "run.details"


@dataclass
class RunMetrics:
    id: str
    data: list[dict[str, Any]]
    object: str = "list"


@dataclass
class NotesRequest:
    text: str = option("", "what a person writes about the run; it replaces what was there")
    required: ClassVar = ("text",)

    def problems(self) -> Iterator[tuple[str, str]]:
        if len(self.text) > MAX_NOTES:
            yield "text", f"must have at most {MAX_NOTES:,} characters"


@dataclass
class Notes:
    id: str
    text: str
    object: str = "run.notes"


def number(value: Any, kind: type = float) -> Any:
    """The value where it is such a number; None else: the files in --runs may be of any program."""
    is_one = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return value if is_one else None


def format_summary(index, run: FolderRun | JobRun) -> dict:
    latest, about = run.latest, run.about
    found = {name: number(latest.get(name)) for name in ("val_loss", "val_bpb", "tokens_per_s", "seconds")}
    known = {"tokens": number(latest.get("tokens"), int), "parameters": number(about.get("parameters"), int),
             "flops_per_token": number(about.get("flops_per_token")), "device": about.get("device")}  # fmt: skip
    return {
        "id": run.id, "name": run.name, "source": run.source, "preset": run.preset, "changed": run.changed(index),
        "dataset": run.dataset, "status": run.status, "step": number(latest.get("step"), int) or 0,
        "max_iters": number(run.max_iters, int), "train_loss": number(latest.get("loss")),
        "started": int(run.started), "has_notes": bool(read_notes(run).strip()), "object": "run", **found, **known,
    }  # fmt: skip


def format_details(index, run: FolderRun | JobRun, models: set[str]) -> dict:
    checkpoints = [
        {"step": found.step, "saved_at": int(found.saved_at), "val_loss": found.val_loss,
         "bytes": disk_use(found.path), "model": run.checkpoint_model(found.step)}
        for found in run.checkpoints()
    ]  # fmt: skip
    made = run.job.about["model"] if isinstance(run, JobRun) else re.split(r"[/\\]", run.run.get("model_path", ""))[-1]
    error = (run.job.about["error"] or {}).get("message") if isinstance(run, JobRun) else None
    return {
        "summary": format_summary(index, run), "values": without_paths(run.run),
        "preset_values": without_paths(run.base(index)), "command": run.command(index), "notes": read_notes(run),
        "samples": read_samples(run), "checkpoints": checkpoints, "events": run.events(), "error": error,
        "model": made if made in models and run.status == "succeeded" else None, "bytes": own_disk_use(run),
        "object": "run.details",
    }  # fmt: skip


async def list_all_runs(service: TheService) -> RunSummaries:
    """List all runs, newest first: the jobs of this server, and the runs of the command line in the folders --runs."""

    def read() -> list[dict]:
        found = []
        for run in service.runs.all():
            with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):  # files of another program
                found.append(format_summary(service.runs, run))
        return found

    return {"object": "list", "data": await run_in_threadpool(read)}


async def retrieve_any_run(run_id: str, service: TheService) -> RunDetails:
    """Get a run: its keys beside the preset's, its command, notes, samples, checkpoints and events."""
    models = set(await service.models.list_files())
    return await run_in_threadpool(lambda: format_details(service.runs, service.runs.get(run_id), models))


async def list_metrics(
    run_id: str, service: TheService, after: Annotated[int, Query(description="only of steps after this one")] = -1
) -> RunMetrics:
    """The lines of the run's metrics.jsonl without texts: all evaluations, and up to 2,000 logged steps, evenly
    spaced.
    """

    def read() -> list[dict]:
        path = service.runs.get(run_id).metrics.path
        lines = plot.read_points(path) if path.exists() else []
        return [{key: value for key, value in line.items() if key != "sample"} for line in lines
                if line["step"] > after]  # fmt: skip

    return {"id": run_id, "object": "list", "data": await run_in_threadpool(read)}


async def write_run_notes(run_id: str, body: NotesRequest, service: TheService) -> Notes:
    """Keep a person's notes beside the run. They go when the run is deleted."""
    await run_in_threadpool(lambda: write_notes(service.runs.get(run_id), body.text))
    return Notes(run_id, body.text)


async def stop_any_run(run_id: str, service: TheService) -> RunSummary:
    """Ask a run of the command line to save and to end, as Ctrl-C does. A job of this server is cancelled by its own
    route.
    """

    def stop() -> dict:
        run = find_folder_run(service, run_id, "cancel it with POST /v1/fine_tuning/jobs/{id}/cancel")
        run.stop()
        return format_summary(service.runs, run)

    return await run_in_threadpool(stop)


async def delete_any_run(run_id: str, service: TheService) -> Deleted:
    """Delete what train.py wrote of a run of the command line in its checkpoints.path: checkpoints, metrics, notes.
    Its model stays.
    """

    def remove() -> None:
        find_folder_run(service, run_id, "delete it with DELETE /v1/fine_tuning/jobs/{id}").remove()
        service.runs.searched_at = -float("inf")

    await run_in_threadpool(remove)
    return Deleted(run_id, "run")


def find_folder_run(service: TheService, run_id: str, instead: str) -> FolderRun:
    run = service.runs.get(run_id)
    if isinstance(run, JobRun):
        raise ApiError(400, f"{run_id} is a job of this server; {instead}", "run_id")
    return run


async def download_checkpoint(run_id: str, step: int, service: TheService) -> FileResponse:
    """A checkpoint's model file, as sample.py reads it."""
    run = await run_in_threadpool(service.runs.get, run_id)
    path = run.folder / f"step_{step:08d}" / MODEL
    if step < 0 or path.is_symlink() or not path.is_file():
        raise ApiError(404, f"the run {run.name} has no checkpoint of step {step}", "step", "not_found")
    return FileResponse(path, media_type="application/octet-stream", filename=run.checkpoint_model(step))
