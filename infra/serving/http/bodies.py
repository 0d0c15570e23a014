"""Reading the body of POST /v1/videos: multipart or JSON, never more than the limit held in memory or on disk.

It owns body formats and their refusals; it knows nothing of what the fields mean (`schema`) or of routes.
"""

import json
from dataclasses import dataclass
from typing import cast

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from infra.serving.http.schema import FILE_FIELD, ApiError
from infra.serving.limits import MEBIBYTE

DRAINED_BYTES = 64 * MEBIBYTE
"""Read and dropped beyond the limit, so that a client still sending sees the 413 and not a broken connection."""


@dataclass(frozen=True, slots=True)
class CreateBody:
    fields: dict[str, object]
    image: bytes | None


async def read_create_body(request: Request, *, max_bytes: int) -> CreateBody:
    limited = Request(request.scope, _Limited(request, max_bytes).receive)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_multipart(limited, max_bytes)
    if kind == "application/json":
        return CreateBody(_json_object(await limited.body()), None)
    raise ApiError(
        415,
        f"content type '{kind or 'none'}' is not read here; send multipart/form-data or application/json",
        code="unsupported_content_type",
    )


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
                f"the request body is larger than {self._max_bytes} bytes; upload a smaller image",
                code="request_too_large",
                headers={"connection": "close"},
            )
        return message

    async def _drain(self, message: Message) -> None:
        while message.get("more_body", False) and self._seen <= self._max_bytes + DRAINED_BYTES:
            message = await self._request.receive()
            self._seen += len(message.get("body", b""))


async def _read_multipart(request: Request, max_bytes: int) -> CreateBody:
    fields: dict[str, object] = {}
    image: bytes | None = None
    try:
        async with request.form(max_files=1, max_fields=50, max_part_size=max_bytes) as form:
            for name, value in form.multi_items():
                if name in fields or (name == FILE_FIELD and image is not None):
                    raise ApiError(400, f"field '{name}' was sent twice; send it once", param=name)
                if not isinstance(value, UploadFile):
                    fields[name] = value
                elif name == FILE_FIELD:
                    image = await value.read()
                else:
                    raise ApiError(
                        400, f"file field '{name}' is not read; upload the image as {FILE_FIELD}", param=name
                    )
    except HTTPException as error:
        raise ApiError(400, f"the multipart body cannot be read: {error.detail}", code="invalid_body") from None
    return CreateBody(fields, image)


def _json_object(data: bytes) -> dict[str, object]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON", code="invalid_body") from None
    if not isinstance(value, dict):
        raise ApiError(400, 'the body must be a JSON object, like {"prompt": ...}', code="invalid_body")
    return cast("dict[str, object]", value)
