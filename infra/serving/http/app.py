"""The videos API as OpenAI's SDK speaks it, over HTTP.

It owns routes, authentication and status codes; it knows nothing of networks or of how a worker makes a video: a
job row is all that the two share, so any replica answers for any job.
"""

import secrets
import time
from collections.abc import Callable, Generator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.serving import media
from infra.serving.http.bodies import CreateBody, read_create_body
from infra.serving.http.resolve import resolve
from infra.serving.http.schema import (
    FILE_FIELD,
    VARIANTS,
    ApiError,
    CreateVideo,
    Model,
    ModelList,
    Video,
    VideoDeleted,
    VideoError,
    VideoPage,
    parse_create,
)
from infra.serving.jobs.files import JobFiles
from infra.serving.jobs.store import JobNotFound, JobStore, QueueFull
from infra.serving.jobs.table import Job, NewJob, Order
from infra.serving.limits import ServedModel
from infra.serving.settings import ServerSettings
from monitoring import metrics

MEDIA_TYPES = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}
POLL_BOUNDS_MS = (200, 5000)
CHUNK_BYTES = 2**18

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes work with."""

    settings: ServerSettings
    model: ServedModel
    jobs: JobStore
    files: JobFiles
    worker_is_alive: Callable[[], bool]
    on_created: Callable[[], None]
    """Called after a job was committed, to wake the worker."""


def create_app(service: Service, *, lifespan: Lifespan | None = None) -> FastAPI:
    app = FastAPI(
        title="STIV videos",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(Exception, _answer_bug)
    app.add_middleware(_CountRequests)
    app.include_router(_video_routes(service))
    app.include_router(_operation_routes(service))
    return app


def to_video(job: Job) -> Video:
    request = job.request
    failed = job.state == "failed"
    return Video.model_validate(
        {
            "id": job.id,
            "model": job.model,
            "status": job.state,
            "progress": job.progress,
            "created_at": int(job.created_at),
            "completed_at": None if job.completed_at is None else int(job.completed_at),
            "expires_at": None if job.expires_at is None else int(job.expires_at),
            "seconds": request.seconds,
            "size": request.size,
            "prompt": request.prompt,
            "error": VideoError(code=job.error_code or "", message=job.error_message or "") if failed else None,
        }
    )


def poll_after_ms(job: Job, now: float) -> int:
    """When it is worth asking again: a quarter of the time left at the job's pace, or of what it has waited so far."""
    low, high = POLL_BOUNDS_MS
    if job.state == "in_progress" and job.started_at is not None and job.progress > 0:
        wait_s = (now - job.started_at) * (100 - job.progress) / job.progress
    else:
        wait_s = now - job.created_at
    return int(min(high, max(low, 250 * wait_s)))


def _video_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", dependencies=[Depends(_authenticator(service.settings))])
    jobs = service.jobs

    @router.post("/videos", openapi_extra=_CREATE_BODY)
    async def create_video(request: Request) -> Video:  # pyright: ignore[reportUnusedFunction]
        body = await read_create_body(request, max_bytes=service.model.limits.max_body_bytes)
        job = await run_in_threadpool(_create, service, body)
        service.on_created()
        return to_video(job)

    @router.get("/videos")
    def list_videos(  # pyright: ignore[reportUnusedFunction]
        after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20, order: Order = "desc"
    ) -> VideoPage:
        try:
            page = jobs.page(after=after, limit=limit, order=order)
        except JobNotFound:
            raise ApiError(400, f"after '{after}' is no video of this server", param="after") from None
        videos = [to_video(job) for job in page.jobs]
        first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
        return VideoPage(data=videos, first_id=first, last_id=last, has_more=page.has_more)

    @router.get("/videos/{video_id}")
    def retrieve_video(video_id: str, response: Response) -> Video:  # pyright: ignore[reportUnusedFunction]
        job = _find(jobs, video_id)
        response.headers["openai-poll-after-ms"] = str(poll_after_ms(job, time.time()))
        return to_video(job)

    @router.delete("/videos/{video_id}")
    def delete_video(video_id: str) -> VideoDeleted:  # pyright: ignore[reportUnusedFunction]
        job = _find(jobs, video_id)
        jobs.delete(video_id)
        if job.state in ("queued", "in_progress"):
            metrics.JOBS_TOTAL.labels("cancelled").inc()
        return VideoDeleted(id=video_id)

    @router.get("/videos/{video_id}/content")
    def download_content(video_id: str, variant: str = "video") -> Response:  # pyright: ignore[reportUnusedFunction]
        job = _find(jobs, video_id)
        return _download(service.files, job, variant)

    @router.get("/models")
    def list_models() -> ModelList:  # pyright: ignore[reportUnusedFunction]
        return ModelList(data=[Model(id=service.model.name, created=_STARTED_AT)])

    return router


def _operation_routes(service: Service) -> APIRouter:
    """For probes and scrapes: no key, nothing about any video."""
    router = APIRouter()

    @router.get("/health")
    def health() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        return {"status": "ok"}

    @router.get("/ready")
    def ready() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        if not service.worker_is_alive():
            raise ApiError(503, "the worker is not running", code="worker_stopped")
        if not service.jobs.is_reachable():
            raise ApiError(503, "the job database does not answer", code="database_unreachable")
        return {"status": "ready"}

    @router.get("/metrics")
    def scrape() -> Response:  # pyright: ignore[reportUnusedFunction]
        metrics.QUEUE_DEPTH.set(service.jobs.count("queued"))
        page, content_type = metrics.render()
        return Response(page, headers={"content-type": content_type})

    return router


def _authenticator(settings: ServerSettings) -> Callable[..., None]:
    keys = [key.get_secret_value().encode() for key in settings.api_keys]
    bearer = HTTPBearer(auto_error=False)

    def authenticate(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if not keys:
            return
        given = b"" if credentials is None else credentials.credentials.encode()
        known = [secrets.compare_digest(given, key) for key in keys]  # all of them, so that time tells nothing
        if not any(known):
            message = "no API key was given" if credentials is None else "the API key is not known"
            raise ApiError(
                401,
                f"{message}; send 'Authorization: Bearer KEY' with a key of this server",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    return authenticate


def _create(service: Service, body: CreateBody) -> Job:
    create = parse_create(body.fields)
    if create.model not in (None, service.model.name):
        raise ApiError(
            404,
            f"the model '{create.model}' does not exist; this server serves '{service.model.name}'",
            param="model",
            code="model_not_found",
        )
    request = resolve(create, service.model)
    if service.jobs.count("queued") >= service.settings.max_queued:  # before anything is stored for it
        raise _queue_is_full(service.settings)
    frame = None if body.image is None else _conditioning_frame(service, body.image, request.width, request.height)
    try:
        return service.jobs.create(
            NewJob(
                request,
                model=service.model.name,
                inputs={} if frame is None else {"image": service.files.keep_bytes(frame)},
            ),
            max_queued=service.settings.max_queued,
        )
    except QueueFull:
        raise _queue_is_full(service.settings) from None


def _queue_is_full(settings: ServerSettings) -> ApiError:
    return ApiError(
        429,
        f"{settings.max_queued} videos are waiting already; try again in {settings.retry_after_s} s",
        code="queue_full",
        headers={"retry-after": str(settings.retry_after_s)},
    )


def _conditioning_frame(service: Service, image: bytes, width: int, height: int) -> bytes:
    if not service.model.takes_image:
        raise ApiError(
            400,
            f"{FILE_FIELD}: model '{service.model.name}' was trained on text alone; leave the image out",
            param=FILE_FIELD,
            code="image_not_supported",
        )
    try:
        return media.conditioning_image(
            image, width=width, height=height, max_pixels=service.model.limits.max_image_pixels
        )
    except media.BadImage as error:
        raise ApiError(400, f"{FILE_FIELD}: {error}", param=FILE_FIELD, code="invalid_image") from None


def _find(jobs: JobStore, video_id: str) -> Job:
    try:
        return jobs.get(video_id)
    except JobNotFound:
        raise ApiError(404, f"no video '{video_id}'", param="video_id", code="video_not_found") from None


def _download(files: JobFiles, job: Job, variant: str) -> Response:
    if variant not in VARIANTS:
        raise ApiError(400, f"variant '{variant}' is unknown; choose one of {', '.join(VARIANTS)}", param="variant")
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
    file.seek(0)
    return StreamingResponse(_chunks(file), media_type=MEDIA_TYPES[variant], headers={"content-length": str(size)})


def _chunks(file: BinaryIO) -> Generator[bytes, None, None]:
    with file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _answer_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    if request.method == "POST":
        metrics.REQUEST_REJECTED_TOTAL.labels(error.envelope.error.code or "other").inc()
    return JSONResponse(error.envelope.model_dump(), error.status, headers=error.headers)


def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own 404 and 405."""
    assert isinstance(error, HTTPException)
    reason = {404: "there is no such route", 405: "the route does not take this method"}.get(error.status_code)
    message = f"{request.method} {request.url.path}: {reason or error.detail}"
    answer = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return JSONResponse(answer.envelope.model_dump(), error.status_code, headers=answer.headers)


def _answer_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][-1])
    message = f"{param}: {first['msg']} (got '{first.get('input')}')"
    return _answer_api_error(request, ApiError(400, message, param=param, code=f"invalid_{param}"))


def _answer_bug(_request: Request, _error: Exception) -> JSONResponse:
    """Starlette raises the error again after this answer, so the server logs it."""
    answer = ApiError(500, "the server failed to answer; its log has the cause", code="internal_error")
    return JSONResponse(answer.envelope.model_dump(), 500)


class _CountRequests:
    """Counts answers by route template, so that no id becomes a label."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                metrics.HTTP_REQUESTS_TOTAL.labels(route, scope["method"], str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted)


_STARTED_AT = int(time.time())

_CREATE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": CreateVideo.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    **CreateVideo.model_json_schema(),
                    "properties": {
                        **CreateVideo.model_json_schema()["properties"],
                        FILE_FIELD: {"type": "string", "format": "binary"},
                    },
                }
            },
        },
    }
}
