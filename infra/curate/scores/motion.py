"""Motion: how fast a segment's picture moves."""

from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt

from infra.curate.cut import SMALL_SIDE, Frame, Segment

_PAIRS = 6
_ULTRAFAST = 0


class DisFlow:
    """Mean length of DIS optical flow, in percent of the longer side a second; no weights.

    A standing camera on a still scene is below 0.5, a walk 5 to 30, a whip pan above 100. (Kroeger et al., Fast Optical
    Flow using Dense Inverse Search, ECCV 2016.)
    """

    name = "motion"
    model = "opencv DIS optical flow, preset ultrafast"

    def __init__(self) -> None:
        self._flow: Any = cast(Any, cv2).DISOpticalFlow_create(_ULTRAFAST)

    def score(self, segment: Segment) -> float:
        places = [place for place in segment.sampled(_PAIRS) if place + 1 < len(segment.small)]
        lengths = [self._length(segment.small[place], segment.small[place + 1]) for place in places]
        return 100 * segment.fps * float(np.mean(lengths)) / SMALL_SIDE if lengths else 0.0

    def _length(self, first: Frame, second: Frame) -> float:
        grey = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in (first, second)]
        # Its coarsest scale needs a picture of some size.
        if min(grey[0].shape) < 16:
            return 0.0
        flow: npt.NDArray[np.float32] = self._flow.calc(grey[0], grey[1], None)
        return float(np.hypot(flow[..., 0], flow[..., 1]).mean())
