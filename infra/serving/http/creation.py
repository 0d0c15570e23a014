"""From a request that was read to a durable job: what is asked for, what it may cost, what comes with it.

It owns the order of the checks, cheapest first, and what a client hears of a full server; it knows nothing of routes or
of how a video is made.
"""

import base64
import binascii
import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from infra.serving.clients.keys import Client
from infra.serving.http.bodies import Body
from infra.serving.http.errors import ApiError, invalid, shown
from infra.serving.http.resolve import continuation, redraw, resolve
from infra.serving.http.schema import (
    CreateVideo,
    EditVideo,
    ExtendVideo,
    ImageReference,
    RemixVideo,
    VideoReference,
    parse,
)
from infra.serving.http.service import Service, Terms
from infra.serving.jobs.store import IdempotencyConflict, JobNotFound, QueueFull, QuotaExceeded
from infra.serving.jobs.table import Job, NewJob
from infra.serving.limits import VideoRequest
from infra.serving.safety import fetching, uploads
from infra.serving.safety.decoding import BadUpload
from infra.serving.safety.moderation import ModerationUnavailable, Refused


@dataclass(frozen=True, slots=True)
class Wish:
    """A complete request and what it starts from."""

    request: VideoRequest
    inputs: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    """Role -> content, still to be kept."""
    kept: Mapping[str, str] = field(default_factory=dict[str, str])
    """Role -> digest of another job's input."""
    remixed_from: str | None = None


class Creation:
    """Makes the jobs of one service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def create(self, body: Body, terms: Terms) -> Job:
        asked = parse(CreateVideo, body.fields)
        self._check_model(asked.model)
        upload = self._image(asked.input_reference, body.file)
        request = resolve(asked, self.service.model, given=upload is not None)
        self._admit(request, terms)
        inputs = {} if upload is None else {"image": self._first_frame(upload, request)}
        return self._keep(Wish(request, inputs), terms, body, "create")

    def remix(self, video_id: str, body: Body, terms: Terms) -> Job:
        asked = parse(RemixVideo, body.fields)
        source = self._completed(video_id, terms.client, "video_id")
        request = redraw(asked, source.request, self.service.model, given=bool(source.inputs))
        self._admit(request, terms)
        return self._keep(Wish(request, kept=source.inputs, remixed_from=source.id), terms, body, f"remix {video_id}")

    def edit(self, body: Body, terms: Terms) -> Job:
        """The first frame stays, and what follows is drawn anew."""
        asked = parse(EditVideo, body.fields)
        self._check_model(asked.model)
        if not self.service.model.takes_image:
            raise self._not_served("an edit keeps the video's first frame", "edit_not_supported")
        source = self._source(asked.video, terms.client, body.file)
        if source is not None and asked.size is None and asked.width is None and asked.height is None:
            asked = asked.model_copy(update={"size": source.request.size})
        request = resolve(asked, self.service.model, given=True)
        self._admit(request, terms)
        video = self._video_bytes(source, body.file)
        try:
            frame = uploads.first_frame(video, request, self.service.model.limits, video=True)
        except BadUpload as error:
            raise ApiError(400, f"video: {error}", param="video", code="invalid_video") from None
        self._moderate("video", images=(frame,))
        wish = Wish(request, {"image": frame}, remixed_from=None if source is None else source.id)
        return self._keep(wish, terms, body, "edit")

    def extend(self, body: Body, terms: Terms) -> Job:
        """The video with its continuation, drawn from its last frames."""
        asked, model = parse(ExtendVideo, body.fields), self.service.model
        self._check_model(asked.model)
        if not model.continued_frames:
            raise self._not_served("a continuation is drawn from the video's last frames", "extend_not_supported")
        source = self._source(asked.video, terms.client, body.file)
        request = continuation(asked, model, None if source is None else source.request)
        self._admit(request, terms)
        try:
            frames = uploads.source_frames(self._video_bytes(source, body.file), request, model.limits)
        except BadUpload as error:
            raise ApiError(400, f"video: {error}", param="video", code="invalid_video") from None
        if frames.count < request.given_frames:
            raise invalid(
                "video",
                f"video has {frames.count} frames at {request.fps} a second, the model goes on from"
                f" {request.given_frames}; send a longer one",
            )
        request = request.model_copy(update={"source_frames": frames.count})
        wish = Wish(request, {"video": frames.data}, remixed_from=None if source is None else source.id)
        return self._keep(wish, terms, body, "extend")

    def find(self, video_id: str, client: Client, param: str = "video_id") -> Job:
        """A client's own job; another's is as unknown as one that never was."""
        try:
            job = self.service.jobs.get(video_id)
        except JobNotFound:
            job = None
        if job is None or job.client != client.name:
            raise self.not_found(video_id, param)
        return job

    def not_found(self, video_id: str, param: str = "video_id") -> ApiError:
        return ApiError(404, f"no video '{shown(video_id)}'", param=param, code="video_not_found")

    def _check_model(self, name: str | None) -> None:
        served = self.service.model.name
        if name not in (None, served):
            raise ApiError(
                404,
                f"the model '{shown(name)}' does not exist; this server serves '{served}'",
                param="model",
                code="model_not_found",
            )

    def _not_served(self, what: str, code: str) -> ApiError:
        model = self.service.model
        tasks = ", ".join(sorted(model.recipe.tasks))
        return ApiError(
            400,
            f"{what}, which model '{model.name}' was not trained for (it knows {tasks}); create a video from text",
            code=code,
        )

    def _admit(self, request: VideoRequest, terms: Terms) -> None:
        """What refuses a request without a look at its upload."""
        try:
            terms.client.check_priority(terms.priority)
        except ValueError as error:
            raise ApiError(403, str(error), param="x-priority", code="priority_not_allowed") from None
        if terms.idempotency_key is None and self._is_full():  # a repeated request is answered by its job all the same
            raise self._queue_is_full()
        self._moderate("prompt", text="\n".join(filter(None, (request.prompt, request.negative_prompt))))

    def _is_full(self) -> bool:
        return self.service.jobs.count("queued") >= self.service.settings.max_queued

    def _moderate(self, param: str, *, text: str = "", images: tuple[bytes, ...] = ()) -> None:
        if self.service.moderator is None:
            return
        try:
            self.service.moderator.check(text=text, images=images)
        except Refused as refusal:
            message = f"{param} is refused by this server's moderation: {refusal}"
            raise ApiError(400, message, param=param, code="content_policy_violation") from None
        except ModerationUnavailable:
            message = "the moderation of this server does not answer, so nothing is made now; try again later"
            raise ApiError(503, message, code="moderation_unavailable") from None

    def _image(self, reference: ImageReference | None, file: bytes | None) -> bytes | None:
        """The bytes of the first frame, wherever they come from."""
        if reference is not None:
            file = self._referenced(reference)
        if file is not None and not self.service.model.takes_image:
            raise ApiError(
                400,
                f"input_reference: model '{self.service.model.name}' was trained on text alone; leave the image out",
                param="input_reference",
                code="image_not_supported",
            )
        return file

    def _referenced(self, reference: ImageReference) -> bytes:
        url = reference.image_url
        if url is None or reference.file_id is not None:
            message = (
                "input_reference: no files are kept here, so there is no file_id; upload the image, or send a data: URL"
            )
            raise ApiError(400, message, param="input_reference", code="invalid_input_reference")
        try:
            if url.startswith("data:"):
                return _data_url(url)
            return fetching.fetch_image(
                url, self.service.settings.image_hosts, self.service.model.limits.max_body_bytes
            )
        except (fetching.NotFetched, binascii.Error, ValueError) as error:
            message = f"input_reference: {error}"
            raise ApiError(400, message, param="input_reference", code="invalid_input_reference") from None

    def _first_frame(self, upload: bytes, request: VideoRequest) -> bytes:
        try:
            frame = uploads.first_frame(upload, request, self.service.model.limits)
        except BadUpload as error:
            raise ApiError(400, f"input_reference: {error}", param="input_reference", code="invalid_image") from None
        self._moderate("input_reference", images=(frame,))
        return frame

    def _source(self, reference: VideoReference | None, client: Client, file: bytes | None) -> Job | None:
        """The job whose video is meant; None where a video was uploaded."""
        if reference is not None:
            return self._completed(reference.id, client, "video")
        if file is None:
            raise ApiError(
                400,
                'video: Field required; upload a video file, or send {"id": "video_..."} of a completed one',
                param="video",
                code="missing_required_parameter",
            )
        return None

    def _completed(self, video_id: str, client: Client, param: str) -> Job:
        job = self.find(video_id, client, param)
        if job.state != "completed" or (job.expires_at or 0) < time.time():
            state = "has expired" if job.state == "completed" else f"has status '{job.state}'"
            raise ApiError(
                400,
                f"video '{job.id}' {state}; name a video that is 'completed'",
                param=param,
                code="video_not_completed",
            )
        return job

    def _video_bytes(self, source: Job | None, file: bytes | None) -> bytes:
        if source is not None:
            return self.service.files.read(source.artifacts["video"])
        assert file is not None, "a source or a file; _source saw to it"
        return file

    def _keep(self, wish: Wish, terms: Terms, body: Body, what: str) -> Job:
        files, settings = self.service.files, self.service.settings
        kept = {role: files.keep_bytes(data) for role, data in wish.inputs.items()}
        new = NewJob(
            wish.request,
            model=self.service.model.name,
            inputs={**wish.kept, **kept},
            client=terms.client.name,
            priority=terms.priority,
            deadline_at=None if terms.deadline_s is None else time.time() + terms.deadline_s,
            idempotency_key=terms.idempotency_key,
            request_digest=_digest(what, body),
            remixed_from=wish.remixed_from,
        )
        try:
            return self.service.jobs.create(new, max_queued=settings.max_queued, max_active=terms.client.max_active)
        except QueueFull:
            raise self._queue_is_full() from None
        except QuotaExceeded:
            raise ApiError(
                429,
                f"this key may have {terms.client.max_active} videos queued or running; wait for one, or delete one",
                code="quota_exceeded",
                headers={"retry-after": self._retry_after()},
            ) from None
        except IdempotencyConflict:
            raise ApiError(
                409,
                "this Idempotency-Key was used for another request; send the same request, or a new key",
                param="idempotency-key",
                code="idempotency_conflict",
            ) from None

    def _queue_is_full(self) -> ApiError:
        wait_s = self._retry_after()
        return ApiError(
            429,
            f"{self.service.settings.max_queued} videos are waiting already; try again in {wait_s} s",
            code="queue_full",
            headers={"retry-after": wait_s},
        )

    def _retry_after(self) -> str:
        return str(max(1, math.ceil(self.service.retry_after_s())))


def _data_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("the data: URL must be base64, like data:image/png;base64,...")
    return base64.b64decode(data, validate=True)


def _digest(what: str, body: Body) -> str:
    """Of all that a client sent, so that a repeated request is told from another one."""
    said = json.dumps([what, body.fields], sort_keys=True).encode()
    return hashlib.sha256(b"\0".join([said, hashlib.sha256(body.file or b"").digest()])).hexdigest()
