"""The warm-up: a small fixed video that an engine draws before it serves, compared with what it should look like.

It owns the request, the file and the comparison; it knows nothing of jobs. The file is written where the engine was
proven and travels in its bundle; without one two draws are compared with each other.
"""

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from infra.serving.limits import VideoRequest
from infra.serving.pipeline import VideoPipeline
from model.recipe import StageRecipe

logger = logging.getLogger(__name__)

STEPS = 2
TOLERANCE = 1e-2
"""Relative root mean square between two machines' draws, where the file does not say."""
SAME_ENGINE = 1e-3
"""Between two draws of one engine."""


class GoldenMismatch(Exception):
    """The engine draws something else than it did when it was proven, or no numbers at all."""


def warm_up_request(recipe: StageRecipe) -> VideoRequest:
    """A video of the trained shape in few steps."""
    video = recipe.video
    return VideoRequest(
        prompt="a red circle moves right",
        width=video.width,
        height=video.height,
        num_frames=video.num_frames,
        fps=video.fps,
        num_inference_steps=STEPS,
        guidance_scale=recipe.sampling.guidance_scale,
        flow_shift=recipe.flow.shift,
        seed=0,
    )


def draw(pipeline: VideoPipeline, request: VideoRequest) -> Tensor:
    """Latents [1, T, C, h, w]."""
    row = pipeline.prepare("warm-up", request, {})
    while not row.done:
        pipeline.advance([row])
    return row.latents


def write_golden(pipeline: VideoPipeline, path: Path, *, tolerance: float = TOLERANCE) -> None:
    """What an engine of this network should draw, and how far off it may be (relative root mean square)."""
    request = warm_up_request(pipeline.recipe)
    said = {"request": request.model_dump_json(), "tolerance": json.dumps(tolerance)}
    save_file({"latents": draw(pipeline, request).contiguous()}, path, metadata=said)


def check_golden(pipeline: VideoPipeline) -> None:
    """Draw once, or twice where the bundle holds no golden.

    Raises:
        GoldenMismatch: the engine must not serve.
    """
    if pipeline.golden is None:
        request, tolerance = warm_up_request(pipeline.recipe), SAME_ENGINE
        wanted, against = draw(pipeline, request), "its own first draw"
    else:
        request, tolerance, wanted = _read(pipeline.golden)
        against = "its golden"
    found = draw(pipeline, request)
    error = _size(found - wanted) / _size(wanted)
    if not bool(torch.isfinite(found).all()) or not error <= tolerance:
        raise GoldenMismatch(
            f"engine {pipeline.digest[:12]} draws the warm-up video {error:.3g} off {against}, at most {tolerance:g} is"
            " allowed; export the checkpoint again, or serve it on the hardware that it was proven on"
        )
    logger.info("warm-up: engine %s is %.3g off %s", pipeline.digest[:12], error, against)


def _size(latents: Tensor) -> float:
    return float(latents.square().mean()) ** 0.5


def _read(path: Path) -> tuple[VideoRequest, float, Tensor]:
    with cast(Any, safe_open(path, framework="pt")) as file:
        said: dict[str, str] = file.metadata()
    return VideoRequest.model_validate_json(said["request"]), json.loads(said["tolerance"]), load_file(path)["latents"]
