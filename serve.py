"""Text, datasets and training over HTTP, in OpenAI's words: one process, for the tools that people already have.

    python serve.py                                           models of bin/ at http://127.0.0.1:8000; /docs explains
    python serve.py --models bin/ --data data/ --port 8000
    STRAWBERRY_API_KEY=… python serve.py --host 0.0.0.0       beyond this machine: only with a key

Nothing is done twice: sample.py reads requests and models, engine.py makes the tokens of many texts at once, and
train.py, as a child process, trains. A new route is a function and a line in ROUTES; what lives as long as the server
does, such as the models in memory, is a class and a line in PARTS.

Index:  errors · settings and the command line · bodies · security · metrics · the engine · models · the service ·
        routes: completions and models · files, datasets, runs · the page · the registry · the app · the command
"""

import asyncio
import base64
import copy
import dataclasses
import hashlib
import heapq
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import h11
import torch
import uvicorn
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

import jobs
import plot
from checkpoint import LOCK, Lock, read_about
from encoder import EOT, PAD
from options import UserError, asks_for_help, check, declared, nearest, object_schema, option, run_cli, show, to_dict
from strawberry.command_line import format_help, parse_settings
from strawberry.common import Output, check_outputs
from strawberry.data import assemble
from strawberry.data.objectives import decode_with_sentinels
from strawberry.inference import sampling
from strawberry.inference.engine import Decoder
from strawberry.inference.loading import MODEL_SUFFIXES, choose_device_name, load_for_inference
from strawberry.inference.scoring import iter_windows
from strawberry.inference.text import (
    TextStream,
    choose_num_rows,
    draw_seed,
    encode_source_text,
    encode_text,
    make_request,
)
from strawberry.ops.common import to_accum_dtype

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
        message, param = clean(self.message)[:2000], clean(self.param or "")[:200]
        return {"error": {"message": message, "type": kind, "param": param or None, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def clean(text: str) -> str:
    """A text that UTF-8 can spell: half a surrogate pair, which JSON and models may make, becomes U+FFFD."""
    return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)


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
        return ApiError(getattr(error, "status", 400), str(error), getattr(error, "param", None),
                        getattr(error, "code", None))  # fmt: skip
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return ApiError(400, f"{name} = {show(first.get('input'))}: {first['msg'].lower()}", name)
    if isinstance(error, HTTPException):
        what = {404: "there is nothing at this address; /docs lists what there is",
                405: "this address does not know the method; /docs lists what it knows"}  # fmt: skip
        return ApiError(error.status_code, what.get(error.status_code, str(error.detail)), headers=error.headers)
    return ApiError(500, "the server failed at this; its log says why", code="internal_error")


NO_CHAT = ("the models here are base models, which continue a text and are not trained to chat: send the text as "
           "`prompt` to POST /v1/completions (client.completions.create)")  # fmt: skip
NO_ROUTE = {  # how an address begins that clients may ask for and that is not there → what to do instead
    "/v1/chat": NO_CHAT, "/v1/responses": NO_CHAT, "/v1/conversations": NO_CHAT, "/v1/messages": NO_CHAT,
    "/v1/assistants": NO_CHAT, "/v1/threads": NO_CHAT,
    "/v1/embeddings": "the models here make no embeddings; POST /v1/completions continues a text",
}  # fmt: skip


def advise_route(path: str) -> ApiError | None:
    """What a client is told who asks for an address of OpenAI's that is not here, or leaves out the /v1 of those that
    are, or repeats it; None for other addresses."""
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
    failure, models = as_api_error(error), Path(request.app.state.service.settings.models).resolve()
    failure.message = failure.message.replace(f"{models}{os.sep}", "")  # where it is, is no business of clients
    answer = failure.response()
    if answer.status_code == 405:  # the framework names the methods of one route, and an address may have several
        same = [route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE]
        answer.headers["Allow"] = ", ".join(sorted(set().union(*(route.methods or () for route in same))))
    return answer


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
    max_body: float = option(2, "MiB of a JSON body at most", above=0)
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
    return parse_settings([*argv, *(f"--api_key={key}" for key in keys)], Settings)


# ---- bodies --------------------------------------------------------------------------------------------------------
# A JSON body is a dataclass of options, as configs are: its fields are declared once, with bounds and meaning; from
# them come the messages of what is wrong and the schema. A class may have `schemas`, which replace fields' own.

BODY_SECONDS = 60  # that a client may take to send its JSON


async def read_body(request: Request, cls: type) -> Any:
    """The JSON body of a request as an instance of `cls`. A null stands for what the field is without it."""
    data = await read_bytes(request, int(request.app.state.service.settings.max_body * MIB))
    if len(data) < 10_000:
        return checked(data, cls)
    async with request.app.state.service.large:  # it takes a while, for which nobody else is to wait
        return await asyncio.to_thread(checked, data, cls)


def checked(data: bytes, cls: type) -> Any:
    raw = parse_json(data)
    if not isinstance(raw, dict):
        raise ApiError(400, f"the body is {show(raw)}; it must be an object, {{ … }}")
    known, neutral = declared(cls), getattr(cls, "neutral", {})
    unsupported = [name for name in raw if name in neutral and not is_neutral(raw[name], neutral[name])]
    given = {name: value for name, value in raw.items()
             if name not in neutral and (value is not None or name not in known)}  # fmt: skip
    body, problems = check(cls, given)
    missing = [name for name in getattr(cls, "required", ()) if name not in given]
    problems = [f"{name} = null: must be given" for name in missing] + problems
    problems += [f"{name} = {show(raw[name])}: is not supported; {neutral_values(neutral[name])}"
                 for name in unsupported]  # fmt: skip
    if problems:
        raise ApiError(400, "; ".join(problems[:20]), problems[0].partition(" = ")[0])
    return body


def is_neutral(value: Any, allowed: tuple) -> bool:
    """Whether a field's value is null or one of `allowed`. JSON's true is not 1, though Python's is."""
    return value is None or any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed)


def neutral_values(allowed: tuple) -> str:
    """What to do about a field that takes only these values and null, in words."""
    values = " or ".join(show(value) for value in allowed)
    return f"leave it out, or send {values}, which changes nothing" if values else "leave it out"


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
    except ClientDisconnect as error:
        raise ApiError(400, "the client left in the middle of the body") from error
    return bytes(data)


MOST_FIELDS = 1000  # of a body, in all its objects together


def parse_json(data: bytes) -> Any:
    fields = 0

    def as_dict(pairs: list[tuple[str, Any]]) -> dict:
        nonlocal fields
        fields += len(pairs)
        if fields > MOST_FIELDS:
            raise ApiError(400, f"the body has more than {MOST_FIELDS} fields")
        found = dict(pairs)
        if len(found) < len(pairs):
            name = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise ApiError(400, f"{name}: given twice; keep one", name)
        return found

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=as_dict)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 ({error.reason}, byte {error.start})") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON ({error})") from error


# ---- security ------------------------------------------------------------------------------------------------------


class Gate:
    """What comes before every route: whom the request names (Host, so that no other site's name leads here), where it
    comes from (Origin, so that no other site's page asks), its key, and how often it comes. Counts requests too.

    The key comes as `Authorization: Bearer KEY`, or as the password of Basic, for which a browser asks.
    """

    HEADERS = (  # whatever an answer holds, a browser takes nothing in it from elsewhere, nor as part of another page
        (b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"), (b"referrer-policy", b"same-origin"),
        (b"content-security-policy", b"default-src 'self' 'unsafe-inline'; img-src 'self' data: blob:"),
    )  # fmt: skip

    def __init__(self, app: ASGIApp, service: "Service"):
        self.app, self.service, self.settings = app, service, service.settings
        self.rate = Rate(self.settings.rate)
        names = ("localhost", "127.0.0.1", "::1", self.settings.host, *self.settings.allow_host)
        self.names = {name.lower() for name in names}
        self.open = {route.path for route in ROUTES if route.open}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with self.service.metrics.request(scope) as told:

            async def noting(message: dict) -> None:
                if message["type"] == "http.response.start":
                    told.append(message["status"])
                    message["headers"] = [*message.get("headers", ()), *self.HEADERS]
                await send(message)

            try:
                self.check(scope)
            except ApiError as error:
                await error.response()(scope, receive, noting)
            else:
                await self.app(scope, receive, noting)

    def check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        named = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([a-zA-Z0-9_.-]+))(?::\d+)?", host)
        name = (named[1] or named[2]).lower() if named else None
        if name not in self.names and (not scope["server"] or name != scope["server"][0]):
            raise ApiError(403, f"Host is {show(host)}, which is no name of this server; start it with --allow_host "
                           "NAME to make it one", "Host")  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise ApiError(403, f"Origin is {show(origin)}: pages of other sites may not use this server", "Origin")
        if scope["path"] in self.open:
            return
        key = self.key(headers.get("authorization", ""))
        self.rate.take(key or (scope["client"] or ("",))[0])
        if self.settings.api_key and key is None:
            raise ApiError(401, "the key is missing or wrong; send it as Authorization: Bearer KEY", "Authorization",
                           "invalid_api_key", {"WWW-Authenticate": 'Basic realm="strawberry"'})  # fmt: skip

    def key(self, authorization: str) -> str | None:
        """The key that a header brings, if it is one. Each is compared, in a time that says nothing about it."""
        scheme, _, given = authorization.partition(" ")
        given, said = given.strip().encode("latin-1", "replace"), b""
        if scheme.lower() == "bearer":
            said = given
        elif scheme.lower() == "basic":
            with suppress(ValueError):
                said = base64.b64decode(given, validate=True).partition(b":")[2]
        same = [hmac.compare_digest(digest(said), digest(key.encode())) for key in self.settings.api_key]
        return next((key for key, is_it in zip(self.settings.api_key, same, strict=True) if is_it), None)


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class Rate:
    """So many requests a minute for each name, of which a tenth may come at once."""

    def __init__(self, per_minute: int):
        self.speed, self.room = per_minute / 60, max(1.0, per_minute / 10)
        self.left: dict[str, tuple[float, float]] = {}  # name → requests left, and when that was

    def take(self, name: str) -> None:
        if not self.speed:
            return
        now = time.monotonic()
        left, then = self.left.get(name, (self.room, now))
        left = min(self.room, left + (now - then) * self.speed)
        if left < 1:
            wait = math.ceil((1 - left) / self.speed)
            raise ApiError(429, f"more than {self.speed * 60:.0f} requests a minute (--rate); come again in {wait} s",
                           code="rate_limit_exceeded", headers={"Retry-After": str(wait)})  # fmt: skip
        if len(self.left) > 10_000:  # names are addresses of anybody: forget who has all left again
            self.left = {n: (k, t) for n, (k, t) in self.left.items() if k + (now - t) * self.speed < self.room}
        self.left[name] = (left - 1, now)


class Protocol(H11Protocol):
    """A connection. One that does not say within HEADER_SECONDS what it wants is closed, as is one too many."""

    HEADER_SECONDS, MOST = 20, 1000
    slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.watch()
        if len(self.connections) > self.MOST:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.unwatch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self.watch()
        else:
            self.unwatch()

    def watch(self) -> None:
        self.slow = self.slow or self.loop.call_later(self.HEADER_SECONDS, self.too_slow)

    def unwatch(self) -> None:
        if self.slow is not None:
            self.slow.cancel()
            self.slow = None

    def too_slow(self) -> None:
        self.slow = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(ApiError(400, "this is no HTTP request").body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
                   (b"connection", b"close")]  # fmt: skip
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


# ---- metrics -------------------------------------------------------------------------------------------------------

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """What /metrics tells, in Prometheus' text format."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"namespace": "strawberry", "registry": self.registry}
        self.requests = Counter("requests", "requests answered", ["method", "route", "status"], **own)
        timed = own | {"buckets": SECONDS}
        self.seconds = Histogram("request_seconds", "time until an answer is complete", ["route"], **timed)
        self.first = Histogram("first_token_seconds", "time until a text's first token", **timed)
        self.step = Histogram("step_seconds", "time for a token of each row", **timed)
        self.tokens = Counter("tokens", "tokens read and made", ["kind"], **own)
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind)

    def gauge(self, name: str, doc: str, value: Callable[[], float]) -> None:
        """A number that is asked for whenever the metrics are."""
        Gauge(name, doc, namespace="strawberry", registry=self.registry).set_function(value)

    @contextmanager
    def request(self, scope: Scope) -> Iterator[list[int]]:
        """Counts a request and its time. What it was answered with is put into the list."""
        began, told = time.perf_counter(), []
        try:
            yield told
        except Exception:
            told.append(500)  # will be the answer, if it has not begun
            raise
        finally:
            route = getattr(scope.get("route"), "path", "none")  # the pattern, of which there are few
            self.requests.labels(scope["method"] if route != "none" else "any", route, told[0] if told else 499).inc()
            self.seconds.labels(route).observe(time.perf_counter() - began)


# ---- the engine ----------------------------------------------------------------------------------------------------
# A model has a thread of its own, in which all is computed that its texts need. Orders, the texts of one request, come
# to it from the event loop's thread; what it has to say of them goes back into their queues, once a step for all.

log = logging.getLogger("uvicorn.error")
ONE_AT_A_TIME = threading.Lock()  # on CUDA: while a step is recorded, no other thread may ask for memory


class Answer(TextStream):
    """One text of an order: sample.py's, with all that its reader is told at the end."""

    def __init__(self, encoder, request: sampling.Request, body: "CompletionBody", index: int, given: list[int]):
        super().__init__(encoder, request, body.stops)
        self.index, self.given = index, given  # its place in the order; the prompt's tokens as they were given
        self.tokens: list[int] = []
        self.echo = self.said = text_of(encoder, given) if body.echo else ""
        self.scores: Scores | None = None

    def take(self, token: int, why: str | None) -> str:
        self.tokens.append(token)
        piece = clean(self.push(token, why))
        self.said += piece
        return piece


class Order:
    """The texts that one request asks for. `events` gets what becomes of them: (answer, piece), (answer, None) at its
    end, or an ApiError instead of everything else."""

    def __init__(self, engine: "Engine", body: "CompletionBody", answers: list[Answer]):
        self.engine, self.body, self.answers = engine, body, answers
        self.waiting, self.active, self.left = deque(answers), 0, len(answers)
        self.began = time.perf_counter()
        self.events: asyncio.Queue = asyncio.Queue()
        self.gone = False

    def leave(self) -> None:
        """Nobody waits for it any more: its rows are to be freed."""
        self.gone = True
        self.engine.wake()


class QueueTime:
    """How long an order that comes now would wait for its first row, from measured times.

    It follows Engine.fill: an order keeps a row until all its texts are done, and gives up any others; a row that it
    gives up goes to the oldest order that has none. A text takes a step for each of its tokens; how many of those that
    were asked for it makes is measured too.
    """

    def __init__(self):
        self.step_seconds, self.steps = 0.0, 0  # of a token for each row, the prompts read meanwhile included
        self.share, self.texts = 1.0, 0  # of the tokens asked for, how many a text has in the end

    def record_step(self, seconds: float) -> None:
        weight = max(0.01, 1 / max(self.steps, 1))  # the first step warms up: the second one replaces it
        self.step_seconds += weight * (seconds - self.step_seconds)
        self.steps += 1

    def record_text(self, answer: Answer) -> None:
        if answer.request.max_new_tokens:
            self.texts += 1
            self.share += max(0.05, 1 / self.texts) * (answer.num_tokens / answer.request.max_new_tokens - self.share)

    def steps_waiting(self, order: Order) -> float:
        """Of the texts that have no row yet; all of an order are of about one length."""
        return self.share * len(order.waiting) * order.answers[0].request.max_new_tokens

    def estimate(self, running: list[tuple[Order, Answer]], orders: list[Order], rows: int) -> float:
        """Seconds until an order behind those begins."""
        remaining: dict[int, list[float]] = {}  # of each order's running texts, in steps
        for order, answer in running:
            steps = self.share * (answer.request.max_new_tokens - answer.num_tokens)
            remaining.setdefault(id(order), []).append(steps)
        free_after, queue = [0.0] * (rows - len(running)), []  # in steps
        for order in orders:
            if id(order) in remaining:
                *others, last = sorted(remaining[id(order)])
                free_after += [*others, last + self.steps_waiting(order)]
            else:
                queue.append(self.steps_waiting(order))
        free_after = free_after or [0.0]
        heapq.heapify(free_after)
        for steps in queue:
            heapq.heapreplace(free_after, free_after[0] + steps)
        return free_after[0] * self.step_seconds


class Engine:
    """A model in memory and the thread that makes its texts."""

    PATIENCE = 0.2  # seconds that prompts are read for while texts under way wait

    def __init__(self, file: "ModelFile", settings: Settings, metrics: Metrics, after: list["Engine"]):
        self.name, self.path, self.stamp, self.settings, self.metrics = (
            file.name, file.path, file.stamp, settings, metrics)  # fmt: skip
        self.bytes = file.stamp[1]  # an estimate, until it is loaded
        self.loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self.loop.create_future()
        self.users = 0  # requests that are about to order; counted in the event loop's thread
        self.awake, self.stopping, self.retired, self.ended = threading.Condition(), False, False, False
        self.orders: list[Order] = []  # guarded by awake
        self.running: dict[int, tuple[Order, Answer]] = {}  # handle → what is made in that row
        self.scoring: deque[tuple[Order, Answer]] = deque()
        self.mail: list[tuple[Order, Any]] = []
        self.queue_time = QueueTime()
        on_cuda = choose_device_name(settings.device) == "cuda"
        self.alone: Any = ONE_AT_A_TIME if on_cuda else nullcontext()
        self.thread = threading.Thread(target=self.work, args=(after,), name=f"engine of {file.name}", daemon=True)
        self.thread.start()

    # -- called from the event loop's thread

    @property
    def busy(self) -> bool:
        return bool(self.users or self.orders)

    @property
    def queued(self) -> int:
        """Orders of which no text has begun."""
        return sum(order.active == 0 and order.left == len(order.answers) for order in list(self.orders))

    def check_room(self) -> None:
        """Raises ApiError where as many orders wait as may."""
        running = list(self.running.values())
        free = self.rows - len(running)
        if (queued := self.queued) >= self.settings.queue + free:
            wait = max(1, math.ceil(self.queue_time.estimate(running, list(self.orders), self.rows)))
            raise ApiError(429, f"{queued} completions wait already (--queue {self.settings.queue}); come again in "
                           f"{wait} s", code="queue_full", headers={"Retry-After": str(wait)})  # fmt: skip

    def submit(self, order: Order) -> None:
        self.check_room()
        with self.awake:
            if self.ended:
                raise ApiError(503, "the model is being put away; come again", "model", headers={"Retry-After": "1"})
            self.orders.append(order)
            self.awake.notify()

    def wake(self) -> None:
        with self.awake:
            self.awake.notify()

    def stop(self) -> None:
        """To end now; who still waits is told."""
        self.stopping = True
        self.wake()

    def retire(self) -> None:
        """To end when nobody needs it any more."""
        self.retired = True
        self.wake()

    # -- the thread

    def work(self, after: list["Engine"]) -> None:
        for engine in after:  # their memory first
            engine.thread.join()
        try:
            with self.alone:
                self.load()
        except Exception as error:
            log.warning("cannot load %s: %s", self.path, error)
            self.ended = True
            self.tell_loop(self.fail_loading, self.loading_failure(error))
            return
        self.tell_loop(self.ready.set_result, None)
        end = ApiError(503, "the server stops; come again", headers={"Retry-After": "10"})
        try:
            while self.turn():
                pass
        except Exception as error:  # not even its rows could be made anew
            end = self.failure(error)
        self.ended = True
        self.fail_all(end)
        self.decoder = self.model = None

    def load(self) -> None:
        self.model, self.encoder, self.record = load_for_inference(self.path, self.settings)
        self.rows = choose_num_rows(self.model, self.settings, 2**30)
        self.longest = max(len(self.encoder.token_bytes(token)) for token in range(self.encoder.vocab_size))
        self.make_decoder()
        held = [*self.model.parameters(), *self.model.buffers(), *tensors_in(self.decoder.logits)]
        self.bytes = sum({t.data_ptr(): t.nbytes for t in held}.values())

    def make_decoder(self) -> None:
        """Rows of one shape, whoever is in them, so that a text is exactly what it would be alone."""
        self.decoder = None  # its memory first
        self.decoder = Decoder(self.model, self.rows, self.settings.context, batch_invariant=True,
                               compile=self.settings.compile == "true")  # fmt: skip

    @property
    def room(self) -> int:
        """Tokens of a prompt and what follows it, at most."""
        return min(self.settings.context, self.model.max_positions or self.settings.context)

    def turn(self) -> bool:
        """One token for every row, after those who left have gone and those who wait have come in."""
        with self.awake:
            self.awake.wait_for(lambda: self.orders or self.stopping or (self.retired and not self.users))
            if self.stopping or not self.orders:
                return False
        began, stepped = time.perf_counter(), False
        with self.alone:
            try:
                self.sweep()
                self.fill()
                stepped = bool(self.running)
                self.advance()
                self.score()
            except Exception as error:
                self.fail_all(self.failure(error))
                self.make_decoder()
        if stepped:
            self.queue_time.record_step(time.perf_counter() - began)
        self.post()
        return True

    def sweep(self) -> None:
        for handle, (order, _) in list(self.running.items()):
            if order.gone:
                del self.running[handle]
                self.decoder.release(handle)
        self.scoring = deque(item for item in self.scoring if not item[0].gone)
        for order in [order for order in self.orders if order.gone]:
            self.forget(order)

    def fill(self) -> None:
        """Texts take free rows, of the order with the fewest first, and among equals of the oldest."""
        until = time.monotonic() + self.PATIENCE
        while self.decoder.free and (orders := [o for o in list(self.orders) if o.waiting and not o.gone]):
            order = min(orders, key=lambda order: order.active)
            answer = order.waiting.popleft()
            order.active += 1
            if answer.request.max_new_tokens:
                self.admit(order, answer)
            else:
                answer.finish_reason = "length"
                self.finish(order, answer)
            if time.monotonic() > until:
                return

    def admit(self, order: Order, answer: Answer) -> None:
        try:
            self.running[self.decoder.admit(answer.request)] = order, answer
        except UserError as error:
            self.fail(order, ApiError(400, str(error), "prompt"))
        except Exception as error:
            self.fail(order, self.failure(error))

    def advance(self) -> None:
        if not self.running:
            return
        began = time.perf_counter()
        arrived = self.decoder.step()
        for handle, token, why in arrived:
            order, answer = self.running[handle]
            if not answer.num_tokens:
                self.metrics.first.observe(time.perf_counter() - order.began)
            piece = answer.take(token, why)
            if piece and order.body.stream:
                self.mail.append((order, (answer, piece)))
            if answer.finish_reason:
                del self.running[handle]
                if why is None:  # a stop string, of which the decoder does not know
                    self.decoder.release(handle)
                self.finish(order, answer)
        self.metrics.tokens.labels("completion").inc(len(arrived))
        self.metrics.step.observe(time.perf_counter() - began)

    def finish(self, order: Order, answer: Answer) -> None:
        self.queue_time.record_text(answer)
        if order.body.logprobs is None:
            self.done(order, answer)
        else:
            self.scoring.append((order, answer))

    def score(self) -> None:
        """The logprobs of one text that has ended."""
        if self.scoring:
            order, answer = self.scoring.popleft()
            tokens = answer.request.prompt + answer.tokens
            try:
                answer.scores = scores(self.model, tokens, answer.request.source, order.body.logprobs)
                self.done(order, answer)
            except Exception as error:
                self.fail(order, self.failure(error))

    def done(self, order: Order, answer: Answer) -> None:
        order.active, order.left = order.active - 1, order.left - 1
        self.mail.append((order, (answer, None)))
        if not order.left:
            self.forget(order)

    def forget(self, order: Order) -> None:
        with self.awake:
            if order in self.orders:
                self.orders.remove(order)

    def failure(self, error: Exception) -> ApiError:
        """What whoever waits is told of what went wrong in here."""
        log.error("the engine of %s failed", self.path, exc_info=error)
        if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
            told = "there is not enough memory; a smaller --context or --batch of the server takes less"
            return ApiError(503, told, headers={"Retry-After": "5"})
        return ApiError(500, str(error)) if isinstance(error, UserError) else as_api_error(error)

    def loading_failure(self, error: Exception) -> ApiError:
        """What whoever waits for a model that cannot be loaded is answered."""
        if not self.path.exists():
            return ApiError(404, f"model = {show(self.name)}: was deleted", "model", "model_not_found")
        if isinstance(error, UserError) and str(self.path) in str(error):
            return DamagedFile(self.name, self.stamp, without_path(str(error), self.path, self.name)).error()
        failure = ApiError(500, str(error)) if isinstance(error, UserError) else self.failure(error)
        failure.message, failure.param = f"model = {show(self.name)}: {failure.message}", "model"
        return failure

    def fail(self, order: Order, error: ApiError) -> None:
        order.gone = True
        self.mail.append((order, error))

    def fail_all(self, error: ApiError) -> None:
        with self.awake:
            orders, self.orders = self.orders, []
        self.running.clear()
        self.scoring.clear()
        for order in orders:
            self.fail(order, error)
        self.post()

    def post(self) -> None:
        mail, self.mail = self.mail, []
        if mail:
            self.tell_loop(deliver, mail)

    def tell_loop(self, function: Callable, *args: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            self.loop.call_soon_threadsafe(function, *args)

    def fail_loading(self, error: ApiError) -> None:
        self.bytes = 0
        self.ready.set_exception(error)
        self.ready.exception()  # seen, also where nobody waits


MOST_UNREAD = 100_000  # pieces that are kept for a client that does not take them


def deliver(mail: list[tuple[Order, Any]]) -> None:
    for order, event in mail:
        if order.events.qsize() < MOST_UNREAD:
            order.events.put_nowait(event)
        elif not order.gone:
            order.events.put_nowait(ApiError(408, f"the client has left {MOST_UNREAD:,} pieces unread"))
            order.leave()


def tensors_in(thing: Any) -> Iterator[torch.Tensor]:
    """The tensors of an object's attributes, lists and dicts, however deep, but not of modules."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            yield from tensors_in(item)
    elif isinstance(thing, dict):
        yield from tensors_in(list(thing.values()))
    elif hasattr(thing, "__dict__") and not isinstance(thing, torch.nn.Module):
        yield from tensors_in(list(vars(thing).values()))


@dataclass
class Scores:
    """How likely a model found each token of a text: None for the first, of which it says nothing."""

    logprobs: list[float | None]
    best: list[list[tuple[int, float]]]  # the likeliest tokens in that place, and their logprobs


@torch.no_grad()
def scores(model, tokens: list[int], source: list[int] | None, k: int) -> Scores:
    """Log probabilities (nats) of the tokens, each after those before it, by one pass over all."""
    ids = torch.tensor([tokens], device=model.device)
    found = Scores([None], [[]])
    for logits, targets in logits_of(model, ids, source):
        logp = logits.log_softmax(dim=-1).clamp(min=-9999.0)  # JSON knows no infinity
        found.logprobs += logp.gather(1, targets.unsqueeze(1)).squeeze(1).tolist()
        values, places = logp.topk(min(k, logp.size(1)))
        found.best += [list(zip(*row)) for row in zip(places.tolist(), values.tolist())]
    return found


def logits_of(model, ids: torch.Tensor, source: list[int] | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(logits (n, V), the tokens (n,) that they are to predict), some positions at a time.

    A model that sees the future gets no more of it than there was when it made the text.
    """
    given = None if source is None else torch.tensor([source], device=ids.device)
    if model.causal:
        logits = model(ids[:, :-1], source=given)[0][0] if ids.size(1) > 1 else ids.new_zeros(0, 1)
        for begin in range(0, len(logits), 256):
            yield to_accum_dtype(logits[begin : begin + 256]), ids[0, begin + 1 : begin + 257]
    else:
        for begin, done, end in iter_windows(ids.size(1) - 1, model.config.block_size, 1, causal=False):
            yield to_accum_dtype(model(ids[:, begin:end])[0][0, done - end :]), ids[0, done + 1 : end + 1]


# ---- models --------------------------------------------------------------------------------------------------------


@dataclass
class ModelFile:
    name: str  # as clients call it; for a checkpoint that is not the name of its file
    path: Path
    stamp: tuple  # another one when the file is
    hyperparams: dict

    @property
    def created(self) -> int:
        return self.stamp[0] // 10**9

    @property
    def generates(self) -> bool:
        return self.hyperparams.get("kind") != "encoder"


@dataclass
class DamagedFile:
    """A file that has a model's suffix and cannot be read as a model."""

    name: str
    stamp: tuple
    reason: str

    def error(self) -> ApiError:
        return ApiError(500, f"model = {show(self.name)}: its file is damaged, or is no model file: {self.reason}; "
                        "restore it, or train it again", "model", "model_damaged",
                        {"x-should-retry": "false"})  # fmt: skip


def read_model_file(name: str, path: Path, stamp: tuple) -> ModelFile | DamagedFile:
    """What the file's header says of the model; its weights are left unread."""
    try:
        hyperparams = read_about(path)[0]
        for key, kind in (("arch", str), ("vocab_size", int), ("block_size", int)):
            if not isinstance(hyperparams.get(key), kind):
                raise UserError(f"{path}: its hyperparameters have no {key}")
    except UserError as error:
        return DamagedFile(name, stamp, without_path(str(error), path, name))
    return ModelFile(name, path, stamp, hyperparams)


def without_path(text: str, path: Path, name: str) -> str:
    """The text with the model's name in place of its file's path, which is no business of clients."""
    return text.replace(str(path.resolve()), name).replace(str(path), name)


def stamp_of(about: os.stat_result) -> tuple:
    return (about.st_mtime_ns, about.st_size, about.st_ino)


class Models:
    """The model files of the folder, and those of them that are in memory."""

    def __init__(self, service: "Service"):
        self.service, self.settings = service, service.settings
        self.files: dict[str, ModelFile | DamagedFile] = {}  # by name
        self.scanning = threading.Lock()
        self.loaded: dict[str, Engine] = {}  # the one that was asked last is last
        self.limit = self.settings.memory * 2**30 or memory(choose_device_name(self.settings.device)) / 2  # bytes
        gauge = service.metrics.gauge
        gauge("models_loaded", "models in memory", lambda: len(self.loaded))
        gauge("models_bytes", "memory that they take", lambda: self.bytes)
        gauge("queue", "completions that wait for a row", lambda: sum(e.queued for e in self.loaded.values()))
        gauge("rows_busy", "texts that are being made", lambda: sum(len(e.running) for e in self.loaded.values()))

    async def start(self) -> None:
        self.ending = asyncio.create_task(self.end())
        found = await self.all()
        log.info("%s: %s", self.settings.models, ", ".join(found) or "no models yet")

    async def end(self) -> None:
        """What is not done a moment before the server must stop is told so."""
        await self.service.closing.wait()
        await asyncio.sleep(max(0.0, self.settings.grace - 0.5))
        for engine in self.loaded.values():
            engine.stop()

    async def stop(self) -> None:
        self.ending.cancel()
        for engine in self.loaded.values():
            engine.stop()
        for engine in self.loaded.values():
            await asyncio.to_thread(engine.thread.join, 5)

    async def all(self) -> dict[str, ModelFile]:
        """The model files that are there now, by name."""
        return await asyncio.to_thread(self.scan)

    def scan(self) -> dict[str, ModelFile]:
        with self.scanning:
            found = {}
            with suppress(FileNotFoundError), os.scandir(self.settings.models) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    with suppress(OSError):
                        if Path(entry.name).suffix in MODEL_SUFFIXES and entry.is_file():
                            found[entry.name] = self.look(entry)
            self.files = found
            return {name: file for name, file in found.items() if isinstance(file, ModelFile)}

    def look(self, entry: os.DirEntry) -> ModelFile | DamagedFile:
        stamp, known = stamp_of(entry.stat()), self.files.get(entry.name)
        if known is not None and stamp == known.stamp:
            return known
        found = read_model_file(entry.name, Path(entry.path), stamp)
        if isinstance(found, DamagedFile):
            log.warning("%s cannot be served: %s", entry.path, found.reason)
        return found

    async def find(self, name: str) -> ModelFile:
        """The model of that name, of the folder or a run's checkpoint; the suffix may be left out where one model alone
        has the name. Raises ApiError where there is none, or its file is damaged."""
        await self.all()
        found = self.files.get(name) or await asyncio.to_thread(self.checkpoint, name)
        if found is None:
            candidates = self.with_stem(name)
            if len(candidates) > 1:
                raise ApiError(404, f"model = {show(name)}: may be {' or '.join(map(show, candidates))}; write the "
                               "suffix too", "model", "model_not_found")  # fmt: skip
            found = self.files[candidates[0]] if candidates else None
        if found is None:
            raise self.not_found(name)
        if isinstance(found, DamagedFile):
            raise found.error()
        return found

    def checkpoint(self, name: str) -> ModelFile | DamagedFile | None:
        path = self.service.factory.checkpoint(name)
        with suppress(OSError):  # removed meanwhile
            return path and read_model_file(name, path, stamp_of(path.stat()))
        return None

    def with_stem(self, name: str) -> list[str]:
        """The files that are called so but for their suffix."""
        return [file for file in self.files if Path(file).stem == name]

    def not_found(self, name: str) -> ApiError:
        there = [file.name for file in self.files.values() if isinstance(file, ModelFile)]
        return ApiError(404, f"model = {show(name)}: there is no such model{nearest(name, there)}; /v1/models lists "
                        "them", "model", "model_not_found")  # fmt: skip

    async def delete(self, name: str) -> None:
        """Remove a model from the folder and from memory. Raises ApiError or Refused where it is none of the folder's,
        where it is generating, and where a job writes or reads it."""
        await self.all()
        found = self.files.get(name)
        if found is None and self.service.factory.checkpoint(name) is not None:
            raise ApiError(400, f"model = {show(name)}: is a checkpoint of a run, and goes when its run is deleted",
                           "model")  # fmt: skip
        if found is None and (candidates := self.with_stem(name)):
            raise ApiError(404, f"model = {show(name)}: a model is deleted by its whole name, such as "
                           f"{show(candidates[0])}", "model", "model_not_found")  # fmt: skip
        if found is None:
            raise self.not_found(name)
        if isinstance(found, DamagedFile):  # perhaps it is somebody's file of another kind
            raise ApiError(409, f"model = {show(name)}: is damaged, or is no model file, and the server deletes models "
                           f"only: {found.reason}; remove it on disk", "model", "model_damaged")  # fmt: skip
        engine = self.loaded.get(name)
        if engine is not None and engine.busy:
            raise ApiError(409, f"the model {name} is generating; try again when it has ended", "model", "model_in_use")
        await run_in_threadpool(self.service.factory.jobs.remove_model, name)
        if (engine := self.loaded.pop(name, None)) is not None:
            engine.retire()

    async def newest(self) -> str:
        """The name of the newest model, as sample.py takes it."""
        files = {name: file for name, file in (await self.all()).items() if file.generates}
        if not files:
            raise ApiError(404, "there is no model yet; train one", "model", "model_not_found")
        return max(files, key=lambda name: (files[name].stamp[0], name))

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Engine]:
        """The engine of a model, loaded, which stays while it is used."""
        file = await self.find(name)
        name = file.name
        if not file.generates:
            raise ApiError(400, f"model = {show(name)}: this {file.hyperparams['arch']} is an encoder: it predicts "
                           "masked tokens and makes no text", "model")  # fmt: skip
        engine = self.loaded.pop(name, None)
        if engine is not None and (engine.stamp != file.stamp or engine.ended):
            engine.retire()
            engine = None
        if engine is None:
            engine = Engine(file, self.settings, self.service.metrics, self.make_room(file.stamp[1]))
        self.loaded[name] = engine
        engine.users += 1
        try:
            await asyncio.shield(engine.ready)
            self.evict(0)  # now that it is known how much it takes
            yield engine
        finally:
            engine.users -= 1
            if engine.retired:
                engine.wake()

    def evict(self, size: int) -> list[Engine]:
        """Those that have to go so that `size` bytes fit: the longest idle first, and none that is busy."""
        gone = []
        for name, engine in list(self.loaded.items()):
            if self.bytes + size <= self.limit:
                break
            if not engine.busy:
                gone.append(self.loaded.pop(name))
                engine.retire()
        return gone

    def make_room(self, size: int) -> list[Engine]:
        gone = self.evict(size)
        if self.loaded and self.bytes + size > self.limit:
            raise ApiError(503, "the memory for models (--memory) is taken by others that are busy; come again",
                           "model", headers={"Retry-After": "5"})  # fmt: skip
        return gone

    @property
    def bytes(self) -> int:
        return sum(engine.bytes for engine in self.loaded.values())


def memory(device: str) -> float:
    """Bytes of memory that a device has."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    with suppress(ValueError, OSError, AttributeError):  # Windows has no sysconf
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 * 2**30


# ---- the service ---------------------------------------------------------------------------------------------------


class Service:
    """What a running server knows: its settings, and each part of PARTS under its name."""

    def __init__(self, settings: Settings):
        self.settings, self.metrics = settings, Metrics()
        self.large = asyncio.Semaphore(1)  # large bodies are read one after the other
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

MOST_PROMPTS, MOST_SAMPLES, MOST_STOPS, MOST_LOGPROBS = 64, 32, 16, 5
TOKENS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}


# What OpenAI's and vLLM's clients may send to completions and nothing here implements, with the values besides null
# that ask for nothing: many clients send these defaults with every request. Other values are refused by name.
UNSUPPORTED_FIELDS: dict[str, tuple] = {
    # https://platform.openai.com/docs/api-reference/completions/create
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "suffix": ("",),
    # vLLM's CompletionRequest: sampling
    "use_beam_search": (False,), "early_stopping": (False,), "length_penalty": (1,), "repetition_penalty": (1,),
    "min_tokens": (0,), "ignore_eos": (False,), "stop_token_ids": ([],), "bad_words": ([],), "allowed_token_ids": (),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,), "truncate_prompt_tokens": (),
    "spaces_between_special_tokens": (True, False), "truncation_side": (), "logits_processors": ([],),
    "repetition_detection": (), "thinking_token_budget": (),
    # vLLM's: what is read and answered
    "add_special_tokens": (True, False), "prompt_embeds": (), "prompt_logprobs": (), "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,), "return_token_offsets": (False,),
    "request_id": (), "priority": (0,), "cache_salt": (), "vllm_xargs": ({},),
    "kv_transfer_params": ({},), "ec_transfer_params": ({},),
    # vLLM's: structured output
    "response_format": ({"type": "text"},), "structured_outputs": (), "guided_json": (), "guided_regex": (),
    "guided_choice": (), "guided_grammar": (), "guided_decoding_backend": (), "guided_whitespace_pattern": (),
}  # fmt: skip


@dataclass
class StreamOptions:
    include_usage: bool | None = option(None, "whether a last piece tells how many tokens it were")
    include_obfuscation: bool | None = option(None, "of no effect: no piece is padded")
    continuous_usage_stats: bool | None = option(False, "whether, with include_usage, every piece tells it too")


@dataclass
class CompletionBody:
    model: str = option(None, "name of a model of /v1/models")
    prompt: Any = option(None, f"text to continue, or its tokens, or a list of at most {MOST_PROMPTS} of either")
    source: str | None = option(None, "what an encoder-decoder reads; a prompt then begins its answer")
    max_tokens: int | None = option(16, "tokens to make at most; a text ends sooner where the context does", low=0)
    temperature: float | None = option(1.0, "0 takes the likeliest token each time", low=0, high=100)
    top_p: float | None = option(1.0, "draw from the likeliest tokens that make up this probability", above=0, high=1)
    top_k: int | None = option(0, "draw from the k likeliest tokens; 0 or -1: from all", low=-1, high=2**20)
    min_p: float | None = option(0.0, "draw from tokens at least so often as likely as the likeliest", low=0, high=1)
    n: int | None = option(1, "texts for each prompt; text i is drawn with seed + i", low=1, high=MOST_SAMPLES)
    seed: int | None = option(None, "the same seed makes the same text; default, or -1: drawn", low=-1,
                              high=2**53 - 1)  # fmt: skip
    stop: Any = option(None, f"text that ends a text and is not part of it, or a list of at most {MOST_STOPS}")
    echo: bool | None = option(False, "whether the prompt is given back before what continues it")
    logprobs: int | None = option(None, "tell each token's log probability, and so many likeliest tokens'", low=0,
                                  high=MOST_LOGPROBS)  # fmt: skip
    stream: bool | None = option(False, "send the text as it is made, as server-sent events")
    stream_options: StreamOptions | None = option(None, "of a stream")
    timeout: float | None = option(None, "seconds until it is given up; the server's --timeout holds too", low=5)
    user: str | None = option("", "who asks; of no effect")
    best_of: int | None = option(None, "n, or 1, which is n: all texts are sent, and none is chosen among", low=1)

    required: ClassVar = ("model", "prompt")
    neutral: ClassVar = UNSUPPORTED_FIELDS
    schemas: ClassVar = {
        "prompt": lambda: prompt_schema(TOKENS),
        "stop": {"anyOf": [{"type": "null"}, {"type": "string", "minLength": 1},
                           {"type": "array", "maxItems": MOST_STOPS, "items": {"type": "string", "minLength": 1}}]},
        "best_of": {"enum": [None, 1]},
    }  # fmt: skip

    def __post_init__(self) -> None:
        self.top_k = 0 if self.top_k == -1 else self.top_k
        self.seed = None if self.seed == -1 else self.seed

    def problems(self) -> Iterator[tuple[str, str]]:
        if not (isinstance(self.prompt, str) or is_tokens(self.prompt) or self.is_list()):
            yield "prompt", f"must be text, or a list of tokens, or a list of at most {MOST_PROMPTS} of either"
        stops = self.stops
        if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
            yield "stop", f"must be text, not empty, or a list of at most {MOST_STOPS} of it"
        if self.best_of not in (None, 1, self.n):
            yield "best_of", "is not supported; ask for n texts and choose, or leave it out"

    def is_list(self) -> bool:
        """Whether the prompt is a list of texts or a list of lists of tokens."""
        if not isinstance(self.prompt, list) or not 1 <= len(self.prompt) <= MOST_PROMPTS:
            return False
        return all(isinstance(p, str) for p in self.prompt) or all(map(is_tokens, self.prompt))

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop if self.stop is not None else []

    @property
    def prompts(self) -> list[str | list[int]]:
        prompts = self.prompt if self.is_list() else [self.prompt]
        return [prompt if isinstance(prompt, str) else [int(token) for token in prompt] for prompt in prompts]

    @property
    def length(self) -> int:
        """What sample.py calls max_tokens."""
        return self.max_tokens


def is_tokens(prompt: Any) -> bool:
    """Whether it is a list of tokens; JSON has one kind of number, so that 5.0 is one too."""
    numbers = isinstance(prompt, list) and len(prompt) > 0 and all(type(t) in (int, float) for t in prompt)
    return numbers and all(0 <= t < 2**31 and t == int(t) for t in prompt)


@dataclass
class Logprobs:
    """Of each token. The first of an echoed prompt has None. In a stream they come with the text's last piece."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@dataclass
class Choice:
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


@dataclass
class Usage:
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass
class Completion:
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None


async def completions(body: CompletionBody, request: Request, service: TheService) -> Any:
    """Text that continues a prompt. Index i·n + j of the choices is text j of prompt i."""
    limit = min(body.timeout or math.inf, service.settings.timeout)
    until = asyncio.get_running_loop().time() + limit
    try:
        async with asyncio.timeout_at(until):
            order = await place_order(body, service)
            told = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
                    "model": order.engine.name}  # fmt: skip
            if body.stream:
                return Stream(order, told, until, limit)
            async for _ in events(order, request.receive):
                pass
    except TimeoutError as error:
        raise late(limit) from error
    if order.left:
        return Response(status_code=499)  # nobody reads it
    choices = [choice(order, answer, answer.said, True) for answer in order.answers]
    return JSONResponse({**told, "choices": choices, "usage": usage(order)})


def late(limit: float) -> ApiError:
    return ApiError(408, f"the completion took more than {limit:g} seconds (timeout)", "timeout", "timeout")


async def place_order(body: CompletionBody, service: Service) -> Order:
    """Has an engine begin. Raises ApiError where the model is unknown, a field doesn't fit it, or too many wait."""
    if body.max_tokens > service.settings.context:
        raise ApiError(400, f"max_tokens = {body.max_tokens}: must be integer <= {service.settings.context}, the "
                       "server's --context", "max_tokens")  # fmt: skip
    async with service.models.use(body.model) as engine:
        engine.check_room()
        order = await asyncio.to_thread(read_order, body, engine)
        engine.submit(order)
    tokens = sum(len(answer.request.prompt) for answer in order.answers[:: body.n])
    service.metrics.tokens.labels("prompt").inc(tokens)
    return order


def read_order(body: CompletionBody, engine: Engine) -> Order:
    """Prompts become tokens, and each text what engine.py is asked for."""
    model, encoder = engine.model, engine.encoder
    seed, answers = draw_seed() if body.seed is None else body.seed, []
    try:
        source = encode_source_text(body.source, model, encoder, engine.record, "source")
    except UserError as error:
        raise ApiError(400, str(error), "source") from error
    for prompt in body.prompts:
        if isinstance(prompt, str) and len(prompt) > engine.room * engine.longest:  # so many that none need be made
            raise too_long(f"{len(prompt):,} characters", engine)
        try:
            given = encode_text(encoder, prompt) if isinstance(prompt, str) else prompt
        except UserError as error:
            raise ApiError(400, f"prompt: {error}", "prompt") from error
        for i in range(body.n):
            request = make_request(body, encoder, given, source, seed + i)
            if i == 0:
                check_prompt(request.prompt, engine)
            request.max_new_tokens = min(request.max_new_tokens, max(engine.settings.context - len(request.prompt), 0))
            answers.append(Answer(encoder, request, body, len(answers), given))
    return Order(engine, body, answers)


def check_prompt(tokens: list[int], engine: Engine) -> None:
    vocab_size = engine.model.config.vocab_size
    if len(tokens) > engine.room:
        raise too_long(f"{len(tokens):,} tokens", engine)
    if max(tokens) >= vocab_size:
        raise ApiError(400, f"prompt: token {max(tokens)} is none of the {vocab_size} of the model's vocabulary",
                       "prompt")  # fmt: skip


def too_long(has: str, engine: Engine) -> ApiError:
    told = f"prompt: has {has}, and the context is of {engine.room:,} tokens; give a shorter one"
    return ApiError(400, told, "prompt", "context_length_exceeded")


async def events(order: Order, receive: Receive) -> AsyncIterator[list[tuple[Answer, str | None]]]:
    """What has become of an order since the last time, until all its texts have ended or the client has gone. Rows are
    free when this ends, however it does. Raises the ApiError that the order failed with."""
    watch = asyncio.create_task(until_gone(order, receive))
    try:
        left = len(order.answers)
        while left and (event := await order.events.get()) is not None:
            batch = [event]
            while not order.events.empty():
                batch.append(order.events.get_nowait())
            for event in batch:
                if isinstance(event, ApiError):
                    raise event
            if None in batch:
                return
            left -= sum(piece is None for _, piece in batch)
            yield batch
    finally:
        watch.cancel()
        order.leave()


async def until_gone(order: Order, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    order.events.put_nowait(None)


class Stream(Response):
    """An order's texts as server-sent events, in OpenAI's words."""

    def __init__(self, order: Order, told: dict, until: float, limit: float):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.order, self.told, self.until, self.limit = order, told, until, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async with asyncio.timeout_at(self.until), aclosing(self.data(receive)) as pieces:
                async for data in pieces:
                    if not begun:
                        begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except (ApiError, TimeoutError) as error:
            error = error if isinstance(error, ApiError) else late(self.limit)
            if not begun:  # it is not too late for a status
                await error.response()(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": event(error.body()), "more_body": True})
        if begun:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def data(self, receive: Receive) -> AsyncIterator[bytes]:
        order, options = self.order, self.order.body.stream_options
        tells_usage = bool(options and options.include_usage)
        continuous, ended = tells_usage and options.continuous_usage_stats, 0
        async with aclosing(events(order, receive)) as batches:
            begun = False
            async for batch in batches:
                chunks = []
                if not begun and order.body.echo:
                    chunks += [choice(order, answer, answer.echo, False) for answer in order.answers]
                begun = True
                for answer, piece in batch:
                    chunks.append(choice(order, answer, piece or "", piece is None))
                    ended += piece is None
                more = {"usage": usage(order) if continuous else None} if tells_usage else {}
                yield b"".join(event({**self.told, "choices": [chunk], **more}) for chunk in chunks)
        if ended == len(order.answers):
            if tells_usage:
                yield event({**self.told, "choices": [], "usage": usage(order)})
            yield b"data: [DONE]\n\n"


def event(data: dict) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def choice(order: Order, answer: Answer, text: str, ended: bool) -> dict:
    why = {"full": "length"}.get(answer.finish_reason, answer.finish_reason) if ended else None
    told = logprobs(order, answer) if ended and answer.scores is not None else None
    return {"index": answer.index, "text": text, "logprobs": told, "finish_reason": why}


def usage(order: Order) -> dict:
    """Tokens read and made; a prompt counts once for all its texts, and the token that ended a text counts."""
    read = sum(len(answer.request.prompt) for answer in order.answers[:: order.body.n])
    made = sum(answer.num_tokens for answer in order.answers)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def logprobs(order: Order, answer: Answer) -> dict:
    encoder, scored, begin = order.engine.encoder, answer.scores, len(answer.request.prompt)
    if order.body.echo:
        begin -= len(answer.given)
    tokens = (answer.request.prompt + answer.tokens)[begin:]
    at, offsets, decoder = len(text_of(encoder, answer.given)) if not order.body.echo else 0, [], encoder.stream()
    for token in tokens:
        offsets.append(at)
        at += len(decoder.push(token)) if token < encoder.vocab_size else 0
    own, best = scored.logprobs[begin:], scored.best[begin:]
    top = [None if p is None else by_likelihood(encoder, [*likely, (token, p)])
           for token, p, likely in zip(tokens, own, best, strict=True)]  # fmt: skip
    return {"tokens": [token_text(encoder, token) for token in tokens], "token_logprobs": own, "top_logprobs": top,
            "text_offset": offsets}  # fmt: skip


def by_likelihood(encoder, tokens: list[tuple[int, float]]) -> dict[str, float]:
    """Each token's text and log probability, the likeliest first; of tokens with the same text, the likeliest."""
    found: dict[str, float] = {}
    for token, logprob in sorted(tokens, key=lambda item: -item[1]):
        found.setdefault(token_text(encoder, token), logprob)
    return found


def text_of(encoder, tokens: list[int]) -> str:
    """Their text; ids that only the model has, as it may be wider than its encoder, spell nothing."""
    return clean(encoder.decode([token for token in tokens if token < encoder.vocab_size]))


def token_text(encoder, token: int) -> str:
    """A token by itself; one that is no whole character is spelt as OpenAI does, bytes:\\xe2\\x82."""
    is_text = token < encoder.vocab_size
    data = encoder.token_bytes(token) if is_text else decode_with_sentinels(encoder, [token]).encode()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def prompt_schema(tokens: dict) -> dict:
    texts = {"type": "array", "minItems": 1, "maxItems": MOST_PROMPTS}
    either = [{**texts, "items": {"type": "string"}}, {**texts, "items": tokens}]
    return {"anyOf": [{"type": "string"}, tokens, *either]}


def completions_here(service: Service, properties: dict) -> None:
    """The schema of a completion's body, for the models that are there now."""
    files = {name: file for name, file in service.models.scan().items() if file.generates}
    properties["max_tokens"]["anyOf"][0]["maximum"] = service.settings.context
    if files:
        known = [file.hyperparams for file in files.values()]
        items = {"type": "integer", "minimum": 0, "maximum": max(h["vocab_size"] for h in known) - 1}
        properties["model"] = properties["model"] | {"enum": list(files)}
        properties["prompt"] |= prompt_schema(TOKENS | {"items": items})
        if not any(h.get("kind") == "encoder-decoder" for h in known):
            properties["source"] = {"type": "null", "description": "for encoder-decoders, of which there is none here"}


@dataclass
class Model:
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    arch: str
    vocab_size: int
    block_size: int
    bytes: int  # on disk
    size: int  # the older name of `bytes`
    loaded: bool


@dataclass
class ModelList:
    object: Literal["list"]
    data: list[Model]


async def list_models(service: TheService) -> ModelList:
    """The models that there are: files of the folder --models, a run's as soon as it has finished."""
    return ModelList("list", [model_answer(service, file) for file in (await service.models.all()).values()])


async def retrieve_model(model: str, service: TheService) -> Model:
    """One of the models."""
    return model_answer(service, await service.models.find(model))


async def delete_model(model: str, service: TheService) -> "Deleted":
    """Delete a model of the folder --models: its file, and what of it is in memory. While it is generating, or a job
    that is not over writes or reads it, the answer is 409. A checkpoint goes with its run."""
    await service.models.delete(model)
    return Deleted(model, "model")


def model_answer(service: Service, file: ModelFile) -> Model:
    h, size = file.hyperparams, file.stamp[1]
    return Model(file.name, "model", file.created, "strawberry", h["arch"], h["vocab_size"], h["block_size"], size,
                 size, file.name in service.models.loaded)  # fmt: skip


@dataclass
class TokenizeBody:
    prompt: Any = option(None, "text; that of a special token, and nothing else, is that token")
    model: str | None = option(None, "whose encoder; default: the newest model's")
    add_special_tokens: bool | None = option(False, "of no effect: there are none to add")

    required: ClassVar = ("prompt",)
    neutral: ClassVar = {"return_token_strs": (False,)}
    schemas: ClassVar = {"prompt": {"type": "string"}}

    def problems(self) -> Iterator[tuple[str, str]]:
        if not isinstance(self.prompt, str):
            yield "prompt", "must be text"


@dataclass
class DetokenizeBody:
    tokens: Any = option(None, "tokens of a text")
    model: str | None = option(None, "whose encoder; default: the newest model's")

    required: ClassVar = ("tokens",)
    schemas: ClassVar = {"tokens": TOKENS | {"minItems": 0}}

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.tokens != [] and not is_tokens(self.tokens):
            yield "tokens", "must be a list of tokens"


@dataclass
class Tokens:
    count: int
    max_model_len: int
    tokens: list[int]


@dataclass
class Detokenized:
    prompt: str


@dataclass
class TokenizerInfo:
    model: str
    vocab_size: int
    eos_token: str
    bos_token: str
    pad_token: str


async def tokenize(body: TokenizeBody, service: TheService) -> Tokens:
    """The tokens of a text, as vLLM tells them; lm-eval asks for this."""
    async with service.models.use(body.model or await service.models.newest()) as engine:
        try:
            special = engine.encoder.specials.get(body.prompt)
            tokens = await asyncio.to_thread(encode_text, engine.encoder, body.prompt) if special is None else [special]
        except UserError as error:
            raise ApiError(400, f"prompt: {error}", "prompt") from error
        return Tokens(len(tokens), engine.room, tokens)


async def detokenize(body: DetokenizeBody, service: TheService) -> Detokenized:
    """The text of tokens."""
    async with service.models.use(body.model or await service.models.newest()) as engine:
        tokens, limit = [int(token) for token in body.tokens], engine.model.config.vocab_size
        if max(tokens, default=0) >= limit:
            raise ApiError(400, f"tokens: {max(tokens)} is none of the {limit} of the model's vocabulary", "tokens")
        return Detokenized(text_of(engine.encoder, tokens))


async def tokenizer_info(service: TheService, model: str | None = None) -> TokenizerInfo:
    """A model's encoder, the newest one's by default."""
    async with service.models.use(model or await service.models.newest()) as engine:
        return TokenizerInfo(engine.name, engine.encoder.vocab_size, EOT, EOT, PAD)


def tokenize_here(service: Service, properties: dict) -> None:
    if files := {name: file for name, file in service.models.scan().items() if file.generates}:
        properties["model"] = {"enum": [*files, None], "description": properties["model"]["description"]}
        if "tokens" in properties:
            limit = min(file.hyperparams["vocab_size"] for file in files.values()) - 1
            properties["tokens"]["items"] = {"type": "integer", "minimum": 0, "maximum": limit}


@dataclass
class Health:
    status: str


async def health() -> Health:
    """Whether the server is there. Needs no key."""
    return Health("ok")


async def metrics(service: TheService) -> Response:
    """Counts of requests and tokens, times, and what is going on now, for Prometheus."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


# ---- files, datasets, runs -----------------------------------------------------------------------------------------
# jobs.py keeps them; here they are put into OpenAI's words.


class Factory:
    """The uploads and jobs of the data directory, which one server at a time may have."""

    def __init__(self, service: "Service"):
        self.settings, self.lock = service.settings, None
        self.uploads: jobs.Uploads | None = None  # from start() on
        self.jobs: jobs.Jobs | None = None
        self.drawn: tuple = ((), b"")  # the last picture, and what it was of
        self.drawing = threading.Lock()  # a picture takes most of a second
        gauge = service.metrics.gauge
        gauge("jobs_running", "training runs whose process is alive", lambda: self.jobs.count("running"))
        gauge("jobs_queued", "training runs that wait", lambda: sum(map(self.jobs.count, jobs.WAITING)))

    def claim(self) -> None:
        """Take the data directory. Raises UserError where another server has it."""
        try:
            for name in (self.settings.data, self.settings.models):
                Path(name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {error.filename}: {error.strerror}; name another directory") from error
        check_outputs([Output("--data", Path(self.settings.data) / LOCK, "lock")])
        self.lock = Lock(self.settings.data, "--data")

    async def start(self) -> None:
        if self.lock is None:
            self.claim()
        root = Path(self.settings.data)
        self.uploads = jobs.Uploads(root.resolve() / "files", int(self.settings.max_upload * MIB))
        self.jobs = jobs.Jobs(root.resolve(), Path(self.settings.models), self.uploads, self.settings.max_jobs)
        self.jobs.start()

    async def stop(self) -> None:
        await run_in_threadpool(self.jobs.stop_all, STOP_SECONDS)
        self.lock.release()
        self.lock = None

    def checkpoint(self, name: str) -> Path | None:
        """The model file in the checkpoint of a run that the name is of, if it is still there."""
        return self.jobs.checkpoint_file(name) if self.jobs else None

    def picture(self, job: jobs.Job, sheet: str, x: str) -> bytes:
        """A sheet of curves as it is now, as PNG."""
        path = job.metrics.path
        with self.drawing:
            now = (job.id, sheet, x, path.stat().st_mtime_ns if path.exists() else 0)
            if self.drawn[0] != now:
                lines = plot.read_points(path) if path.exists() else []
                self.drawn = (now, plot.png(plot.SHEETS[f"{sheet}.png"]({job.about["model"]: lines}, x)))
            return self.drawn[1]


STOP_SECONDS = 60  # that jobs have to save where they are when the server ends
WAIT_SECONDS = 45  # that an answer waits for a job to end that was cancelled or paused
STALL_SECONDS = 60  # that a client may pause in the middle of an upload
LINGER = 64 * MIB  # of a refused upload that are read all the same, so that its client reads the refusal

Limit = Annotated[int, Query(ge=1, le=100, description="how many at most")]
After = Annotated[str | None, Query(description="the id behind which the list goes on")]

# -- uploads


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


@dataclass
class Deleted:
    id: str
    object: str
    deleted: bool = True


def stored_file(about: dict) -> dict:
    return {"id": about["id"], "object": "file", "bytes": about["bytes"], "created_at": int(about["created"]),
            "filename": about["filename"], "purpose": about["purpose"], "status": "processed"}  # fmt: skip


class Form:
    """multipart/form-data as it arrives (RFC 7578): the part `file` goes to disk, the others are short texts."""

    MOST, LONGEST = 32, 4096  # parts, bytes of a text

    def __init__(self, boundary: bytes, upload: jobs.Upload):
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
        if self.n > self.MOST:
            raise ApiError(400, f"the body has more than {self.MOST} parts")
        self.field, self.value, self.headers, self.text = b"", b"", {}, bytearray()

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self.field = self.bounded(self.field + data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self.value = self.bounded(self.value + data[start:end])

    def bounded(self, text: bytes) -> bytes:
        if len(text) > self.LONGEST or len(self.headers) > self.MOST:
            raise ApiError(400, f"a part of the body has headers beyond {self.MOST} of {self.LONGEST} bytes")
        return text

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
        if len(self.text) > self.LONGEST:
            raise ApiError(400, f"{show(self.name)} is longer than {self.LONGEST} bytes", self.name)

    def end(self) -> None:
        self.done = True

    def get(self, name: str, default: str) -> str:
        return self.texts[name].decode("utf-8", "replace") if name in self.texts else default


async def create_file(request: Request, service: TheService) -> StoredFile:
    """Upload a text, such as .txt, .md or .py, as a document, a .json as a list of documents, or a .jsonl as a document
    a line; gzipped or not."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary, limit = options.get(b"boundary", b""), service.factory.uploads.limit
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 70:
        told = "it must be multipart/form-data with a boundary"
        raise ApiError(415, f"Content-Type is {show(kind.decode('latin-1'))}; {told}", "Content-Type")
    stated, most = request.headers.get("content-length", ""), limit + Form.MOST * (Form.LONGEST + 1024)
    upload = await run_in_threadpool(jobs.Upload, service.factory.uploads)
    body = arriving(request)
    try:
        if stated.isdecimal() and int(stated) > most:
            raise jobs.too_large(limit)
        form, n = Form(boundary, upload), 0
        async for data in body:
            n += len(data)
            if n > most:
                raise jobs.too_large(limit)
            await run_in_threadpool(form.write, data)
        about = await run_in_threadpool(finish_upload, form)
    except jobs.Refused as error:
        if error.status == 413:
            await linger(body)
        raise
    finally:
        await run_in_threadpool(upload.abort)
    return stored_file(about)


def finish_upload(form: Form) -> dict:
    if form.filename is None or not form.done:
        told = "its last boundary" if form.filename is not None else "a part of that name"
        raise ApiError(400, f"file: the body lacks {told}", "file")
    purpose = form.get("purpose", "fine-tune")
    if purpose not in jobs.PURPOSES:
        raise ApiError(400, f"purpose = {show(purpose)}: must be one of {', '.join(jobs.PURPOSES)}", "purpose")
    return form.upload.finish(form.filename, purpose)


async def arriving(request: Request) -> AsyncIterator[bytes]:
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


async def linger(body: AsyncIterator[bytes]) -> None:
    """Read on for a moment: many clients read no answer before they have sent all."""
    n, until = 0, time.monotonic() + 5
    with suppress(ApiError, TimeoutError, StopAsyncIteration, RuntimeError):
        while n < LINGER and time.monotonic() < until:
            n += len(await asyncio.wait_for(anext(body), 0.5))


async def list_files(service: TheService, after: After = None, purpose: str | None = None,
                     limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
                     order: Literal["asc", "desc"] = "desc") -> FileList:  # fmt: skip
    """The uploaded files, the newest first."""
    found = [stored_file(about) for about in service.factory.uploads.all() if purpose in (None, about["purpose"])]
    return jobs.page(found if order == "desc" else found[::-1], after, limit)


async def retrieve_file(file_id: str, service: TheService) -> StoredFile:
    """What is known of a file."""
    return stored_file(service.factory.uploads.get(file_id))


async def retrieve_file_content(file_id: str, service: TheService) -> FileResponse:
    """The bytes of a file, as they were uploaded."""
    path = service.factory.uploads.path(file_id)
    return FileResponse(path, media_type="application/octet-stream", filename=f"{file_id}{path.name[7:]}")


async def delete_file(file_id: str, service: TheService) -> Deleted:
    """Delete a file. Datasets that were made of it stay."""
    await run_in_threadpool(service.factory.jobs.remove_file, file_id)
    return Deleted(file_id, "file")


# -- datasets

MOST_FILES = 10_000
TEXT = "^[^\\u0000]*$"


@dataclass
class Assemble(assemble.Recipe):
    """What a dataset is to be made of. The same files, by content, and the same wishes give the same dataset."""

    files: list[str] = option([], "ids of uploaded files; of equal documents the first is kept, in this order")
    encoder: str | None = option(
        None, "what encodes it: the id of a dataset or the name of a model, whose encoder it is; tiktoken:<name>; or "
        "chars, a token for each character; null: trained on the text"
    )
    name: str = option("", "what people call it")
    required: ClassVar = ("files",)
    schemas: ClassVar = {
        "files": {"type": "array", "items": {"type": "string", "pattern": "^file-[0-9a-f]{24}$"}, "minItems": 1,
                  "maxItems": MOST_FILES},
        "encoder": {"type": ["string", "null"], "pattern": TEXT, "minLength": 1},
        "name": {"type": "string", "pattern": TEXT, "maxLength": 255},
    }  # fmt: skip

    def problems(self) -> Iterator[tuple[str, str]]:
        """The rules between keys are judged once it is known that the files are there."""
        if not 1 <= len(self.files) <= MOST_FILES:
            yield "files", f"must be 1 to {MOST_FILES:,}"
        if len(self.name) > 255:
            yield "name", "must have at most 255 characters"


@dataclass
class JobError:
    code: str
    message: str
    param: str | None = None


@dataclass
class Phase:
    """How far the assembly is: `done` is the share of the phase."""

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


def dataset_answer(job: jobs.Job) -> dict:
    phase, result = {"phase": job.status, "done": 0.0}, None
    with suppress(OSError, ValueError):
        if job.status == "running":
            phase = json.loads((job.folder / assemble.PROGRESS).read_bytes())
        elif job.status == "succeeded":
            phase, result = {"phase": "ready", "done": 1.0}, json.loads((job.folder / assemble.RESULT).read_bytes())
    return {"id": job.id, "object": "dataset", "created_at": int(job.about["created"]), "name": job.request["name"],
            "status": job.status, "recipe": job.request["recipe"], "progress": phase, "result": result,
            "error": job.about["error"], "bytes": jobs.disk_use(job.folder)}  # fmt: skip


async def create_dataset(body: Assemble, service: TheService) -> DatasetAnswer:
    """Assemble a dataset from uploaded files. It is a job: retrieve it until its status is succeeded or failed."""
    recipe = assemble.Recipe(**{name: getattr(body, name) for name in declared(assemble.Recipe)})
    return dataset_answer(await run_in_threadpool(service.factory.jobs.assemble, recipe, body.name))


async def list_datasets(service: TheService, after: After = None, limit: Limit = 20) -> DatasetList:
    """The datasets, the newest first."""
    return await listed(service.factory.jobs.all("ds"), dataset_answer, after, limit)


async def listed(found: list[jobs.Job], answer: Callable[[jobs.Job], dict], after: str | None, limit: int) -> dict:
    """A page of jobs; only of those on it is looked at what is on disk."""
    chosen = jobs.page([{"id": job.id, "job": job} for job in found], after, limit)
    return chosen | {"data": await run_in_threadpool(lambda: [answer(item["job"]) for item in chosen["data"]])}


def dataset_job(service: Service, name: str) -> jobs.Job:
    return service.factory.jobs.get("ds", name, "dataset_id")


async def retrieve_dataset(dataset_id: str, service: TheService) -> DatasetAnswer:
    """A dataset: how far it is, or what came of it."""
    return dataset_answer(dataset_job(service, dataset_id))


async def delete_dataset(dataset_id: str, service: TheService) -> Deleted:
    """Delete a dataset. Runs that were trained on it stay, but none can be resumed without it; files stay."""
    await run_in_threadpool(service.factory.jobs.remove, dataset_job(service, dataset_id))
    return Deleted(dataset_id, "dataset")


async def cancel_dataset(dataset_id: str, service: TheService) -> DatasetAnswer:
    """Stop assembling a dataset."""
    return dataset_answer(await stopped(service, dataset_job(service, dataset_id), "cancelled"))


# -- runs


@dataclass
class Train:
    """A training run. Anything that is left out is as the preset, or the run of the model, says."""

    model: str = option("tiny", "a preset of config/, such as tiny, or a model, which is trained further")
    training_file: str = option("none", "id of a file or of a dataset")
    hyperparameters: Any = option(None, "any key of the JSON that train.py takes, nested or dotted, but for paths")
    suffix: str | None = option("", "part of the name of the model that is made: letters, digits, - and _")
    seed: int | None = option(None, "of weights, batches and dropout; null: drawn", low=0, high=2**31 - 1)
    metadata: Any = option(None, "up to 16 texts, kept with the run")
    method: Any = option(None, 'OpenAI\'s other place for hyperparameters: {"type": "supervised", "supervised": …}')
    validation_file: str | None = option(None, "none: a dataset's validation_share says what validates")
    integrations: Any = option(None, "none are known here")
    required: ClassVar = ("model", "training_file")
    schemas: ClassVar = {
        "training_file": {"type": "string", "pattern": "^(file|ds)-[0-9a-f]{24}$"},
        "hyperparameters": {"type": ["object", "null"]},
        "metadata": {"type": ["object", "null"], "maxProperties": 16, "propertyNames": {"maxLength": 64},
                     "additionalProperties": {"type": "string", "maxLength": 512}},
        "method": {"type": ["object", "null"], "required": ["type"], "properties": {
            "type": {"enum": ["supervised"]}, "supervised": {"type": ["object", "null"], "properties": {
                "hyperparameters": {"type": ["object", "null"]}}}}},
        "validation_file": {"type": "null"},
        "integrations": {"type": ["array", "null"], "maxItems": 0},
        "suffix": {"type": ["string", "null"], "pattern": "^[A-Za-z0-9_-]{0,64}$"},
    }  # fmt: skip

    def __post_init__(self) -> None:
        self.suffix = self.suffix or None

    def problems(self) -> Iterator[tuple[str, str]]:
        for name in ("hyperparameters", "method", "integrations", "metadata"):
            if is_deep(getattr(self, name)):
                yield name, "is nested too deeply"
                return
        if self.hyperparameters is not None and not isinstance(self.hyperparameters, dict):
            yield "hyperparameters", "must be an object, { … }"
        if self.suffix is not None and not re.fullmatch(r"[A-Za-z0-9_-]{0,64}", self.suffix, re.ASCII):
            yield "suffix", "must be at most 64 letters, digits, - and _"
        if not is_metadata(self.metadata):
            yield "metadata", "must be an object of at most 16 texts of up to 512 characters"
        if self.method is not None and not isinstance(self.supervised, dict):
            yield "method", 'must be {"type": "supervised", "supervised": {"hyperparameters": { … }}}'
        if self.validation_file is not None:
            yield "validation_file", "is not taken: a dataset's validation_share says what validates; leave it out"
        if self.integrations:
            yield "integrations", "none are known here; leave it out"

    @property
    def supervised(self) -> Any:
        """The hyperparameters in `method`."""
        method = self.method if isinstance(self.method, dict) else {}
        inner = method.get("supervised") or {}
        good = method.get("type") == "supervised" and isinstance(inner, dict)
        return (inner.get("hyperparameters") or {}) if good else None


def is_deep(value: Any, most: int = 16) -> bool:
    """Whether plain data is nested beyond `most` levels; looks at one level after the other."""
    level = [value]
    for _ in range(most):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else
                                                        outer if isinstance(outer, list) else ())]
    return bool(level)


def create_run_here(service: Service, properties: dict) -> None:
    names = [*jobs.presets(), *(service.factory.jobs.model_names() if service.factory.jobs else ())]
    properties["model"] = {"enum": names, "description": declared(Train)["model"].doc}


def is_metadata(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and len(value) <= 16 and all(
        isinstance(text, str) and len(text) <= 512 and len(name) <= 64 for name, text in value.items())


@dataclass
class RunProgress:
    """The last that the run has told; null where it has not."""

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


def run_answer(job: jobs.Job) -> dict:
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
        "progress": progress, "bytes": jobs.disk_use(job.folder), "result_files": [], "integrations": [],
        "organization_id": "local",
    }  # fmt: skip


async def create_run(body: Train, request: Request, service: TheService) -> RunAnswer:
    """Train a model. With an Idempotency-Key the same request, however often it comes, is one run."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= 255:
        raise ApiError(400, "Idempotency-Key must have 1 to 255 characters", "Idempotency-Key")
    asked = jobs.Training(
        body.model, body.training_file, {**(body.supervised or {}), **(body.hyperparameters or {})}, body.suffix,
        body.seed, body.metadata, hashed(key) if key else None, hashed(json.dumps(to_dict(body), sort_keys=True)),
    )  # fmt: skip
    return run_answer(await run_in_threadpool(service.factory.jobs.train, asked))


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


async def list_runs(service: TheService, after: After = None, limit: Limit = 20) -> RunList:
    """The runs, the newest first."""
    return await listed(service.factory.jobs.all("ftjob"), run_answer, after, limit)


def run_job(service: Service, name: str) -> jobs.Job:
    return service.factory.jobs.get("ftjob", name, "job_id")


async def retrieve_run(job_id: str, service: TheService) -> RunAnswer:
    """A run: its status, how far it is, and once it has succeeded the name of its model."""
    return run_answer(run_job(service, job_id))


async def delete_run(job_id: str, service: TheService) -> Deleted:
    """Delete a run that does not run: its checkpoints, events and curves. Its model and its dataset stay."""
    await run_in_threadpool(service.factory.jobs.remove, run_job(service, job_id))
    return Deleted(job_id, "fine_tuning.job")


async def cancel_run(job_id: str, service: TheService) -> RunAnswer:
    """End a run. It finishes its step and saves it, so that it can be resumed all the same. Where it could not save,
    the answer has an `error` of the code not_saved, which says what is lost."""
    return run_answer(await stopped(service, run_job(service, job_id), "cancelled"))


async def pause_run(job_id: str, service: TheService) -> RunAnswer:
    """Let a run save where it is and wait until it is resumed. Where it could not save, the answer has an `error` of
    the code not_saved, which says what is lost."""
    return run_answer(await stopped(service, run_job(service, job_id), "paused"))


async def stopped(service: Service, job: jobs.Job, wanted: str) -> jobs.Job:
    """The job once its process is gone, or after WAIT_SECONDS as it is then."""
    await run_in_threadpool(service.factory.jobs.stop, job, wanted)
    until = time.monotonic() + WAIT_SECONDS
    while job.status == "running" and time.monotonic() < until and not service.closing.is_set():
        await asyncio.sleep(0.05)
    return job


async def resume_run(job_id: str, service: TheService) -> RunAnswer:
    """Let a run that is paused, was cancelled or has failed go on from its last checkpoint."""
    job = run_job(service, job_id)
    await run_in_threadpool(service.factory.jobs.resume, job)
    return run_answer(job)


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
    """What happened to a run, the newest first; its losses are of type metrics, and what it could not save or warns of
    is of level warn."""
    return jobs.page(await run_in_threadpool(run_job(service, job_id).events), after, limit)


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
    """The checkpoints of a run, the newest first: the newest few, and the best."""
    job = run_job(service, job_id)
    return jobs.page(await run_in_threadpool(job.checkpoints), after, limit)


@dataclass
class MetricList:
    data: list[dict[str, Any]]
    object: str = "list"


async def list_run_metrics(job_id: str, service: TheService,
                           after: Annotated[int, Query(description="only of steps after this one")] = -1) -> MetricList:
    """The lines of the run's metrics.jsonl: all evaluations, and of the logged steps 2,000 at most, evenly spread."""
    path = run_job(service, job_id).metrics.path
    lines = await run_in_threadpool(plot.read_points, path) if path.exists() else []
    return MetricList([line for line in lines if line["step"] > after])


async def draw_run_curves(job_id: str, service: TheService,
                          sheet: Literal["loss", "learning_rate", "throughput"] = "loss",
                          x: Literal["step", "tokens", "seconds"] = "step") -> Response:  # fmt: skip
    """The run's curves as they are now, as PNG."""
    data = await run_in_threadpool(service.factory.picture, run_job(service, job_id), sheet, x)
    return Response(data, media_type="image/png", headers={"Cache-Control": "no-cache"})


IDEMPOTENCY = {"parameters": [{"name": "Idempotency-Key", "in": "header", "required": False, "description":
               "with the same key, the same run", "schema": {"type": "string", "minLength": 1, "maxLength": 255}}]}
UPLOAD_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
    "type": "object", "required": ["file"], "properties": {
        "file": {"type": "string", "contentMediaType": "text/plain",
                 "description": f"its name ends in one of {', '.join(jobs.SUFFIXES)}, or in one of these and .gz"},
        "purpose": {"enum": list(jobs.PURPOSES), "default": "fine-tune"},
    }}}}}}  # fmt: skip


# ---- the page ------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).with_name("page.html")


async def page() -> Response:
    """What this server offers, for people: a page to write with the models, to bring data, and to train."""
    data = await run_in_threadpool(PAGE.read_bytes)
    return Response(data, media_type="text/html", headers={"Cache-Control": "no-cache"})


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
    here: Callable | None = None  # here(service, properties) makes the body's schema say what there is now
    open: bool = False  # whether it takes no key
    responses: dict = dataclasses.field(default_factory=dict)  # FastAPI's, for other answers than JSON
    extra: dict = dataclasses.field(default_factory=dict)  # OpenAPI's, of the operation


ROUTES = [
    Route("GET", "/", page, None, "server", responses={200: {"content": {"text/html": {}}}}),
    Route("GET", "/health", health, Health, "server", open=True),
    Route("GET", "/metrics", metrics, None, "server", responses={200: {"content": {"text/plain": {}}}}),
    Route("POST", "/v1/completions", completions, Completion, here=completions_here,
          responses={200: {"content": {"text/event-stream": {}}}}),
    Route("POST", "/tokenize", tokenize, Tokens, here=tokenize_here),
    Route("POST", "/detokenize", detokenize, Detokenized, here=tokenize_here),
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
    Route("POST", "/v1/fine_tuning/jobs", create_run, RunAnswer, "training", here=create_run_here, extra=IDEMPOTENCY),
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
]  # fmt: skip

# name → class: made with the Service; has `async start()` and `async stop()`
PARTS: dict[str, Callable] = {"models": Models, "factory": Factory}


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

    app = FastAPIOffline(title="Strawberry", version="1", lifespan=lifespan, redoc_url=None)
    app.state.service = service
    app.add_middleware(Gate, service=service)
    for kind in (ApiError, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    for route in ROUTES:
        add_route(app, route)
    plain = app.openapi
    app.openapi = lambda: schema_here(plain(), service)
    return app


def schema_here(plain: dict, service: Service) -> dict:
    """The schema of all routes, with what there is now."""
    found = copy.deepcopy(plain)
    if service.settings.api_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for route in ROUTES:
            found["paths"][route.path][route.method.lower()]["security"] = [] if route.open else [{"key": []}]
    for route in ROUTES:
        if route.here is not None:
            body = found["paths"][route.path][route.method.lower()]["requestBody"]
            route.here(service, body["content"]["application/json"]["schema"]["properties"])
    return found


def add_route(app: FastAPI, route: Route) -> None:
    extra, handler = dict(route.extra), route.handler
    if (body := signature(handler).parameters.get("body")) is not None:
        content = {"application/json": {"schema": body_schema(body.annotation)}}
        extra["requestBody"] = {"required": True, "content": content}
        handler = with_body(handler, body.annotation)
    responses = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}} | route.responses
    app.add_api_route(route.path, handler, methods=[route.method], response_model=route.answer, tags=[route.tag],
                      responses=responses, openapi_extra=extra, operation_id=handler.__name__)  # fmt: skip


def with_body(handler: Callable, cls: type) -> Callable:
    """The handler with a signature in which FastAPI finds how its body is read."""

    async def read(request: Request):
        return await read_body(request, cls)

    async def endpoint(**values: Any) -> Any:
        return await handler(**values)

    own = signature(handler)
    parameters = own.parameters | {"body": own.parameters["body"].replace(annotation=Annotated[cls, Depends(read)])}
    endpoint.__signature__ = own.replace(parameters=list(parameters.values()))
    endpoint.__name__, endpoint.__doc__ = handler.__name__, handler.__doc__
    return endpoint


def body_schema(cls: type) -> dict:
    schema, required = object_schema(cls), list(getattr(cls, "required", ()))
    for name in required:
        schema["properties"][name].pop("default", None)
    for name, own in getattr(cls, "schemas", {}).items():
        schema["properties"][name] = (own() if callable(own) else own) | {"description": declared(cls)[name].doc}
    for name, values in getattr(cls, "neutral", {}).items():
        schema["properties"][name] = {"enum": [None, *values], "description": "is not supported; this changes nothing"}
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


POLLED = re.compile(r"/health|/metrics|/v1/models|/v1/files|/v1/(datasets|fine_tuning/jobs)(/.*)?")


def is_worth_logging(record: logging.LogRecord) -> bool:
    """Whether a line of the access log is written: not for what pages, clients and monitors ask again and again, as
    long as it succeeds. uvicorn's arguments: address, method, path and query, HTTP version, status."""
    _, method, path, _, status = record.args
    return method != "GET" or status >= 400 or not POLLED.fullmatch(path.partition("?")[0])


def log_config() -> dict:
    """uvicorn's, with the access log filtered."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["filters"] = {"worth logging": {"()": lambda: is_worth_logging}}
    config["handlers"]["access"]["filters"] = ["worth logging"]
    return config


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(app, settings.host, settings.port, http=Protocol, ws="none", log_level="info",
                          log_config=log_config(), server_header=False,
                          timeout_graceful_shutdown=math.ceil(settings.grace))  # fmt: skip


def check_free(host: str, port: int) -> None:
    """Raises UserError where the address cannot be listened at."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            if os.name != "nt":  # as the server does; there it would share the address with whoever has it
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); name another "
                        "port, or 0 for a free one") from error


def main(argv: list[str]) -> None:
    if asks_for_help(argv, declared(Settings)):
        print(format_help("serve.py", Settings, f"{KEY_VARIABLE} in the environment holds keys too."))
        return
    settings = read_command(argv)
    check_free(settings.host, settings.port)
    app = make_app(settings)
    server = Server(server_config(app, settings), app.state.service)
    app.state.service.factory.claim()
    server.run()
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    import serve  # this file under the name that others know

    run_cli(serve.main)
