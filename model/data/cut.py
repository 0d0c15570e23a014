"""Cutting: the part of a stored clip that a stage sees, in time and space, at the stage's size.

It owns windows, crops, resizing and which caption fits; it knows nothing of which clip comes when, or of files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt

from model.config import VideoConfig
from model.data.shards import LatentSample, Sample


@dataclass(frozen=True, slots=True)
class Cut:
    """A clip of a stage's size and where in the original picture it begins."""

    clip: npt.NDArray[Any]
    """Pixels uint8 [T, H, W, 3], or latents [T, C, h, w]."""
    top: float
    left: float


def random_cut(sample: Sample, video: VideoConfig, rng: np.random.Generator) -> Cut:
    """All frames of `sample`, the largest part of the wanted aspect at a random place; no flip: captions name sides."""
    stored_height, stored_width = cast(tuple[int, int], sample.frames.shape[1:3])
    height, width, scale = _window(sample, video)
    top = int(rng.integers(stored_height - height + 1))
    left = int(rng.integers(stored_width - width + 1))
    return Cut(
        clip=_fitted(sample.frames[:, top : top + height, left : left + width], video, scale),
        top=top * sample.original_height / stored_height,
        left=left * sample.original_width / stored_width,
    )


def middle_cut(sample: Sample, video: VideoConfig, places: Sequence[int] | None = None) -> Cut:
    """Frames at `places`, or all, the largest middle part of the wanted aspect: without chance."""
    height, width, scale = _window(sample, video)
    stored_height, stored_width = cast(tuple[int, int], sample.frames.shape[1:3])
    top, left = (stored_height - height) // 2, (stored_width - width) // 2
    frames = sample.frames if places is None else sample.frames[list(places)]
    return Cut(
        clip=_fitted(frames[:, top : top + height, left : left + width], video, scale),
        top=top * sample.original_height / stored_height,
        left=left * sample.original_width / stored_width,
    )


def caption_of(sample: Sample | LatentSample, *, still: bool) -> str:
    """The caption of the clip, or of any `still` frame of it."""
    told = sample.extra.get("image_caption") if still else None
    return told if isinstance(told, str) else sample.caption


def _window(sample: Sample, video: VideoConfig) -> tuple[int, int, float]:
    """Height and width of the largest part of the wanted aspect, and the scale that makes it the wanted size."""
    stored_height, stored_width = cast(tuple[int, int], sample.frames.shape[1:3])
    scale = max(video.height / stored_height, video.width / stored_width)
    return min(stored_height, round(video.height / scale)), min(stored_width, round(video.width / scale)), scale


def _fitted(frames: npt.NDArray[np.uint8], video: VideoConfig, scale: float) -> npt.NDArray[np.uint8]:
    if frames.shape[1:3] == (video.height, video.width):
        return frames
    return _resized(frames, video, shrink=scale < 1)


def _resized(frames: npt.NDArray[np.uint8], video: VideoConfig, *, shrink: bool) -> npt.NDArray[np.uint8]:
    # Averaging over the area keeps fine detail from flickering when it shrinks; it cannot enlarge smoothly.
    interpolation = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
    resized = np.empty((len(frames), video.height, video.width, 3), dtype=np.uint8)
    for index in range(len(frames)):
        resized[index] = cv2.resize(frames[index], (video.width, video.height), interpolation=interpolation)
    return resized
