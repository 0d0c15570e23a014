"""The wire shape of the videos API: what a client may send and what it gets back, as OpenAI's SDK reads it.

It owns field names, types and what is said of a wrong one; it knows nothing of a model's limits, of jobs or of routes.
"""

import json
from typing import Annotated, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra.serving.http.errors import ApiError, invalid, shown

Status = Literal["queued", "in_progress", "completed", "failed"]
Variant = Literal["video", "thumbnail", "spritesheet"]
VARIANTS: tuple[Variant, ...] = ("video", "thumbnail", "spritesheet")

MAX_SEED = 2**63 - 1

HINTS = {
    "prompt": "say what the video shows",
    "size": "write WIDTHxHEIGHT in pixels, like '32x32'",
    "seconds": "write a decimal number of seconds, like '1' or '0.5'",
    "input_reference": 'upload an image file as a multipart part, or send {"image_url": "data:image/png;base64,..."}',
    "video": 'upload a video as a multipart file part, or send {"id": "video_..."}',
}
"""What to do about a field, where pydantic's own message does not say."""


class _Body(BaseModel):
    """Form fields arrive as strings, JSON ones may be numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, coerce_numbers_to_str=True)


class ImageReference(_Body):
    image_url: Annotated[str, Field(min_length=1)] | None = None
    """A data: URL; others only from hosts that the server's settings name."""
    file_id: Annotated[str, Field(min_length=1)] | None = None
    """OpenAI's; no files are kept here, so it is always refused."""


class VideoReference(_Body):
    id: Annotated[str, Field(min_length=1, max_length=100)]
    """A completed video of this server."""


class RemixVideo(_Body):
    """What says how a video is drawn. The rest is the source video's."""

    prompt: Annotated[str, Field(min_length=1)]
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    image_guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Guides text and image apart, each by its own scale; wants a given image or video."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    negative_prompt: str | None = None
    """Stands in place of the empty null text that guidance pushes away from."""
    flow_shift: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None


class _ShapedVideo(RemixVideo):
    model: Annotated[str, Field(max_length=200)] | None = None
    seconds: Annotated[str, Field(pattern=r"^\d{1,4}(\.\d{1,3})?$")] | None = None
    """Length of what is drawn; with `fps` it decides `num_frames`."""
    size: Annotated[str, Field(pattern=r"^\d{1,5}x\d{1,5}$")] | None = None
    """Width x height in pixels."""
    width: Annotated[int, Field(ge=1)] | None = None
    height: Annotated[int, Field(ge=1)] | None = None
    num_frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[int, Field(ge=1)] | None = None


class CreateVideo(_ShapedVideo):
    """Body of POST /v1/videos."""

    input_reference: ImageReference | None = None
    """The first frame."""


class EditVideo(_ShapedVideo):
    """Body of POST /v1/videos/edits."""

    video: VideoReference | None = None
    """Its first frame is kept; what follows is drawn anew to the prompt."""


class ExtendVideo(_ShapedVideo):
    """Body of POST /v1/videos/extensions: `seconds` or `num_frames` of new film."""

    video: VideoReference | None = None
    """Its last frames are given; the answer is the video with its continuation."""


class CreateCharacter(_Body):
    """Body of POST /v1/videos/characters, which no model served here can make use of."""

    name: Annotated[str, Field(min_length=1, max_length=200)]


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


Body = TypeVar("Body", bound=_Body)


def parse(kind: type[Body], fields: dict[str, object]) -> Body:
    """The typed request, or the first thing wrong with it as a 400 that names the field and the way out."""
    fields = _with_extra_body(fields)
    for name in fields:
        if name not in kind.model_fields:
            known = ", ".join(kind.model_fields)
            raise ApiError(
                400, f"unknown field '{shown(name)}'; known fields: {known}", param=shown(name), code="unknown_field"
            )
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    param = str(first["loc"][0])
    given = f" (got '{shown(fields[param])}')" if param in fields else ""
    hint = f"; {HINTS[param]}" if param in HINTS else ""
    code = "missing_required_parameter" if first["type"] == "missing" and len(first["loc"]) == 1 else f"invalid_{param}"
    raise ApiError(400, f"{param}: {first['msg']}{given}{hint}", param=param, code=code)


def _with_extra_body(fields: dict[str, object]) -> dict[str, object]:
    """The fields with those of `extra_body` beside them, as some clients send it: an object, or its JSON in a form."""
    if "extra_body" not in fields:
        return fields
    extra = fields["extra_body"]
    if isinstance(extra, str):
        try:
            extra = json.loads(extra)
        except (ValueError, RecursionError):
            extra = None
    if not isinstance(extra, dict):
        raise invalid("extra_body", "extra_body must be a JSON object of further fields; or send them by themselves")
    own = {name: value for name, value in fields.items() if name != "extra_body"}
    further = cast("dict[str, object]", extra)
    for name in own.keys() & further.keys():
        raise invalid("extra_body", f"extra_body holds '{shown(name)}', which stands beside it too; send it once")
    return own | further
