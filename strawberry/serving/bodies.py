"""JSON bodies: read within bounds, checked, and described as a schema.

A body is a dataclass of options, as configs are: its fields are declared once, with bounds and meaning; from them come
the messages of what is wrong and the schema. A class may have `required` fields, `neutral` values of fields that are
not supported, and `schemas`, which replace fields' own where these say less than is known elsewhere.
"""

import asyncio
import json
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from strawberry.common import show
from strawberry.config import check, declared, object_schema
from strawberry.serving.errors import ApiError
from strawberry.serving.settings import MIB

BODY_SECONDS = 60  # that a client may take to send its JSON


async def read_body(request: Request, cls: type) -> Any:
    """The JSON body of a request as an instance of `cls`. A null stands for what the field is without it."""
    data = await read_bytes(request, int(request.app.state.service.settings.max_body * MIB))
    if len(data) < 10_000:
        return validate_body(data, cls)
    async with request.app.state.service.large_bodies:  # it takes a while, for which nobody else is to wait
        return await asyncio.to_thread(validate_body, data, cls)


def validate_body(data: bytes, cls: type) -> Any:
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
    problems += [f"{name} = {show(raw[name])}: is not supported; {describe_neutral_values(neutral[name])}"
                 for name in unsupported]  # fmt: skip
    if problems:
        raise ApiError(400, "; ".join(problems[:20]), problems[0].partition(" = ")[0])
    return body


def is_neutral(value: Any, allowed: tuple) -> bool:
    """Whether a field's value is null or one of `allowed`. JSON's true is not 1, though Python's is."""
    return value is None or any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed)


def describe_neutral_values(allowed: tuple) -> str:
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


MAX_FIELDS = 4096  # of a body, in all its objects together


def parse_json(data: bytes) -> Any:
    fields = 0

    def as_dict(pairs: list[tuple[str, Any]]) -> dict:
        nonlocal fields
        fields += len(pairs)
        if fields > MAX_FIELDS:
            raise ApiError(400, f"the body has more than {MAX_FIELDS} fields")
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


def build_body_schema(cls: type) -> dict:
    schema, required = object_schema(cls), list(getattr(cls, "required", ()))
    for name in required:
        schema["properties"][name].pop("default", None)
    for name, own in getattr(cls, "schemas", {}).items():
        schema["properties"][name] = (own() if callable(own) else own) | {"description": declared(cls)[name].doc}
    for name, values in getattr(cls, "neutral", {}).items():
        schema["properties"][name] = {"enum": [None, *values], "description": "is not supported; this changes nothing"}
    return schema | {"required": required}
