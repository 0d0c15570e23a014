"""The bytes of a finished video, whole or in ranges, as a player seeks in it.

It owns media types, ranges and when content can be had; it knows nothing of where it is kept.
"""

import re
import time
from collections.abc import Generator
from typing import Any, BinaryIO

from fastapi.responses import Response, StreamingResponse

from infra.serving.http.errors import ApiError, responses
from infra.serving.http.schema import Variant
from infra.serving.jobs.files import JobFiles
from infra.serving.jobs.table import Job

MEDIA_TYPES: dict[Variant, str] = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}
SUFFIXES: dict[Variant, str] = {"video": "mp4", "thumbnail": "webp", "spritesheet": "jpg"}
CHUNK_BYTES = 2**18
ONE_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")

_BYTES = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()}
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The variant's bytes", "content": _BYTES},
    206: {"description": "The asked range of them", "content": _BYTES},
    **responses(400, 401, 404, 416, 429),
}


def download(files: JobFiles, job: Job, variant: Variant, range_header: str | None) -> Response:
    """ApiError where there is nothing to download (yet, or any more)."""
    if job.state != "completed":
        raise ApiError(
            400,
            f"video '{job.id}' has status '{job.state}'; its content can be downloaded once it is 'completed'",
            code="video_not_completed",
        )
    if job.expires_at is not None and time.time() > job.expires_at:
        raise ApiError(404, f"the content of video '{job.id}' has expired; create it again", code="video_expired")
    file = files.open(job.artifacts[variant])
    size = file.seek(0, 2)
    start, end = (0, size) if range_header is None else _asked_range(range_header, size, file)
    headers = {
        "accept-ranges": "bytes",
        "content-length": str(end - start),
        "content-disposition": f'inline; filename="{job.id}.{SUFFIXES[variant]}"',
        "etag": f'"{job.artifacts[variant]}"',
        "cache-control": "private, max-age=3600",
    }
    partial = (start, end) != (0, size)
    if partial:
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    file.seek(start)
    return StreamingResponse(
        _chunks(file, end - start), 206 if partial else 200, media_type=MEDIA_TYPES[variant], headers=headers
    )


def _asked_range(header: str, size: int, file: BinaryIO) -> tuple[int, int]:
    """Half open. A header that is no single range means the whole, as RFC 9110 allows."""
    asked = ONE_RANGE.fullmatch(header.strip())
    if asked is None or asked.groups() == ("", ""):
        return 0, size
    first, last = asked.groups()
    start = max(0, size - int(last)) if first == "" else int(first)
    end = size if first == "" or last == "" else min(size, int(last) + 1)
    if start >= end:
        file.close()
        raise ApiError(
            416,
            f"the range '{header.strip()}' lies outside the {size} bytes",
            param="range",
            code="range_not_satisfiable",
            headers={"content-range": f"bytes */{size}"},
        )
    return start, end


def _chunks(file: BinaryIO, count: int) -> Generator[bytes, None, None]:
    with file:
        while count > 0 and (chunk := file.read(min(count, CHUNK_BYTES))):
            count -= len(chunk)
            yield chunk
