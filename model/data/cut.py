"""Cutting: the part of a stored clip that a stage sees, in time and space, at the stage's size.

It owns windows, crops, resizing and which caption fits; it knows nothing of which clip comes when, or of files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

from model.config import VideoConfig
from model.data.shards import Sample


@dataclass(frozen=True, slots=True)
class Cut:
    """Clip pixels uint8 [T, H, W, 3] and where in the original picture they begin."""

    frames: npt.NDArray[np.uint8]
    top: float
    left: float


def random_cut(sample: Sample, video: VideoConfig, rng: np.random.Generator) -> Cut:
    """All frames of `sample`, the largest part of the wanted aspect at a random place; no flip: captions name sides."""
    stored_height, stored_width = cast(tuple[int, int], sample.frames.shape[1:3])
    height, width, scale = _window(sample, video)
    top = int(rng.integers(stored_height - height + 1))
    left = int(rng.integers(stored_width - width + 1))
    return Cut(
        frames=_fitted(sample.frames[:, top : top + height, left : left + width], video, scale),
        top=top * sample.original_height / stored_height,
        left=left * sample.original_width / stored_width,
    )


def middle_cut(sample: Sample, video: VideoConfig, places: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Frames [T, H, W, 3] at `places`, the largest middle part of the wanted aspect: without chance, to measure on."""
    height, width, scale = _window(sample, video)
    top, left = (sample.frames.shape[1] - height) // 2, (sample.frames.shape[2] - width) // 2
    return _fitted(sample.frames[list(places), top : top + height, left : left + width], video, scale)


def caption_of(sample: Sample, *, still: bool) -> str:
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
