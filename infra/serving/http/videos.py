"""The /v1 routes: each reads a request, lets another module act, and writes OpenAI's Video.

It owns paths, parameters and answers; it knows nothing of networks or of how a worker makes a video: a job row is all
that the two share, so any replica answers for any job.
"""

import time
from collections.abc import Callable
from typing import Annotated, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Query, Request, Response

from infra.serving.http.bodies import Body, described, read_body
from infra.serving.http.content import CONTENT, download
from infra.serving.http.creation import Creation
from infra.serving.http.errors import ApiError, responses, shown
from infra.serving.http.events import EVENTS, follow
from infra.serving.http.schema import (
    CreateCharacter,
    CreateVideo,
    EditVideo,
    ExtendVideo,
    Model,
    ModelList,
    RemixVideo,
    Variant,
    Video,
    VideoDeleted,
    VideoError,
    VideoPage,
    parse,
)
from infra.serving.http.service import Asked, Caller, Service, Serving, authenticate
from infra.serving.jobs.store import JobNotFound
from infra.serving.jobs.table import Job
from monitoring import metrics

POLL_BOUNDS_MS = (200, 5000)

_MAKING = responses(400, 401, 403, 404, 408, 409, 413, 415, 429, 503)
_READING = responses(400, 401, 403, 404, 429)

router = APIRouter(prefix="/v1", dependencies=[Depends(authenticate)])


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
            "remixed_from_video_id": job.remixed_from,
            "error": VideoError(code=job.error_code or "", message=job.error_message or "") if failed else None,
        }
    )


def poll_after_ms(job: Job, now: float) -> int:
    """When it is worth asking again: when the scheduler expects the video, or a quarter of the wait so far."""
    low, high = POLL_BOUNDS_MS
    left_s = 0.25 * (now - job.created_at) if job.estimated_done_at is None else job.estimated_done_at - now
    return int(min(high, max(low, 1000 * left_s)))


async def _make(
    request: Request, service: Service, act: Callable[[Creation, Body], Job], *, file_field: str | None = None
) -> Video:
    body = await read_body(
        request, service.model.limits.max_body_bytes, service.settings.body_timeout_s, file_field=file_field
    )
    job = await to_thread.run_sync(act, Creation(service), body, limiter=service.makers)
    service.on_created()
    return to_video(job)


@router.post("/videos", responses=_MAKING, openapi_extra=described(CreateVideo, file_field="input_reference"))
async def create_video(request: Request, service: Serving, terms: Asked) -> Video:
    """From a prompt and, if the model takes one, a first frame."""
    return await _make(request, service, lambda it, body: it.create(body, terms), file_field="input_reference")


@router.post("/videos/edits", responses=_MAKING, openapi_extra=described(EditVideo, file_field="video"))
async def edit_video(request: Request, service: Serving, terms: Asked) -> Video:
    """The video's first frame stays; what follows is drawn anew to the prompt."""
    return await _make(request, service, lambda it, body: it.edit(body, terms), file_field="video")


@router.post("/videos/extensions", responses=_MAKING, openapi_extra=described(ExtendVideo, file_field="video"))
async def extend_video(request: Request, service: Serving, terms: Asked) -> Video:
    """The video with a continuation that is drawn from its last frames."""
    return await _make(request, service, lambda it, body: it.extend(body, terms), file_field="video")


@router.post("/videos/{video_id}/remix", responses=_MAKING, openapi_extra=described(RemixVideo))
async def remix_video(request: Request, video_id: str, service: Serving, terms: Asked) -> Video:
    """The same video to another prompt: seed, size, length and given frames stay."""
    return await _make(request, service, lambda it, body: it.remix(video_id, body, terms))


@router.post("/videos/characters", responses=_MAKING, openapi_extra=described(CreateCharacter, file_field="video"))
async def create_character(request: Request, service: Serving) -> Response:
    """Always refused: the models served here keep no characters."""
    body = await read_body(
        request, service.model.limits.max_body_bytes, service.settings.body_timeout_s, file_field="video"
    )
    parse(CreateCharacter, body.fields)
    raise ApiError(
        400,
        f"model '{service.model.name}' keeps no characters; describe the character in the prompt, or give a first"
        " frame as input_reference",
        code="characters_not_supported",
    )


@router.get("/videos/characters/{character_id}", responses=_READING)
def retrieve_character(character_id: str) -> Response:
    """Always 404: the models served here keep no characters."""
    raise ApiError(
        404,
        f"no character '{shown(character_id)}': the model served here keeps no characters",
        param="character_id",
        code="character_not_found",
    )


@router.get("/videos", responses=_READING)
def list_videos(
    client: Caller,
    service: Serving,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoPage:
    """The client's own; `after` is the last id of the page before."""
    try:
        page = service.jobs.page(after=after, limit=limit, order=order, client=client.name)
    except JobNotFound:
        message = f"after '{shown(after)}' is no video of yours on this server"
        raise ApiError(400, message, param="after", code="invalid_after") from None
    videos = [to_video(job) for job in page.jobs]
    first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
    return VideoPage(data=videos, first_id=first, last_id=last, has_more=page.has_more)


@router.get("/videos/{video_id}", responses=_READING)
def retrieve_video(client: Caller, service: Serving, video_id: str, response: Response) -> Video:
    """`openai-poll-after-ms` says when to ask again, `x-stiv-track` which release makes it."""
    job = Creation(service).find(video_id, client)
    response.headers["x-stiv-track"] = job.track
    if job.state in ("queued", "in_progress"):
        response.headers["openai-poll-after-ms"] = str(poll_after_ms(job, time.time()))
    return to_video(job)


@router.delete("/videos/{video_id}", responses=_READING)
def delete_video(client: Caller, service: Serving, video_id: str) -> VideoDeleted:
    """A running one is cancelled: it is gone at its next denoise step."""
    creation = Creation(service)
    job = creation.find(video_id, client)
    try:
        service.jobs.delete(video_id)
    except JobNotFound:  # somebody else was faster
        raise creation.not_found(video_id) from None
    service.on_deleted(video_id)
    if job.state in ("queued", "in_progress"):
        metrics.JOBS_TOTAL.labels("cancelled").inc()
    return VideoDeleted(id=video_id)


@router.get("/videos/{video_id}/content", response_class=Response, responses=CONTENT)
def download_content(
    client: Caller,
    service: Serving,
    video_id: str,
    variant: Variant = "video",
    range: Annotated[str | None, Header(max_length=200)] = None,
) -> Response:
    """The video, or a picture of it."""
    return download(service.files, Creation(service).find(video_id, client), variant, range)


@router.get("/videos/{video_id}/events", response_class=Response, responses=EVENTS)
async def follow_video(client: Caller, service: Serving, video_id: str, request: Request) -> Response:
    """Server-sent events until the video has ended."""
    await to_thread.run_sync(Creation(service).find, video_id, client)
    return follow(service, video_id, request, to_video)


@router.get("/models", responses=_READING)
def list_models(service: Serving) -> ModelList:
    """The one model this server serves."""
    return ModelList(data=[_served(service)])


@router.get("/models/{model}", responses=_READING)
def retrieve_model(service: Serving, model: str) -> Model:
    """The model, if it is the one this server serves."""
    if model != service.model.name:
        message = f"the model '{shown(model)}' does not exist; this server serves '{service.model.name}'"
        raise ApiError(404, message, param="model", code="model_not_found")
    return _served(service)


def _served(service: Service) -> Model:
    return Model(id=service.model.name, created=int(service.started_at))
