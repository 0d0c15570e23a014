"""A client's request becomes a complete one: checked against the served model, the rest from the recipe's defaults.

It owns the messages of refusals; it knows nothing of HTTP bodies, jobs or tensors.
"""

import secrets
from decimal import Decimal

from infra.serving.http.schema import ApiError, CreateVideo
from infra.serving.limits import ServedModel, ServingLimits, VideoRequest
from model.recipe import StageRecipe


def resolve(body: CreateVideo, model: ServedModel) -> VideoRequest:
    """The complete request, its seed drawn if none was given; an ApiError names value, limit and way out."""
    recipe, limits = model.recipe, model.limits
    _check_text("prompt", body.prompt, model)
    _check_text("negative_prompt", body.negative_prompt or "", model)
    width, height = _size(body, recipe, limits)
    fps = _at_most("fps", body.fps or recipe.video.fps, limits.max_fps)
    steps = body.num_inference_steps or recipe.sampling.num_steps
    return VideoRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt or "",
        width=width,
        height=height,
        num_frames=_num_frames(body, fps, recipe, limits),
        fps=fps,
        num_inference_steps=_at_most("num_inference_steps", steps, limits.max_steps),
        guidance=recipe.sampling.guidance,
        guidance_scale=_guidance_scale(body, recipe, limits),
        flow_shift=body.flow_shift or recipe.flow.shift,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
    )


def _check_text(param: str, text: str, model: ServedModel) -> None:
    """Characters first: they are cheap to count."""
    if "\0" in text:
        raise _refused(param, f"{param} holds a NUL character, which no database keeps; remove it")
    characters, tokens = model.limits.max_prompt_characters, model.recipe.text.max_tokens
    if len(text) > characters:
        raise _refused(param, f"{param} has {len(text)} characters, at most {characters} are read; shorten it")
    counted = model.count_tokens(text)
    if counted > tokens:
        raise _refused(
            param, f"{param} has {counted} tokens (a word is one or more), at most {tokens} are read; shorten it"
        )


def _size(body: CreateVideo, recipe: StageRecipe, limits: ServingLimits) -> tuple[int, int]:
    if body.size is None:
        return recipe.video.width, recipe.video.height
    width, height = (int(side) for side in body.size.split("x"))
    step = limits.size_multiple
    if width == 0 or height == 0 or width % step or height % step:
        nearest = f"{_nearest(width, step)}x{_nearest(height, step)}"
        raise _refused(
            "size", f"size '{body.size}': width and height must be multiples of {step}; nearest is '{nearest}'"
        )
    default = f"{recipe.video.width}x{recipe.video.height}"
    if width > limits.max_width or height > limits.max_height:
        raise _refused(
            "size",
            f"size '{body.size}': at most {limits.max_width} wide and {limits.max_height} high are served;"
            f" leave it out for '{default}'",
        )
    if width * height > limits.max_pixels:
        raise _refused(
            "size",
            f"size '{body.size}' has {width * height} pixels a frame, at most {limits.max_pixels} are served;"
            f" leave it out for '{default}'",
        )
    return width, height


def _num_frames(body: CreateVideo, fps: int, recipe: StageRecipe, limits: ServingLimits) -> int:
    if body.num_frames is not None and body.seconds is not None:
        if Decimal(body.seconds) * fps != body.num_frames:
            raise _refused(
                "seconds",
                f"seconds '{body.seconds}' x fps {fps} is not num_frames {body.num_frames}; send only one of the two",
            )
        return _frames("num_frames", body.num_frames, str(body.num_frames), limits)
    if body.num_frames is not None:
        return _frames("num_frames", body.num_frames, str(body.num_frames), limits)
    if body.seconds is None:
        return recipe.video.num_frames
    exact = Decimal(body.seconds) * fps
    if exact != int(exact):
        raise _refused("seconds", f"seconds '{body.seconds}' x fps {fps} is {exact} frames; send num_frames instead")
    return _frames("seconds", int(exact), f"{body.seconds} x fps {fps} = {int(exact)}", limits)


def _frames(param: str, count: int, shown: str, limits: ServingLimits) -> int:
    step = limits.frame_multiple
    if count > limits.max_frames:
        raise _refused(param, f"{param} {shown} frames, at most {limits.max_frames} are served; ask for a shorter clip")
    if count == 0 or count % step:
        below, above = count // step * step, (count // step + 1) * step
        nearest = f"{below} or {above}" if below else str(above)
        raise _refused(param, f"{param} {shown} frames, must be a multiple of {step}; nearest num_frames are {nearest}")
    return count


def _guidance_scale(body: CreateVideo, recipe: StageRecipe, limits: ServingLimits) -> float:
    scale = recipe.sampling.guidance_scale if body.guidance_scale is None else body.guidance_scale
    if not 1.0 <= scale <= limits.max_guidance_scale:
        raise _refused(
            "guidance_scale",
            f"guidance_scale {scale:g} is outside 1 to {limits.max_guidance_scale:g}; 1 follows the prompt unguided",
        )
    return scale


def _at_most(param: str, value: int, limit: int) -> int:
    if value > limit:
        raise _refused(param, f"{param} {value}, at most {limit} are served; ask for fewer")
    return value


def _nearest(side: int, step: int) -> int:
    return max(step, round(side / step) * step)


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code=f"invalid_{param}")
