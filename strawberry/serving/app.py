"""The FastAPI application: all routes, the error handler and the OpenAPI schema.

To add a route, write a handler and add a line to ROUTES.
"""

import copy
import dataclasses
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Match

from strawberry.common import UserError, show
from strawberry.serving.bodies import build_body_schema, read_body
from strawberry.serving.chat import NO_CHAT, chat_completions, update_chat_schema
from strawberry.serving.completions import (
    completions,
    delete_model,
    detokenize,
    list_models,
    retrieve_model,
    tokenize,
    tokenizer_info,
    update_completion_schema,
    update_tokenize_schema,
)
from strawberry.serving.errors import ApiError, ErrorAnswer, to_api_error
from strawberry.serving.files import (
    UPLOAD_FORM,
    FileList,
    StoredFile,
    create_file,
    delete_file,
    list_files,
    retrieve_file,
    retrieve_file_content,
)
from strawberry.serving.planning import (
    Estimate,
    Presets,
    StartingPoint,
    estimate_run,
    list_presets,
    retrieve_starting_point,
)
from strawberry.serving.previews import (
    DiskUse,
    DocumentList,
    list_dataset_documents,
    list_file_documents,
    retrieve_disk_use,
    retrieve_example_text,
)
from strawberry.serving.protocol import (
    ChatCompletion,
    Completion,
    Deleted,
    Detokenized,
    Health,
    Model,
    ModelList,
    TokenizerInfo,
    Tokens,
)
from strawberry.serving.run_routes import (
    Notes,
    RunDetails,
    RunMetrics,
    RunSummaries,
    RunSummary,
    delete_any_run,
    download_checkpoint,
    list_all_runs,
    list_metrics,
    retrieve_any_run,
    stop_any_run,
    write_run_notes,
)
from strawberry.serving.security import SecurityMiddleware
from strawberry.serving.service import Service, TheService
from strawberry.serving.settings import Settings
from strawberry.serving.training import (
    IDEMPOTENCY,
    CheckpointList,
    DatasetAnswer,
    DatasetList,
    EventList,
    MetricList,
    RunAnswer,
    RunList,
    cancel_dataset,
    cancel_run,
    create_dataset,
    create_run,
    delete_dataset,
    delete_run,
    draw_run_curves,
    list_datasets,
    list_run_checkpoints,
    list_run_events,
    list_run_metrics,
    list_runs,
    pause_run,
    resume_run,
    retrieve_dataset,
    retrieve_run,
    update_run_schema,
)

PAGE_FOLDER = Path(__file__).with_name("page")
PAGE_FILES = {path.name: path for path in PAGE_FOLDER.iterdir() if path.suffix in (".html", ".css", ".js")}
PAGE_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:"
NO_ROUTE = {  # prefixes of OpenAI's endpoints that this server does not have → advice
    "/v1/chat": NO_CHAT, "/v1/responses": NO_CHAT, "/v1/conversations": NO_CHAT, "/v1/messages": NO_CHAT,
    "/v1/assistants": NO_CHAT, "/v1/threads": NO_CHAT,
    "/v1/embeddings": "the models here make no embeddings; POST /v1/completions continues a text",
}  # fmt: skip


def advise_route(path: str) -> ApiError | None:
    """A 404 with advice for an endpoint of OpenAI's API that is not supported, or for a path with no /v1 or two; None
    for other paths.
    """
    full = "/v1/" + path.removeprefix("/v1").removeprefix("/v1").lstrip("/")
    for start, advice in NO_ROUTE.items():
        if full == start or full.startswith(f"{start}/"):
            return ApiError(404, advice, "model")
    known = {route.path.split("/")[2] for route in ROUTES if route.path.startswith("/v1/")}
    if full != path and full.split("/")[2] in known:
        return ApiError(404, f"there is nothing at this address; {show(full)} may be meant: a client's base_url ends "
                        "in /v1, once")  # fmt: skip
    return None


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException) and error.status_code == 404:
        error = advise_route(request.url.path) or error
    failure, models = to_api_error(error), Path(request.app.state.service.settings.models).resolve()
    failure.message = failure.message.replace(f"{models}{os.sep}", "")  # clients must not see the server's paths
    answer = failure.response()
    if answer.status_code == 405:  # Starlette lists the methods of one route, but several routes may share a path
        same = [route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE]
        answer.headers["Allow"] = ", ".join(sorted(set().union(*(route.methods or () for route in same))))
    return answer


async def health() -> Health:
    """Whether the server is running. Needs no key."""
    return Health("ok")


async def metrics(service: TheService) -> Response:
    """Counts of requests and tokens, durations, and the current load, in Prometheus' text format."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def page() -> Response:
    """A web page to look at runs, to train, to write with the models, and to bring data."""
    return await page_file("index.html")


async def page_file(name: str) -> Response:
    """A file of the page: a style sheet or a script."""
    path = PAGE_FILES.get(name)
    if path is None:
        raise ApiError(404, f"the page has no file {show(name)}", "name", "not_found")
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
    headers = {"Cache-Control": "no-cache", "Content-Security-Policy": PAGE_POLICY}
    return Response(await run_in_threadpool(path.read_bytes), media_type=kinds[path.suffix], headers=headers)


@dataclass
class Route:
    """A route. The handler is a FastAPI endpoint: its annotations declare the parameters, its docstring is the
    documentation. A parameter `body`, annotated with a dataclass of options, is the validated JSON body.

    answer: dataclass of the response, None if the handler returns a Response.
    """

    method: str
    path: str
    handler: Callable
    answer: type | None = None
    tag: str = "text"
    update_schema: Callable | None = (
        None  # update_schema(service, properties) updates the body's schema from the server's state
    )
    open: bool = False  # whether it needs no key
    responses: dict = dataclasses.field(default_factory=dict)  # FastAPI's `responses`, for responses other than JSON
    extra: dict = dataclasses.field(default_factory=dict)  # OpenAPI's fields of the operation


ROUTES = [
    Route("GET", "/", page, None, "server", responses={200: {"content": {"text/html": {}}}}),
    Route("GET", "/page/{name}", page_file, None, "server",
          responses={200: {"content": {"text/css": {}, "text/javascript": {}, "text/html": {}}}}),
    Route("GET", "/health", health, Health, "server", open=True),
    Route("GET", "/metrics", metrics, None, "server", responses={200: {"content": {"text/plain": {}}}}),
    Route("POST", "/v1/completions", completions, Completion, update_schema=update_completion_schema,
          responses={200: {"content": {"text/event-stream": {}}}}),
    Route("POST", "/v1/chat/completions", chat_completions, ChatCompletion, update_schema=update_chat_schema,
          responses={200: {"content": {"text/event-stream": {}}}}),
    Route("POST", "/tokenize", tokenize, Tokens, update_schema=update_tokenize_schema),
    Route("POST", "/detokenize", detokenize, Detokenized, update_schema=update_tokenize_schema),
    Route("GET", "/tokenizer_info", tokenizer_info, TokenizerInfo),
    Route("GET", "/v1/models", list_models, ModelList),
    Route("GET", "/v1/models/{model}", retrieve_model, Model),
    Route("DELETE", "/v1/models/{model}", delete_model, Deleted),
    Route("POST", "/v1/files", create_file, StoredFile, "files", extra=UPLOAD_FORM),
    Route("GET", "/v1/files", list_files, FileList, "files"),
    Route("GET", "/v1/files/{file_id}", retrieve_file, StoredFile, "files"),
    Route("GET", "/v1/files/{file_id}/content", retrieve_file_content, None, "files",
          responses={200: {"content": {"application/octet-stream": {}}}}),
    Route("DELETE", "/v1/files/{file_id}", delete_file, Deleted, "files"),
    Route("POST", "/v1/datasets", create_dataset, DatasetAnswer, "datasets"),
    Route("GET", "/v1/datasets", list_datasets, DatasetList, "datasets"),
    Route("GET", "/v1/datasets/{dataset_id}", retrieve_dataset, DatasetAnswer, "datasets"),
    Route("DELETE", "/v1/datasets/{dataset_id}", delete_dataset, Deleted, "datasets"),
    Route("POST", "/v1/datasets/{dataset_id}/cancel", cancel_dataset, DatasetAnswer, "datasets"),
    Route("POST", "/v1/fine_tuning/jobs", create_run, RunAnswer, "training", update_schema=update_run_schema,
          extra=IDEMPOTENCY),
    Route("GET", "/v1/fine_tuning/jobs", list_runs, RunList, "training"),
    Route("GET", "/v1/fine_tuning/jobs/{job_id}", retrieve_run, RunAnswer, "training"),
    Route("DELETE", "/v1/fine_tuning/jobs/{job_id}", delete_run, Deleted, "training"),
    Route("POST", "/v1/fine_tuning/jobs/{job_id}/cancel", cancel_run, RunAnswer, "training"),
    Route("POST", "/v1/fine_tuning/jobs/{job_id}/pause", pause_run, RunAnswer, "training"),
    Route("POST", "/v1/fine_tuning/jobs/{job_id}/resume", resume_run, RunAnswer, "training"),
    Route("GET", "/v1/fine_tuning/jobs/{job_id}/events", list_run_events, EventList, "training"),
    Route("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints", list_run_checkpoints, CheckpointList, "training"),
    Route("GET", "/v1/fine_tuning/jobs/{job_id}/metrics", list_run_metrics, MetricList, "training"),
    Route("GET", "/v1/fine_tuning/jobs/{job_id}/curves.png", draw_run_curves, None, "training",
          responses={200: {"content": {"image/png": {}}}}),
    Route("GET", "/v1/files/{file_id}/documents", list_file_documents, DocumentList, "files"),
    Route("GET", "/v1/datasets/{dataset_id}/documents", list_dataset_documents, DocumentList, "datasets"),
    Route("GET", "/v1/example_text", retrieve_example_text, None, "files",
          responses={200: {"content": {"text/plain": {}}}}),
    Route("GET", "/v1/disk", retrieve_disk_use, DiskUse, "server"),
    Route("GET", "/v1/presets", list_presets, Presets, "training"),
    Route("GET", "/v1/presets/{name}", retrieve_starting_point, StartingPoint, "training"),
    Route("POST", "/v1/fine_tuning/estimates", estimate_run, Estimate, "training"),
    Route("GET", "/v1/runs", list_all_runs, RunSummaries, "runs"),
    Route("GET", "/v1/runs/{run_id}", retrieve_any_run, RunDetails, "runs"),
    Route("DELETE", "/v1/runs/{run_id}", delete_any_run, Deleted, "runs"),
    Route("GET", "/v1/runs/{run_id}/metrics", list_metrics, RunMetrics, "runs"),
    Route("POST", "/v1/runs/{run_id}/notes", write_run_notes, Notes, "runs"),
    Route("POST", "/v1/runs/{run_id}/stop", stop_any_run, RunSummary, "runs"),
    Route("GET", "/v1/runs/{run_id}/checkpoints/{step}", download_checkpoint, None, "runs",
          responses={200: {"content": {"application/octet-stream": {}}}}),
]  # fmt: skip


def create_app(settings: Settings) -> FastAPI:
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPIOffline(title="Strawberry", version="1", lifespan=lifespan, redoc_url=None)
    app.state.service = service
    open_paths = {route.path for route in ROUTES if route.open}
    app.add_middleware(SecurityMiddleware, settings=settings, metrics=service.metrics, open_paths=open_paths)
    for kind in (ApiError, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    for route in ROUTES:
        add_route(app, route)
    plain = app.openapi
    app.openapi = lambda: build_schema(plain(), service)
    return app


def build_schema(plain: dict, service: Service) -> dict:
    """The OpenAPI schema of all routes, updated from the server's state, such as the names of the models."""
    found = copy.deepcopy(plain)
    if service.settings.api_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for route in ROUTES:
            found["paths"][route.path][route.method.lower()]["security"] = [] if route.open else [{"key": []}]
    for route in ROUTES:
        if route.update_schema is not None:
            body = found["paths"][route.path][route.method.lower()]["requestBody"]
            route.update_schema(service, body["content"]["application/json"]["schema"]["properties"])
    return found


def add_route(app: FastAPI, route: Route) -> None:
    extra, handler = dict(route.extra), route.handler
    if (body := signature(handler).parameters.get("body")) is not None:
        content = {"application/json": {"schema": build_body_schema(body.annotation)}}
        extra["requestBody"] = {"required": True, "content": content}
        handler = with_body(handler, body.annotation)
    responses = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}} | route.responses
    app.add_api_route(route.path, handler, methods=[route.method], response_model=route.answer, tags=[route.tag],
                      responses=responses, openapi_extra=extra, operation_id=handler.__name__)  # fmt: skip


def with_body(handler: Callable, cls: type) -> Callable:
    """The handler with a signature from which FastAPI derives how to read and validate the body."""

    async def read(request: Request):
        return await read_body(request, cls)

    async def endpoint(**values: Any) -> Any:
        return await handler(**values)

    own = signature(handler)
    parameters = own.parameters | {"body": own.parameters["body"].replace(annotation=Annotated[cls, Depends(read)])}
    endpoint.__signature__ = own.replace(parameters=list(parameters.values()))
    endpoint.__name__, endpoint.__doc__ = handler.__name__, handler.__doc__
    return endpoint
