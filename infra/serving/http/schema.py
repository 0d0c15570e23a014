"""The wire shape of the videos API: what a client may send and what it gets back, as OpenAI's SDK reads it.

It owns field names, types and the error envelope; it knows nothing of a model's limits, of jobs or of HTTP routes.
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Status = Literal["queued", "in_progress", "completed", "failed"]
Variant = Literal["video", "thumbnail", "spritesheet"]
VARIANTS: tuple[Variant, ...] = ("video", "thumbnail", "spritesheet")
FILE_FIELD = "input_reference"

MAX_SEED = 2**63 - 1

HINTS = {
    "prompt": "say what the video shows",
    "size": "write WIDTHxHEIGHT in pixels, like '32x32'",
    "seconds": "write a decimal number of seconds, like '1' or '0.5'",
}
"""What to do about a field, where pydantic's own message does not say."""


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


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(BaseModel):
    error: ErrorBody


class CreateVideo(BaseModel):
    """Body of POST /v1/videos beside the uploaded image; form fields arrive as strings, JSON ones may be numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, coerce_numbers_to_str=True)

    prompt: Annotated[str, Field(min_length=1)]
    model: Annotated[str, Field(max_length=200)] | None = None
    seconds: Annotated[str, Field(pattern=r"^\d{1,4}(\.\d{1,3})?$")] | None = None
    """Length of the clip; with `fps` it decides `num_frames`."""
    size: Annotated[str, Field(pattern=r"^\d{1,5}x\d{1,5}$")] | None = None
    """Width x height in pixels."""
    num_frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[int, Field(ge=1)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    negative_prompt: str | None = None
    """Stands in place of the empty null text that guidance pushes away from."""
    flow_shift: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None


class VideoError(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """OpenAI's Video object, no more and no less."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    seconds: str
    size: str
    prompt: str | None
    remixed_from_video_id: str | None = None
    error: VideoError | None


class VideoPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "stiv"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def error_type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def parse_create(fields: dict[str, object]) -> CreateVideo:
    """The typed request, or the first thing wrong with it as a 400 that names the field and the way out."""
    for name in fields:
        if re.match(rf"{FILE_FIELD}(\[|$)", name):
            raise ApiError(
                400,
                f"{FILE_FIELD} must be an uploaded image file (a multipart file part);"
                " image URLs and file ids are not fetched by this server",
                param=FILE_FIELD,
                code="invalid_input_reference",
            )
        if name not in CreateVideo.model_fields:
            known = ", ".join([*CreateVideo.model_fields, FILE_FIELD])
            raise ApiError(
                400, f"unknown field '{_shown(name)}'; known fields: {known}", param=_shown(name), code="unknown_field"
            )
    try:
        return CreateVideo.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = str(first["loc"][0])
        given = f" (got '{_shown(str(fields[param]))}')" if param in fields else ""
        hint = f"; {HINTS[param]}" if param in HINTS else ""
        raise ApiError(
            400, f"{param}: {first['msg']}{given}{hint}", param=param, code=_code(param, str(first["type"]))
        ) from None


def _code(param: str, kind: str) -> str:
    if kind == "missing":
        return "missing_required_parameter"
    return f"invalid_{param}"


def _shown(text: str, limit: int = 60) -> str:
    text = text.encode(errors="backslashreplace").decode()  # JSON can carry half a surrogate pair; an answer cannot
    return text if len(text) <= limit else text[:limit] + "..."
