"""The routes of uploaded files."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from strawberry.common import show
from strawberry.serving.errors import ApiError
from strawberry.serving.id_directory import RequestError, paginate
from strawberry.serving.protocol import After, Deleted
from strawberry.serving.service import TheService
from strawberry.serving.settings import MIB
from strawberry.serving.uploads import PURPOSES, SUFFIXES, Upload, size_error

STALL_SECONDS = 60  # that a client may pause in the middle of an upload
DRAIN_BYTES = 64 * MIB  # of a refused upload that are read all the same, so that its client reads the refusal


@dataclass
class StoredFile:
    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    object: str = "file"
    status: str = "processed"


@dataclass
class FileList:
    data: list[StoredFile]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


def format_file(about: dict) -> dict:
    return {"id": about["id"], "object": "file", "bytes": about["bytes"], "created_at": int(about["created"]),
            "filename": about["filename"], "purpose": about["purpose"], "status": "processed"}  # fmt: skip


class MultipartForm:
    """multipart/form-data as it arrives (RFC 7578): the part `file` goes to disk, the others are short texts.

    FastAPI's UploadFile is not used: it keeps a file in the system's temporary directory first, which may be memory and
    is not the disk that is to hold it, and then has it copied (5 times the seconds of this, for 256 MiB).
    """

    MAX_PARTS, MAX_TEXT_BYTES = 32, 4096  # parts, bytes of a text

    def __init__(self, boundary: bytes, upload: Upload):
        self.upload, self.texts, self.filename, self.n = upload, {}, None, 0
        names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data", "end")
        self.done = False
        self.parser = MultipartParser(boundary, {f"on_{name}": getattr(self, name) for name in names})

    def write(self, data: bytes) -> None:
        try:
            self.parser.write(data)
        except FormParserError as error:
            raise ApiError(400, f"the body is not multipart/form-data ({error})") from error

    def part_begin(self) -> None:
        self.n += 1
        if self.n > self.MAX_PARTS:
            raise ApiError(400, f"the body has more than {self.MAX_PARTS} parts")
        self.field, self.value, self.headers, self.text = b"", b"", {}, bytearray()

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self.field += data[start:end]  # the parser bounds how many and how long headers are

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def header_end(self) -> None:
        self.headers[self.field.lower()] = self.value
        self.field = self.value = b""

    def headers_finished(self) -> None:
        _, options = parse_options_header(self.headers.get(b"content-disposition", b""))
        self.name = options.get(b"name", b"").decode("utf-8", "replace")
        if self.name == "file":
            if self.filename is not None:
                raise ApiError(400, "file: given twice; upload one file at a time", "file")
            self.filename = options.get(b"filename", b"file").decode("utf-8", "replace")
        else:
            self.texts[self.name] = self.text  # of an empty part no data comes

    def part_data(self, data: bytes, start: int, end: int) -> None:
        if self.name == "file":
            self.upload.write(data[start:end])
            return
        self.text += data[start:end]
        if len(self.text) > self.MAX_TEXT_BYTES:
            raise ApiError(400, f"{show(self.name)} is longer than {self.MAX_TEXT_BYTES} bytes", self.name)

    def end(self) -> None:
        self.done = True

    def get(self, name: str, default: str) -> str:
        return self.texts[name].decode("utf-8", "replace") if name in self.texts else default


async def create_file(request: Request, service: TheService) -> StoredFile:
    """Upload a text, such as .txt, .md or .py, as a document, a .json as a list of documents, or a .jsonl as a document
    a line; gzipped or not."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary, limit = options.get(b"boundary", b""), service.job_service.uploads.limit
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 70:
        told = "it must be multipart/form-data with a boundary"
        raise ApiError(415, f"Content-Type is {show(kind.decode('latin-1'))}; {told}", "Content-Type")
    stated, most = (
        request.headers.get("content-length", ""),
        limit + MultipartForm.MAX_PARTS * (MultipartForm.MAX_TEXT_BYTES + 1024),
    )
    upload = await run_in_threadpool(Upload, service.job_service.uploads)
    body = read_chunks(request)
    try:
        if stated.isdecimal() and int(stated) > most:
            raise size_error(limit)
        form, n = MultipartForm(boundary, upload), 0
        async for data in body:
            n += len(data)
            if n > most:
                raise size_error(limit)
            await run_in_threadpool(form.write, data)
        about = await run_in_threadpool(finish_upload, form)
    except RequestError as error:
        if error.status == 413:
            await drain_body(body)
        raise
    finally:
        await run_in_threadpool(upload.abort)
    return format_file(about)


def finish_upload(form: MultipartForm) -> dict:
    if form.filename is None or not form.done:
        told = "its last boundary" if form.filename is not None else "a part of that name"
        raise ApiError(400, f"file: the body lacks {told}", "file")
    purpose = form.get("purpose", "fine-tune")
    if purpose not in PURPOSES:
        raise ApiError(400, f"purpose = {show(purpose)}: must be one of {', '.join(PURPOSES)}", "purpose")
    return form.upload.finish(form.filename, purpose)


async def read_chunks(request: Request) -> AsyncIterator[bytes]:
    """The pieces of a body, as long as they keep coming."""
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(STALL_SECONDS):
                data = await anext(stream, None)
        except TimeoutError as error:
            raise ApiError(408, f"the upload stood still for {STALL_SECONDS} seconds") from error
        except ClientDisconnect as error:
            raise ApiError(400, "the client left in the middle of the upload") from error
        if data is None:
            return
        if data:
            yield data


async def drain_body(body: AsyncIterator[bytes]) -> None:
    """Read on for a moment: many clients read no answer before they have sent all."""
    n, until = 0, time.monotonic() + 5
    with suppress(ApiError, TimeoutError, StopAsyncIteration, RuntimeError):
        while n < DRAIN_BYTES and time.monotonic() < until:
            n += len(await asyncio.wait_for(anext(body), 0.5))


async def list_files(service: TheService, after: After = None, purpose: str | None = None,
                     limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
                     order: Literal["asc", "desc"] = "desc") -> FileList:  # fmt: skip
    """The uploaded files, the newest first."""
    found = [format_file(about) for about in service.job_service.uploads.all() if purpose in (None, about["purpose"])]
    return paginate(found if order == "desc" else found[::-1], after, limit)


async def retrieve_file(file_id: str, service: TheService) -> StoredFile:
    """What is known of a file."""
    return format_file(service.job_service.uploads.get(file_id))


async def retrieve_file_content(file_id: str, service: TheService) -> FileResponse:
    """The bytes of a file, as they were uploaded."""
    path = service.job_service.uploads.path(file_id)
    return FileResponse(path, media_type="application/octet-stream", filename=f"{file_id}{path.name[7:]}")


async def delete_file(file_id: str, service: TheService) -> Deleted:
    """Delete a file. Datasets that were made of it stay."""
    await run_in_threadpool(service.job_service.jobs.remove_file, file_id)
    return Deleted(file_id, "file")


UPLOAD_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
    "type": "object", "required": ["file"], "properties": {
        "file": {"type": "string", "contentMediaType": "text/plain",
                 "description": f"its name ends in one of {', '.join(SUFFIXES)}, or in one of these and .gz"},
        "purpose": {"enum": list(PURPOSES), "default": "fine-tune"},
    }}}}}}  # fmt: skip
