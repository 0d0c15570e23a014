"""Server-sent events of one video: what it is, how far it is, what it looks like so far, and how it ends.

It owns the stream's form; it knows nothing of where progress comes from. Each stream looks at the job row, so any
replica can serve it, and the first event is always the whole state: a client that comes again needs no memory.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from anyio import to_thread
from fastapi import Request
from fastapi.responses import StreamingResponse

from infra.serving.http.errors import ApiError, responses
from infra.serving.http.schema import Video
from infra.serving.http.service import Service
from infra.serving.jobs.store import JobNotFound
from infra.serving.jobs.table import Job

POLL_S = 0.25
ALIVE_EVERY_S = 15.0
"""A comment line, so that proxies keep a quiet stream open."""
MAX_STREAMS = 256
"""Of this process; each costs a look at the database four times a second."""
RETRY_MS = 2000
ENDED = ("completed", "failed")

_EVENT = {
    "type": "object",
    "description": "One event; its data is JSON",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}, "retry": {"type": "integer"}},
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "`video.progress` and, when it ends, `video.completed`, `video.failed` or `video.deleted`, each"
        " with the Video; between them `video.preview` with `image`, a data: URL of the latest estimate",
        "content": {"text/event-stream": {"schema": _EVENT}},
    },
    **responses(401, 404, 429, 503),
}

_open_streams = 0


def follow(service: Service, video_id: str, request: Request, to_video: Callable[[Job], Video]) -> StreamingResponse:
    if _open_streams >= MAX_STREAMS:
        message = f"{MAX_STREAMS} event streams are open already; poll the video instead"
        raise ApiError(503, message, code="too_many_streams", headers={"retry-after": "10"})
    return StreamingResponse(
        _events(service, video_id, request, to_video),
        media_type="text/event-stream",
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


async def _events(
    service: Service, video_id: str, request: Request, to_video: Callable[[Job], Video]
) -> AsyncGenerator[bytes, None]:
    global _open_streams
    _open_streams += 1
    try:
        yield f"retry: {RETRY_MS}\n\n".encode()
        told, shown, last = "", b"", time.monotonic()
        while not service.is_stopping() and not await request.is_disconnected():
            try:
                job, preview = await to_thread.run_sync(_look, service, video_id)
            except JobNotFound:
                yield _event("video.deleted", {"id": video_id, "object": "video.deleted", "deleted": True})
                return
            video = to_video(job).model_dump_json()
            if preview is not None and preview != shown:
                shown, last = preview, time.monotonic()
                picture = f"data:image/webp;base64,{base64.b64encode(preview).decode()}"
                yield _event("video.preview", {"id": video_id, "progress": job.progress, "image": picture})
            if video != told:
                told, last = video, time.monotonic()
                kind = job.state if job.state in ENDED else "progress"
                yield _event(f"video.{kind}", json.loads(video))
            if job.state in ENDED:
                return
            if time.monotonic() - last > ALIVE_EVERY_S:
                last = time.monotonic()
                yield b": alive\n\n"
            await asyncio.sleep(POLL_S)
    finally:
        _open_streams -= 1


def _look(service: Service, video_id: str) -> tuple[Job, bytes | None]:
    job = service.jobs.get(video_id)
    return job, service.jobs.preview(video_id) if job.state == "in_progress" else None


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
