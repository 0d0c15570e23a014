"""A client's request becomes a complete one: checked against the served model, the rest from its defaults.

It owns the messages of refusals; it knows nothing of HTTP bodies, jobs or tensors.
"""

import secrets
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from infra.serving.http.errors import ApiError, invalid
from infra.serving.http.schema import CreateVideo, EditVideo, ExtendVideo, RemixVideo
from infra.serving.limits import ServedModel, ServingLimits, VideoRequest

Shaped = CreateVideo | EditVideo | ExtendVideo


@dataclass(frozen=True, slots=True)
class _Frames:
    """A number of frames and how the client said it."""

    count: int
    param: str
    shown: str


def resolve(body: Shaped, model: ServedModel, *, given: bool = False) -> VideoRequest:
    """The complete request, its seed drawn if none was given; an ApiError names value, limit and way out.

    `given` says whether an image comes with it.
    """
    recipe, limits = model.recipe, model.limits
    _check_texts(body, model)
    width, height = _size(body, model)
    fps = _fps(body, model)
    asked = _asked_frames(body, fps)
    drawing = _drawing(body, _recipe_drawing(model), model, given=given)
    return VideoRequest(
        width=width,
        height=height,
        num_frames=recipe.video.num_frames if asked is None else _whole_tokens(asked, limits),
        fps=fps,
        **drawing,
    )


def redraw(body: RemixVideo, source: VideoRequest, model: ServedModel, *, given: bool) -> VideoRequest:
    """The source's request to another prompt; what the client does not say stays, the seed with it."""
    _check_texts(body, model)
    own = source.model_dump()
    return VideoRequest.model_validate(own | _drawing(body, own, model, given=given))


def continuation(body: ExtendVideo, model: ServedModel, source: VideoRequest | None) -> VideoRequest:
    """`source_frames` are the source's, or 0 of an upload, whose frames are counted once they are read."""
    limits, given = model.limits, model.continued_frames
    _check_texts(body, model)
    if source is None:
        (width, height), fps = _size(body, model), _fps(body, model)
    else:
        for name in ("size", "width", "height", "fps"):
            if getattr(body, name) is not None:
                raise invalid(name, f"{name}: a continuation has the size and fps of its video; leave it out")
        width, height, fps = source.width, source.height, source.fps
    asked = _asked_frames(body, fps)
    if asked is None:
        raise ApiError(
            400,
            "seconds: Field required; say how many seconds of new film to draw, or its num_frames",
            param="seconds",
            code="missing_required_parameter",
        )
    if asked.count == 0:
        raise invalid(asked.param, f"{asked.param} {asked.shown} is no frame; ask for at least one")
    wanted = given + asked.count
    drawn = -(-wanted // limits.frame_multiple) * limits.frame_multiple
    if drawn > limits.max_frames:
        most = limits.max_frames // limits.frame_multiple * limits.frame_multiple - given
        raise invalid(
            asked.param,
            f"{asked.param} {asked.shown} frames after the {given} given ones, at most {most} are served at once;"
            " extend the video again for more",
        )
    drawing = _drawing(body, _recipe_drawing(model), model, given=True)
    return VideoRequest(
        width=width,
        height=height,
        num_frames=drawn,
        fps=fps,
        source_frames=0 if source is None else source.delivered_frames,
        given_frames=given,
        surplus_frames=drawn - wanted,
        **drawing,
    )


def _check_texts(body: RemixVideo, model: ServedModel) -> None:
    _check_text("prompt", body.prompt, model)
    _check_text("negative_prompt", body.negative_prompt or "", model)


def _check_text(param: str, text: str, model: ServedModel) -> None:
    """Characters first: they are cheap to count."""
    if "\0" in text:
        raise invalid(param, f"{param} holds a NUL character, which no database keeps; remove it")
    characters, tokens = model.limits.max_prompt_characters, model.recipe.text.max_tokens
    if len(text) > characters:
        raise invalid(param, f"{param} has {len(text)} characters, at most {characters} are read; shorten it")
    counted = model.count_tokens(text)
    if counted > tokens:
        raise invalid(
            param, f"{param} has {counted} tokens (a word is one or more), at most {tokens} are read; shorten it"
        )


def _size(body: Shaped, model: ServedModel) -> tuple[int, int]:
    limits, video = model.limits, model.recipe.video
    asked = _asked_size(body)
    if asked is None:
        return video.width, video.height
    width, height = asked
    step, named = limits.size_multiple, f"size '{width}x{height}'"
    if width == 0 or height == 0 or width % step or height % step:
        nearest = f"{_nearest(width, step)}x{_nearest(height, step)}"
        raise invalid("size", f"{named}: width and height must be multiples of {step}; nearest is '{nearest}'")
    leave_out = f"leave it out for '{video.width}x{video.height}'"
    if width > limits.max_width or height > limits.max_height:
        raise invalid(
            "size", f"{named}: at most {limits.max_width} wide and {limits.max_height} high are served; {leave_out}"
        )
    if width * height > limits.max_pixels:
        raise invalid(
            "size",
            f"{named} has {width * height} pixels a frame, at most {limits.max_pixels} are served; {leave_out}",
        )
    return width, height


def _asked_size(body: Shaped) -> tuple[int, int] | None:
    sides = (body.width, body.height)
    if body.size is None:
        if sides == (None, None):
            return None
        if body.width is None or body.height is None:
            missing = "width" if body.width is None else "height"
            raise invalid(missing, f"{missing} is missing beside its other side; send both, or size")
        return body.width, body.height
    width, height = (int(side) for side in body.size.split("x"))
    if sides not in ((None, None), (width, height)):
        raise invalid(
            "size", f"size '{body.size}' is not width {body.width} and height {body.height}; send one of both"
        )
    return width, height


def _fps(body: Shaped, model: ServedModel) -> int:
    return _at_most("fps", body.fps or model.recipe.video.fps, model.limits.max_fps)


def _asked_frames(body: Shaped, fps: int) -> _Frames | None:
    exact = None if body.seconds is None else Decimal(body.seconds) * fps
    if body.num_frames is not None:
        if exact not in (None, body.num_frames):
            raise invalid(
                "seconds",
                f"seconds '{body.seconds}' x fps {fps} is not num_frames {body.num_frames}; send only one of the two",
            )
        return _Frames(body.num_frames, "num_frames", str(body.num_frames))
    if exact is None:
        return None
    if exact != int(exact):
        raise invalid("seconds", f"seconds '{body.seconds}' x fps {fps} is {exact} frames; send num_frames instead")
    return _Frames(int(exact), "seconds", f"{body.seconds} x fps {fps} = {int(exact)}")


def _whole_tokens(asked: _Frames, limits: ServingLimits) -> int:
    step, count, said = limits.frame_multiple, asked.count, f"{asked.param} {asked.shown} frames"
    if count > limits.max_frames:
        raise invalid(asked.param, f"{said}, at most {limits.max_frames} are served; ask for a shorter clip")
    if count == 0 or count % step:
        below, above = count // step * step, (count // step + 1) * step
        nearest = f"{below} or {above}" if below else str(above)
        raise invalid(asked.param, f"{said}, must be a multiple of {step}; nearest num_frames are {nearest}")
    return count


def _recipe_drawing(model: ServedModel) -> dict[str, Any]:
    sampling = model.recipe.sampling
    return {
        "guidance": sampling.guidance,
        "guidance_scale": 1.0 if sampling.guidance == "none" else sampling.guidance_scale,
        "image_guidance_scale": sampling.image_guidance_scale if sampling.guidance == "separate" else None,
        "num_inference_steps": sampling.num_steps,
        "flow_shift": model.recipe.flow.shift,
        "negative_prompt": "",
        "seed": secrets.randbelow(2**31),
    }


def _drawing(body: RemixVideo, default: dict[str, Any], model: ServedModel, *, given: bool) -> dict[str, Any]:
    """How it is drawn: the client's word, else the default's."""
    asked = body.model_dump(include=set(RemixVideo.model_fields), exclude_none=True)
    if body.image_guidance_scale is not None and not given:
        raise invalid(
            "image_guidance_scale",
            "image_guidance_scale guides towards a given image or video; send one, or leave it out",
        )
    values = {name: default[name] for name in _DRAWN} | asked
    _at_most("num_inference_steps", int(str(values["num_inference_steps"])), model.limits.max_steps)
    for name in ("guidance_scale", "image_guidance_scale"):
        _check_scale(name, asked.get(name), model.limits)
    image_scale = values["image_guidance_scale"] if given else None
    values["image_guidance_scale"] = image_scale
    values["guidance"] = _guidance_kind(values["guidance_scale"] == 1.0, separate=image_scale is not None)
    if values["guidance"] == "separate" and model.limits.max_engine_rows < 3:
        raise invalid(
            "image_guidance_scale",
            f"image_guidance_scale takes 3 rows of an engine call, calls here hold {model.limits.max_engine_rows};"
            " leave it out",
        )
    return values


_DRAWN = (
    *("guidance_scale", "image_guidance_scale", "num_inference_steps"),
    *("flow_shift", "negative_prompt", "seed"),
)


def _guidance_kind(unguided: bool, *, separate: bool) -> Literal["joint", "separate", "none"]:
    """At scale 1 joint guidance is the conditional prediction alone, at twice its price."""
    if separate:
        return "separate"
    return "none" if unguided else "joint"


def _check_scale(param: str, scale: float | None, limits: ServingLimits) -> None:
    if scale is not None and not 1.0 <= scale <= limits.max_guidance_scale:
        raise invalid(
            param, f"{param} {scale:g} is outside 1 to {limits.max_guidance_scale:g}; 1 follows the prompt unguided"
        )


def _at_most(param: str, value: int, limit: int) -> int:
    if value > limit:
        raise invalid(param, f"{param} {value}, at most {limit} are served; ask for fewer")
    return value


def _nearest(side: int, step: int) -> int:
    return max(step, round(side / step) * step)
