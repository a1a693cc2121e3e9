"""The first documents of an uploaded file or of a dataset, a text to begin with, and the use of the disk."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Query, Response
from fastapi.concurrency import run_in_threadpool

import encoder as encoders
from strawberry.common import UserError
from strawberry.data import assemble
from strawberry.data.documents import Documents
from strawberry.data.inputs import InputFile
from strawberry.data.token_file import TokenFile
from strawberry.inference.loading import MODEL_SUFFIXES
from strawberry.serving.errors import replace_surrogates
from strawberry.serving.id_directory import RequestError, disk_use
from strawberry.serving.job_requests import client_errors
from strawberry.serving.service import TheService
from strawberry.serving.settings import REPOSITORY

MAX_SHOWN = 2000  # characters of a document
MAX_TOKENS = 50_000  # of a dataset that are read for its first documents
Many = Annotated[int, Query(ge=1, le=20, description="how many documents at most")]


@dataclass
class Document:
    text: str
    is_whole: bool  # whether it is not cut


@dataclass
class DocumentList:
    data: list[Document]
    object: str = "list"


@dataclass
class DiskUse:
    """Bytes: of what the server keeps, of the disk, and of what is free there."""

    files: int
    datasets: int
    runs: int
    models: int
    free: int
    total: int
    object: str = "disk_use"


def cut(text: str) -> dict:
    return {"text": replace_surrogates(text[:MAX_SHOWN]), "is_whole": len(text) <= MAX_SHOWN}


def first_of_file(path: Path, limit: int) -> Iterator[dict]:
    """The first documents of a file, of which only the beginning is read."""
    text = ""
    with contextlib.closing(Documents([], errors="replace").read_head(InputFile(path))) as pieces:
        for piece, is_last in pieces:
            text += piece
            if is_last or len(text) > MAX_SHOWN:
                yield cut(text)
                text, limit = "", limit - 1
                if limit == 0 or not is_last:
                    return


def first_of_dataset(folder: Path, split: str, limit: int) -> Iterator[dict]:
    """The first documents of a split, decoded."""
    result = json.loads((folder / assemble.RESULT).read_bytes())
    encoder, file = encoders.load(folder / assemble.ENCODER), TokenFile(folder / assemble.TOKENS)
    begin = result["training"]["tokens"] if split == "validation" else 0
    end = min(begin + MAX_TOKENS, result["tokens"] if split == "validation" else result["training"]["tokens"])
    tokens: list[int] = []
    for chunk in file.read_chunks(begin, end):
        for token in chunk.tolist():
            if token != encoder.eot:
                tokens.append(token)
                continue
            yield cut(encoder.decode(tokens))
            tokens, limit = [], limit - 1
            if limit == 0:
                return
    if tokens:
        yield {**cut(encoder.decode(tokens)), "is_whole": False}


async def list_file_documents(file_id: str, service: TheService, limit: Many = 5) -> DocumentList:
    """The first documents of an uploaded file, as prepare.py reads them."""

    def read() -> list[dict]:
        with client_errors(service.job_service.jobs):
            return list(first_of_file(service.job_service.uploads.path(file_id), limit))

    return {"object": "list", "data": await run_in_threadpool(read)}


async def list_dataset_documents(dataset_id: str, service: TheService, limit: Many = 5,
                                 split: Literal["training", "validation"] = "training") -> DocumentList:  # fmt: skip
    """The first documents of a dataset, as its tokens spell them."""
    job = service.job_service.jobs.get("ds", dataset_id, "dataset_id")
    if job.status != "succeeded":
        raise RequestError(409, f"the dataset {dataset_id} is {job.status}, not ready", "dataset_id")

    def read() -> list[dict]:
        with client_errors(service.job_service.jobs):
            return list(first_of_dataset(job.folder, split, limit))

    return {"object": "list", "data": await run_in_threadpool(read)}


async def retrieve_example_text() -> Response:
    """A text for a first model: the documentation of this project."""

    def read() -> str:
        pages = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/**/*.md"))]
        return "\n\n".join(page.read_text("utf-8") for page in pages if page.is_file())

    text = await run_in_threadpool(read)
    if not text:
        raise UserError("this installation has no docs/ to begin with; upload a text of your own")
    return Response(text, media_type="text/plain; charset=utf-8")


async def retrieve_disk_use(service: TheService) -> DiskUse:
    """What files, datasets, runs and models take of the disk."""

    def read() -> DiskUse:
        data, models = Path(service.settings.data), Path(service.settings.models)
        sizes = [path.stat().st_size for path in models.glob("*") if path.suffix in MODEL_SUFFIXES and path.is_file()]
        disk = shutil.disk_usage(data)
        folders = [disk_use(data / name) for name in ("files", "datasets", "runs")]
        return DiskUse(*folders, sum(sizes), disk.free, disk.total)

    return await run_in_threadpool(read)
