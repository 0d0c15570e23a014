"""From clips to the vectors that distributions of clips are compared in.

It owns the one extractor that needs no weights; networks given as files are `networks`'.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.measures.motion import Frames


@dataclass(frozen=True, slots=True)
class PixelMotionFeatures:
    """Coarse pixels of a few frames and where it moves, float [N, D] of N clips uint8 [T, H, W, 3].

    No weights, so the same everywhere; figures of another `name` must not be compared. Per clip: `frames` evenly spaced
    frames, averaged to `grid` x `grid` cells, in [0, 1], then the mean absolute difference of consecutive frames (of
    all of them), averaged to the same cells: D = (frames + 1) * grid² * 3.
    """

    grid: int = 8
    frames: int = 3

    @property
    def name(self) -> str:
        return f"pixel_motion_{self.grid}x{self.frames}"

    def __call__(self, clips: Sequence[Frames]) -> Tensor:
        return torch.as_tensor(np.stack([self._features(clip) for clip in clips]))

    def _features(self, clip: Frames) -> npt.NDArray[np.float64]:
        pixels = clip.astype(np.float32) / 255.0
        places = np.linspace(0, len(clip) - 1, self.frames).round().astype(int)
        moved = np.abs(np.diff(pixels, axis=0)).mean(axis=0) if len(clip) > 1 else np.zeros_like(pixels[0])
        cells = [self._cells(part) for part in (*pixels[places], moved)]
        return np.stack(cells).astype(np.float64).reshape(-1)

    def _cells(self, picture: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return cv2.resize(picture, (self.grid, self.grid), interpolation=cv2.INTER_AREA).astype(np.float32)
