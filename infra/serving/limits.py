"""A video as it was asked for, with every value decided, and the bounds of the model that serves it.

It owns the numeric limits; it knows nothing of HTTP, jobs or tensors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field

from export.profiles import ShapeProfile
from model.config import Config, Positive
from model.recipe import StageRecipe

MEBIBYTE = 2**20
STRETCH = 4
"""Frames and pixels over the trained ones, where no engine profile says."""


class VideoRequest(Config):
    """A request with every value decided; stored with its job, so that a second run draws the same video."""

    prompt: str
    negative_prompt: str = ""
    width: Positive
    height: Positive
    num_frames: Positive
    """Frames the network draws."""
    fps: Positive
    num_inference_steps: Positive
    guidance: Literal["joint", "separate", "none"] = "joint"
    """Rows of an engine call: two, three (text and image have a scale each), or one."""
    guidance_scale: float
    image_guidance_scale: float | None = None
    """Of separate guidance; None with the others."""
    flow_shift: float
    seed: int
    source_frames: Annotated[int, Field(ge=0)] = 0
    """Of the job's input video, which the clip continues; 0 where there is none."""
    given_frames: Annotated[int, Field(ge=0)] = 0
    """Its last frames, which stand clean at the start of the clip; they count in `num_frames`."""
    surplus_frames: Annotated[int, Field(ge=0)] = 0
    """At the end of the clip: drawn because the network takes whole tokens of frames, and not delivered."""

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def seconds(self) -> str:
        """Length of the delivered video."""
        return f"{self.delivered_frames / self.fps:.3f}".rstrip("0").rstrip(".")

    @property
    def delivered_frames(self) -> int:
        return self.source_frames - self.given_frames + self.num_frames - self.surplus_frames


ENGINE_ROWS = {"joint": 2, "separate": 3, "none": 1}
"""Rows that a video takes in an engine call, by its kind of guidance: one a pass of `model.sampler.PASSES`."""


def cost_key(request: VideoRequest) -> str:
    """FRAMESxHEIGHTxWIDTH: requests with equal ones take equally long a denoise step and row."""
    return f"{request.num_frames}x{request.height}x{request.width}"


def work_class(request: VideoRequest) -> str:
    """How much work a video is, to compare like with like: `1e6` takes up to a million pixels times denoise steps.

    A power of ten from `1e5` to `1e11`, so that a label has few values whatever is asked for.
    """
    work = request.num_frames * request.height * request.width * request.num_inference_steps
    return f"1e{min(11, max(5, math.ceil(math.log10(work))))}"


class ServingLimits(Config):
    """Bounds of one served model and of one request body."""

    size_multiple: Positive
    """Codec factor x patch size: sides must be multiples of it."""
    frame_multiple: Positive
    """Temporal patch size."""
    max_width: Positive
    max_height: Positive
    max_pixels: Positive
    """Of one frame; a side may be longer if the other is shorter."""
    max_frames: Positive
    max_fps: Positive = 60
    max_steps: Positive = 200
    max_guidance_scale: Annotated[float, Field(ge=1)] = 20.0
    max_engine_rows: Positive = 8
    """Rows of one engine call: a video takes 1 without guidance, 2 with joint, 3 with separate."""
    max_prompt_characters: Positive = 2000
    max_body_bytes: Positive = 20 * MEBIBYTE
    """Whole request: fields and image."""
    max_image_pixels: Positive = 25_000_000
    max_image_side: Positive = 16_384
    max_source_frames: Positive = 1200
    """Of an uploaded or chained video, once it is brought to the asked fps."""
    max_decode_s: Annotated[float, Field(gt=0)] = 20.0
    """Processor time to read one uploaded image or video."""

    @classmethod
    def of(cls, recipe: StageRecipe, profile: ShapeProfile | None = None) -> Self:
        """What the engine's profile allows, or four times the frames and pixels that the stage was trained on."""
        factor, video = recipe.vae.spatial_factor, recipe.video
        return cls(
            size_multiple=factor * recipe.network.patch_size,
            frame_multiple=recipe.network.temporal_patch_size,
            max_width=profile.max.width * factor if profile else STRETCH * video.width,
            max_height=profile.max.height * factor if profile else STRETCH * video.height,
            max_pixels=profile.max_area * factor**2 if profile else STRETCH * video.height * video.width,
            max_frames=profile.max.frames if profile else STRETCH * video.num_frames,
        )


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What can be known of the model without running it."""

    name: str
    recipe: StageRecipe
    limits: ServingLimits
    count_tokens: Callable[[str], int]
    """Of the text encoder; safe from any thread."""

    @property
    def takes_image(self) -> bool:
        return "ti2v" in self.recipe.tasks

    @property
    def continued_frames(self) -> int:
        """Last frames of a video that the model can go on from; 0 if it cannot."""
        if "prediction" in self.recipe.tasks:
            return self.recipe.conditioning.prediction_frames
        return 1 if self.takes_image else 0
