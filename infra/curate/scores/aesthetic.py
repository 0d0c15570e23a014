"""Aesthetics: how pleasing a segment's frames are, on LAION's scale of 1 to 10."""

from pathlib import Path

import cv2
import numpy as np

from infra.curate.cut import Frame, Segment
from infra.curate.scores.network import PictureNetwork

_FRAMES = 3


class Colourfulness:
    """Colour and contrast on a scale of 1 to 10; no weights, and no taste: it only sorts out dull and flat pictures.

    (Hasler and Süsstrunk, Measuring colourfulness in natural images, 2003.)
    """

    name = "aesthetic"
    model = "colourfulness and contrast"

    def score(self, segment: Segment) -> float:
        return float(np.mean([self._rated(segment.small[place]) for place in segment.sampled(_FRAMES)]))

    def _rated(self, frame: Frame) -> float:
        blue, green, red = (frame[..., channel].astype(np.float32) for channel in range(3))
        reds, yellows = red - green, (red + green) / 2 - blue
        colour = np.hypot(reds.std(), yellows.std()) + 0.3 * np.hypot(reds.mean(), yellows.mean())
        contrast = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY).std()
        return float(1 + 4.5 * min(colour / 80, 1) + 4.5 * min(contrast / 70, 1))


class AestheticNetwork:
    """A predictor given as a file, such as LAION's MLP over CLIP; the mean of three frames."""

    name = "aesthetic"

    def __init__(self, path: Path) -> None:
        self._network = PictureNetwork(path, "scores.aesthetic_network")
        self.model = self._network.model

    def score(self, segment: Segment) -> float:
        return float(self._network.run([segment.frames[place] for place in segment.sampled(_FRAMES)]).mean())
