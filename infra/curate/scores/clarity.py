"""Clarity: how sharp a segment's frames are."""

import cv2
import numpy as np

from infra.curate.cut import Segment

_FRAMES = 4


class Laplacian:
    """Median variance of the Laplacian of the stored frames' brightness; no weights.

    Below 20 a picture is out of focus or was enlarged, above 100 it has detail. It grows with noise too.
    """

    name = "clarity"
    model = "variance of the Laplacian"

    def score(self, segment: Segment) -> float:
        return float(np.median([self._variance(segment.frames[place]) for place in segment.sampled(_FRAMES)]))

    def _variance(self, frame: np.ndarray) -> float:
        return float(cv2.Laplacian(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.CV_32F).var())
