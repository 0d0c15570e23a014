"""Text area: the share of the picture that is covered by writing."""

from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np

from infra.curate.cut import Frame, Segment

_FRAMES = 3
_SIDE = 512
"""Longer side of the frames that are looked at."""
_LETTERS = 3
"""Letters a line of text has at least."""


class MserText:
    """Lines of at least three MSER regions of like height side by side; no weights.

    It finds titles, subtitles and signs of plain letters; handwriting and text on busy ground need a network. (Matas et
    al., Robust Wide Baseline Stereo from Maximally Stable Extremal Regions, BMVC 2002.)
    """

    name = "text_area"
    model = "opencv MSER, regions grouped into lines"

    def __init__(self) -> None:
        self._mser: Any = cast(Any, cv2).MSER_create(delta=8, min_area=24, max_area=2000, max_variation=0.15)

    def score(self, segment: Segment) -> float:
        return float(np.median([self._share(segment.frames[place]) for place in segment.sampled(_FRAMES)]))

    def _share(self, frame: Frame) -> float:
        grey = cv2.cvtColor(_bounded(frame), cv2.COLOR_RGB2GRAY)
        found = np.asarray(self._mser.detectRegions(grey)[1], np.int64).reshape(-1, 4)
        boxes = {tuple(box) for box in found.tolist()}
        letters = [box for box in boxes if 6 <= box[3] <= 80 and 0.1 <= box[2] / box[3] <= 1.6]
        mask = np.zeros(grey.shape, np.uint8)
        for line in _lines(sorted(letters)):
            left, top = min(box[0] for box in line), min(box[1] for box in line)
            right, bottom = max(box[0] + box[2] for box in line), max(box[1] + box[3] for box in line)
            mask[top:bottom, left:right] = 1
        return float(mask.mean())


class DbText:
    """A DB text detector (DBNet, DBNet++) given as a file. (Liao et al., AAAI 2020; OpenCV's TextDetectionModel_DB.)"""

    name = "text_area"

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"scores.text_network {path}: no such file; give an ONNX file or leave it out")
        self.model = f"DB {path.name}"
        self._detector: Any = cv2.dnn.TextDetectionModel_DB(str(path))
        self._detector.setInputParams(scale=1 / 255, size=(736, 736), mean=(122.7, 116.7, 104.0))

    def score(self, segment: Segment) -> float:
        return float(np.median([self._share(segment.frames[place]) for place in segment.sampled(_FRAMES)]))

    def _share(self, frame: Frame) -> float:
        polygons, _ = self._detector.detect(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        mask = np.zeros(frame.shape[:2], np.uint8)
        for polygon in polygons:
            cv2.fillPoly(mask, [np.asarray(polygon, np.int32)], 1)
        return float(mask.mean())


def _bounded(frame: Frame) -> Frame:
    scale = _SIDE / max(frame.shape[:2])
    return frame if scale >= 1 else np.asarray(cv2.resize(frame, None, fx=scale, fy=scale), np.uint8)


def _lines(letters: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Letters, from left to right, joined to the line that they continue."""
    lines: list[list[tuple[int, ...]]] = []
    for box in letters:
        for line in lines:
            if _continues(line[-1], box):
                line.append(box)
                break
        else:
            lines.append([box])
    return [line for line in lines if len({box[0] // max(3, box[2] // 2) for box in line}) >= _LETTERS]


def _continues(last: tuple[int, ...], box: tuple[int, ...]) -> bool:
    height = max(last[3], box[3])
    middles = abs((last[1] + last[3] / 2) - (box[1] + box[3] / 2))
    return box[0] - (last[0] + last[2]) < 0.8 * height and middles < 0.35 * height and min(last[3], box[3]) > height / 2
