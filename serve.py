"""Text, datasets and training over HTTP, in OpenAI's words: one process, for the tools that people already have.

    python serve.py                                           models of bin/ at http://127.0.0.1:8000; /docs explains
    python serve.py --models bin/ --data data/ --port 8000
    STRAWBERRY_API_KEY=… python serve.py --host 0.0.0.0       beyond this machine: only with a key

Nothing is done twice: sample.py reads requests and models, decode.py makes the tokens of many texts at once, and
train.py, as a child process, trains. A new route is a function and a line in ROUTES; what lives as long as the server
does, such as the models in memory, is a class and a line in PARTS.

Index:  errors · settings and the command line · bodies · security · metrics · the engine · the service · routes:
        completions and models · files, datasets, runs · the page · the registry · the app · the command
"""

import asyncio
import dataclasses
import ipaddress
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from options import UserError, check, declared, object_schema, option, run_cli, show
from sample import help_text, read_settings

# ---- errors --------------------------------------------------------------------------------------------------------

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told went wrong, as OpenAI's error object. `param` is the field that is to be mended."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict:
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


@dataclass
class ErrorBody:
    message: str
    type: str
    param: str | None
    code: str | None


@dataclass
class ErrorAnswer:
    error: ErrorBody


def as_api_error(error: Exception) -> ApiError:
    """Whatever was raised, as what the client is told of it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return ApiError(400, f"{name} = {show(first.get('input'))}: {first['msg'].lower()}", name)
    if isinstance(error, HTTPException):
        what = {404: "there is nothing at this address; /docs lists what there is",
                405: "this address does not know the method; /docs lists what it knows"}  # fmt: skip
        return ApiError(error.status_code, what.get(error.status_code, str(error.detail)), headers=error.headers)
    return ApiError(500, "the server failed at this; its log says why", code="internal_error")


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    return as_api_error(error).response()


# ---- settings and the command line ---------------------------------------------------------------------------------

KEY_VARIABLE = "STRAWBERRY_API_KEY"
MIB = 1 << 20


@dataclass
class Settings:
    models: str = option("bin", "directory of the model files")
    data: str = option("data", "directory of uploads, datasets and runs")
    host: str = option("127.0.0.1", "address to listen at; beyond this machine only with a key")
    port: int = option(8000, "port to listen at; 0: a free one, which is printed", low=0, high=65535)
    api_key: list[str] = option(
        [], f"key that each request must bring; may be given several times, or in {KEY_VARIABLE}, apart by spaces, "
        "where no list of processes shows it"
    )
    allow_host: list[str] = option([], "further name that this server is reached by; may be given several times")
    rate: int = option(6000, "requests a minute for each key, or for each address without one; 0: no limit", low=0)
    batch: int | None = option(None, "texts made at once; default: 64 on cuda, 8 elsewhere", low=1, high=2**12)
    queue: int = option(256, "completions that wait for a row at most; more are told to come again", low=0)
    context: int = option(4096, "tokens of a prompt and what follows it, at most", low=1, high=2**20)
    timeout: float = option(600, "seconds until a completion is given up", above=0)
    memory: float = option(0, "GiB for models, their caches included; 0: half of what there is", low=0)
    max_body: float = option(4, "MiB of a JSON body at most", above=0)
    max_upload: float = option(1024, "MiB of an uploaded file at most", above=0)
    max_jobs: int = option(1, "jobs that run at once; others wait", low=1)
    grace: float = option(10, "seconds that requests under way have once the server is told to stop", low=0)
    device: str = option("auto", "auto: cuda, else mps, else cpu", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = option(
        "auto", "of the weights; auto: bfloat16 on cuda, float32 elsewhere", choices=["auto", "float32", "bfloat16"]
    )
    quantize: str | None = option(None, "int8: matrices in 8 bits", choices=["int8"])
    compile: str = option("false", "torch.compile, cuda only; a model's first text waits for it",
                          choices=["true", "false"])  # fmt: skip

    def problems(self) -> Iterator[tuple[str, str]]:
        if not is_loopback(self.host) and not self.api_key:
            yield "host", (f"is reached from other machines, which takes a key: set {KEY_VARIABLE} or --api_key; or "
                           "listen at 127.0.0.1")  # fmt: skip
        for key in self.api_key:
            if not key.isascii() or not key.isprintable() or " " in key:
                yield "api_key", "must be of printable ASCII characters, without spaces"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_command(argv: list[str]) -> Settings:
    """The settings of a command line and of the environment. Raises UserError with all that is wrong with them."""
    keys = os.environ.get(KEY_VARIABLE, "").split()
    return read_settings([*argv, *(f"--api_key={key}" for key in keys)], Settings)


# ---- bodies --------------------------------------------------------------------------------------------------------
# A JSON body is a dataclass of options, as configs are: its fields are declared once, with bounds and meaning; from
# them come the messages of what is wrong and the schema. A class may have `schemas`, which replace fields' own.

BODY_SECONDS = 60  # that a client may take to send its JSON


async def read_body(request: Request, cls: type) -> Any:
    """The JSON body of a request as an instance of `cls`. A null stands for what the field is without it."""
    raw = parse_json(await read_bytes(request, int(request.app.state.service.settings.max_body * MIB)))
    if not isinstance(raw, dict):
        raise ApiError(400, f"the body is {show(raw)}; it must be an object, {{ … }}")
    known = declared(cls)
    given = {name: value for name, value in raw.items() if value is not None or name not in known}
    body, problems = check(cls, given)
    problems = [f"{name} = null: must be given" for name in getattr(cls, "required", ()) if name not in given] + problems
    if problems:
        raise ApiError(400, "; ".join(problems), problems[0].partition(" = ")[0])
    return body


async def read_bytes(request: Request, limit: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {show(kind)}; it must be application/json", "Content-Type")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                data += piece
                if len(data) > limit:
                    raise ApiError(413, f"the body is larger than {limit:,} bytes (--max_body); send less at a time")
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} seconds") from error
    return bytes(data)


def parse_json(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 ({error.reason}, byte {error.start})") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON ({error})") from error


# ---- security ------------------------------------------------------------------------------------------------------


# ---- metrics -------------------------------------------------------------------------------------------------------


# ---- the engine ----------------------------------------------------------------------------------------------------


# ---- the service ---------------------------------------------------------------------------------------------------


class Service:
    """What a running server knows: its settings, and each part of PARTS under its name."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.closing = asyncio.Event()  # set when the server has been told to stop: long answers are to end
        self.parts = {name: part(self) for name, part in PARTS.items()}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["parts"][name]
        except KeyError:
            raise AttributeError(name) from None

    async def start(self) -> None:
        for part in self.parts.values():
            await part.start()

    async def stop(self) -> None:
        self.closing.set()
        for part in reversed(self.parts.values()):
            await part.stop()


def service_of(request: Request) -> Service:
    return request.app.state.service


TheService = Annotated[Service, Depends(service_of)]  # a handler that has such a parameter is given it


# ---- routes: completions and models --------------------------------------------------------------------------------


@dataclass
class Health:
    status: str


async def health() -> Health:
    """Whether the server is there. Needs no key."""
    return Health("ok")


# ---- files, datasets, runs -----------------------------------------------------------------------------------------


# ---- the page ------------------------------------------------------------------------------------------------------


# ---- the registry --------------------------------------------------------------------------------------------------


@dataclass
class Route:
    """An address. The handler is a FastAPI endpoint: parameters by their annotations, the docstring is the
    documentation. A parameter `body`, annotated with a dataclass of options, is the checked JSON body.

    answer: dataclass of what is given back, None where the handler returns a Response of its own.
    """

    method: str
    path: str
    handler: Callable
    answer: type | None = None
    tag: str = "text"
    responses: dict = dataclasses.field(default_factory=dict)  # FastAPI's, for other answers than JSON
    extra: dict = dataclasses.field(default_factory=dict)  # OpenAPI's, of the operation


ROUTES = [
    Route("GET", "/health", health, Health, "server"),
]

PARTS: dict[str, Callable] = {}  # name → class: made with the Service; has `async start()` and `async stop()`


# ---- the app -------------------------------------------------------------------------------------------------------


def make_app(settings: Settings) -> FastAPI:
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(title="Strawberry", version="1", lifespan=lifespan, redoc_url=None)
    app.state.service = service
    for kind in (ApiError, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    for route in ROUTES:
        add_route(app, route)
    return app


def add_route(app: FastAPI, route: Route) -> None:
    extra, handler = dict(route.extra), route.handler
    if (body := signature(handler).parameters.get("body")) is not None:
        content = {"application/json": {"schema": body_schema(body.annotation)}}
        extra["requestBody"] = {"required": True, "content": content}
        handler.__signature__ = with_body(handler, body.annotation)
    errors = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}
    app.add_api_route(route.path, handler, methods=[route.method], response_model=route.answer, tags=[route.tag],
                      responses=errors | route.responses, openapi_extra=extra, operation_id=handler.__name__)  # fmt: skip


def with_body(handler: Callable, cls: type):
    """The handler's signature, in which FastAPI finds how its body is read."""

    async def read(request: Request):
        return await read_body(request, cls)

    own = signature(handler)
    parameters = own.parameters | {"body": own.parameters["body"].replace(annotation=Annotated[cls, Depends(read)])}
    return own.replace(parameters=list(parameters.values()))


def body_schema(cls: type) -> dict:
    schema, required = object_schema(cls), list(getattr(cls, "required", ()))
    for name in required:
        schema["properties"][name].pop("default", None)
    schema["properties"] |= getattr(cls, "schemas", {})
    return schema | {"required": required}


# ---- the command ---------------------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """Tells the service when it has been told to stop."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        self.service.closing.set()


def main(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        print(help_text("serve.py", Settings, f"{KEY_VARIABLE} in the environment holds keys too."))
        return
    settings = read_command(argv)
    app = make_app(settings)
    config = uvicorn.Config(app, settings.host, settings.port, log_level="info", ws="none", server_header=False,
                            timeout_graceful_shutdown=int(settings.grace))  # fmt: skip
    server = Server(config, app.state.service)
    server.run()
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    import serve  # this file under the name that others know

    run_cli(serve.main)
