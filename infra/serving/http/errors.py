"""Every answer other than 2xx: OpenAI's error envelope, whatever went wrong and wherever.

It owns the envelope and how exceptions become one; it knows nothing of routes.
"""

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from monitoring import metrics

SHOWN_CHARACTERS = 60
REASONS = {404: "there is no such route", 405: "the route does not take this method"}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(BaseModel):
    error: ErrorBody


class ApiError(Exception):
    """An answer other than 2xx: raised anywhere under a route, written as OpenAI's error envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.envelope = ErrorEnvelope(error=ErrorBody(message=message, type=error_type(status), param=param, code=code))

    def response(self) -> JSONResponse:
        return JSONResponse(self.envelope.model_dump(), self.status, headers=self.headers)


def error_type(status: int) -> str:
    return TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def envelope_bytes(status: int, message: str, *, code: str) -> bytes:
    """For answers below the app, where no request could be made out."""
    return json.dumps(ApiError(status, message, code=code).envelope.model_dump()).encode()


def shown(value: object) -> str:
    """A client's text as an answer may carry it: not long, and no half of a surrogate pair."""
    text = str(value).encode(errors="backslashreplace").decode()
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def invalid(param: str, message: str) -> ApiError:
    """400 about one field of a request; `message` names it."""
    return ApiError(400, message, param=param, code=f"invalid_{param}")


def answer_in_envelopes(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(Exception, _answer_bug)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route may answer beside 2xx, for the OpenAPI document."""
    described: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorEnvelope, "description": DESCRIPTIONS[status]} for status in statuses
    }
    return described | {"default": {"model": ErrorEnvelope, "description": "Any other error, in the same envelope"}}


DESCRIPTIONS = {
    400: "Something in the request is wrong; `param` names it",
    401: "No API key, or one that is not known",
    403: "The key, or the page that asks, may not do this",
    404: "There is no such thing",
    408: "The request did not arrive in time",
    409: "The idempotency key was used for another request",
    413: "The body is larger than the limit",
    415: "The body's content type is not read here",
    416: "The range lies outside the file",
    422: "What was uploaded cannot be used",
    429: "Too much at once; `Retry-After` says when to come again",
    503: "Not now: a part of the server does not answer",
}


def _answer_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    if request.method == "POST":
        metrics.REQUEST_REJECTED_TOTAL.labels(error.envelope.error.code or "other").inc()
    return error.response()


def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own 404 and 405."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    message = f"{request.method} {shown(request.url.path)}: {REASONS.get(status, error.detail)}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(status)
    return ApiError(status, message, code=code, headers=dict(error.headers or {})).response()


def _answer_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return _answer_api_error(request, invalid(param, f"{param}: {first['msg']} (got '{shown(first.get('input'))}')"))


def _answer_bug(_request: Request, _error: Exception) -> JSONResponse:
    """Starlette raises the error again after this answer, so the server logs it."""
    return ApiError(500, "the server failed to answer; its log has the cause", code="internal_error").response()
