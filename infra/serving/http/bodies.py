"""Reading a request's body: multipart or JSON, never more than the limit held in memory or on disk, never for ever.

It owns body formats and their refusals; it knows nothing of what the fields mean (`schema`) or of routes.
"""

import asyncio
import json
import re
from dataclasses import dataclass, field
from typing import Any, cast

from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from infra.serving.http.errors import ApiError, shown
from infra.serving.limits import MEBIBYTE

DRAINED_BYTES = 64 * MEBIBYTE
"""Read and dropped beyond the limit, so that a client still sending sees the 413 and not a broken connection."""
MAX_FIELDS = 50
BRACKETED = re.compile(r"(\w{1,40})\[(\w{1,40})\]")
"""How a form writes a field of an object: `video[id]`."""


@dataclass(frozen=True, slots=True)
class Body:
    fields: dict[str, object]
    file: bytes | None = field(default=None, repr=False)
    """The one upload, where the request carries it."""


async def read_body(request: Request, max_bytes: int, timeout_s: float, *, file_field: str | None = None) -> Body:
    """`timeout_s` is for the whole body; `file_field` is the form field that may carry a file."""
    limited = Request(request.scope, _Limited(request, max_bytes).receive)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(timeout_s):
            if kind == "multipart/form-data":
                return await _read_multipart(limited, max_bytes, file_field)
            if kind == "application/json":
                return Body(_json_object(await limited.body()))
    except TimeoutError:
        raise ApiError(
            408,
            f"the request body did not arrive in {timeout_s:g} s; send it again",
            code="request_timeout",
            headers={"connection": "close"},
        ) from None
    raise ApiError(
        415,
        f"content type '{shown(kind or 'none')}' is not read here; send multipart/form-data or application/json",
        code="unsupported_content_type",
    )


def described(kind: type[BaseModel], *, file_field: str | None = None) -> dict[str, Any]:
    """The body for the OpenAPI document, where the route reads it by itself."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    form = schema
    if file_field is not None:
        form = {**schema, "properties": {**schema["properties"], file_field: {"type": "string", "format": "binary"}}}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


class _Limited:
    """The request's body as it arrives, counted."""

    def __init__(self, request: Request, max_bytes: int) -> None:
        self._request = request
        self._max_bytes = max_bytes
        self._seen = 0

    async def receive(self) -> Message:
        message = await self._request.receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._max_bytes:
            await self._drain(message)
            raise ApiError(
                413,
                f"the request body is larger than {self._max_bytes} bytes; upload a smaller file",
                code="request_too_large",
                headers={"connection": "close"},
            )
        return message

    async def _drain(self, message: Message) -> None:
        while message.get("more_body", False) and self._seen <= self._max_bytes + DRAINED_BYTES:
            message = await self._request.receive()
            self._seen += len(message.get("body", b""))


async def _read_multipart(request: Request, max_bytes: int, file_field: str | None) -> Body:
    fields: dict[str, object] = {}
    file: bytes | None = None
    try:
        async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=max_bytes) as form:
            for name, value in form.multi_items():
                if not isinstance(value, UploadFile):
                    _add(fields, name, value)
                elif name == file_field and name not in fields:
                    file = await value.read()
                else:
                    known = f"; upload the file as {file_field}" if file_field else "; this route takes no file"
                    raise ApiError(
                        400, f"file field '{shown(name)}' is not read{known}", param=shown(name), code="unknown_file"
                    )
    except HTTPException as error:
        raise ApiError(400, f"the multipart body cannot be read: {error.detail}", code="invalid_body") from None
    if file is not None and file_field in fields:
        raise _sent_twice(file_field)
    return Body(fields, file)


def _add(fields: dict[str, object], name: str, value: str) -> None:
    target, key = fields, name
    if bracketed := BRACKETED.fullmatch(name):
        outer, key = bracketed.groups()
        inner = fields.setdefault(outer, {})
        if not isinstance(inner, dict):
            raise _sent_twice(outer)
        target = cast("dict[str, object]", inner)
    if key in target:
        raise _sent_twice(name)
    target[key] = value


def _sent_twice(name: str) -> ApiError:
    return ApiError(
        400, f"field '{shown(name)}' was sent twice; send it once", param=shown(name), code="repeated_field"
    )


def _json_object(data: bytes) -> dict[str, object]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON", code="invalid_body") from None
    if not isinstance(value, dict):
        raise ApiError(400, 'the body must be a JSON object, like {"prompt": ...}', code="invalid_body")
    return cast("dict[str, object]", value)
