"""Errors as clients receive them: OpenAI's error object, with an HTTP status."""

import re
from dataclasses import dataclass

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from strawberry.common import UserError, show

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response in the format of OpenAI's error object. `param` is the field that caused it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict:
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message, param = replace_surrogates(self.message)[:2000], replace_surrogates(self.param or "")[:200]
        return {"error": {"message": message, "type": kind, "param": param or None, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def replace_surrogates(text: str) -> str:
    """Make a text valid UTF-8: unpaired surrogates, which JSON and models may produce, become U+FFFD."""
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


def to_api_error(error: Exception) -> ApiError:
    """Convert any exception to an ApiError."""
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
