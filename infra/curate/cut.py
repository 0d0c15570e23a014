"""Cut: where segments begin and end in a stream of frames, and what is cut off at their sides.

It owns the detectors and the borders; it knows nothing of files, scores or shards. At most one segment is in memory,
and the few frames that a detector may still claim for a cut.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt
from scenedetect import (  # pyright: ignore[reportMissingTypeStubs]
    AdaptiveDetector,
    ContentDetector,
    FrameTimecode,
    ThresholdDetector,
)

from infra.curate.footage import Frame, Moment
from infra.curate.recipe import CutConfig
from model.data.scenes import Picture

SMALL_SIDE = 256
"""Longer side of the frames that detectors and most scorers see; PySceneDetect's own choice for its thresholds."""
_LATE = 8
"""Frames by which a detector may be late beyond its shortest scene."""
_DARK, _STILL, _PLAIN = 24, 6, 4
"""Grey levels: a letterbox's brightest, a border's change in time, and its spread along the edge."""
_MAX_BORDER = 0.35
"""Of a side; more is a dark scene, not a border."""
_BORDER_FRAMES = 12


@dataclass(slots=True)
class Segment:
    """A stretch of one shot."""

    frames: list[Frame]
    """uint8 [h, w, 3], RGB, at the stored size, its borders cut off."""
    small: list[Frame]
    """uint8 [h, w, 3], BGR, longer side `SMALL_SIDE` before borders were cut off."""
    fps: float
    start: int
    """First frame's number on the grid."""
    picture: Picture
    borders: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Shares of height and width cut off: top, bottom, left, right."""

    @property
    def seconds(self) -> tuple[float, float]:
        return self.start / self.fps, (self.start + len(self.frames)) / self.fps

    def sampled(self, count: int) -> list[int]:
        """`count` places spread evenly, the middles of equal parts."""
        total = len(self.frames)
        return [int((part + 0.5) * total / count) for part in range(min(count, total))]


@dataclass(slots=True)
class _Pending:
    frames: list[Frame] = field(default_factory=list[Frame])
    small: list[Frame] = field(default_factory=list[Frame])
    start: int = 0

    def taken(self, count: int) -> "_Pending":
        taken = _Pending(self.frames[:count], self.small[:count], self.start)
        del self.frames[:count], self.small[:count]
        self.start += count
        return taken


def segments(moments: Iterable[Moment], fps: float, config: CutConfig) -> Iterator[Segment]:
    """The segments of a stream in order; together they are the whole stream, too short ones included."""
    rate = Fraction(fps).limit_denominator(1001 * 240)
    detectors = _detectors(config)
    longest = max(1, round(config.max_seconds * fps))
    late = config.min_scene_len + _LATE
    pending = _Pending()
    picture: Picture | None = None
    for index, moment in enumerate(moments):
        picture = moment.picture
        pending.frames.append(moment.pixels)
        pending.small.append(_small(moment.pixels))
        time = FrameTimecode(index, rate)
        cuts = {cut.frame_num for detector in detectors for cut in detector.process_frame(time, pending.small[-1])}
        for cut in sorted(cuts):
            if cut > pending.start:
                yield from _pieces(pending.taken(cut - pending.start), longest, fps, picture, config)
        while len(pending.frames) >= longest + late:
            yield from _pieces(pending.taken(longest), longest, fps, picture, config)
    if picture is not None:
        yield from _pieces(pending, longest, fps, picture, config)


def _pieces(found: _Pending, longest: int, fps: float, picture: Picture, config: CutConfig) -> Iterator[Segment]:
    """In nearly equal parts, none above the longest."""
    total = len(found.frames)
    if not total:
        return
    parts = -(-total // longest)
    bounds = [total * part // parts for part in range(parts + 1)]
    for start, stop in pairwise(bounds):
        piece = Segment(found.frames[start:stop], found.small[start:stop], fps, found.start + start, picture)
        yield _cropped(piece) if config.crop_borders else piece


def _detectors(config: CutConfig) -> list[Any]:
    made: list[Any] = []
    if config.detector == "content":
        made.append(ContentDetector(threshold=config.threshold, min_scene_len=config.min_scene_len))
    else:
        made.append(AdaptiveDetector(adaptive_threshold=config.adaptive_threshold, min_scene_len=config.min_scene_len))
    if config.fade_threshold:
        made.append(ThresholdDetector(threshold=config.fade_threshold, min_scene_len=config.min_scene_len))
    return made


def _small(pixels: Frame) -> Frame:
    height, width = pixels.shape[:2]
    scale = min(1.0, SMALL_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Averaging areas costs many times as much, and shows a detector nothing more where pixels are at most halved.
    method = cv2.INTER_LINEAR if scale >= 0.5 else cv2.INTER_AREA
    small = pixels if scale == 1.0 else cv2.resize(pixels, size, interpolation=method)
    return cast(Frame, cv2.cvtColor(small, cv2.COLOR_RGB2BGR))


def _cropped(segment: Segment) -> Segment:
    borders = find_borders([segment.small[place] for place in segment.sampled(_BORDER_FRAMES)])
    if not any(borders):
        return segment
    segment.borders = borders
    segment.frames = [_without(frame, borders, even=True) for frame in segment.frames]
    segment.small = [_without(frame, borders) for frame in segment.small]
    return segment


def find_borders(frames: list[Frame]) -> tuple[float, float, float, float]:
    """Shares of height and width that are letterbox or a plain static border: top, bottom, left, right.

    Black rows count alone; plain ones of another colour only where the opposite side has them too.
    """
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in frames])
    brightest, change = grey.max(axis=0), np.ptp(grey, axis=0)
    typical = np.median(grey, axis=0)
    sides: list[float] = []
    for axis in (1, 0):
        dark = brightest.max(axis=axis) <= _DARK
        plain = (change.max(axis=axis) <= _STILL) & (np.ptp(typical, axis=axis) <= _PLAIN)
        black = _run(dark), _run(dark[::-1])
        both = min(_run(plain), _run(plain[::-1]))
        length = len(dark)
        for count in black:
            share = max(count, both) / length
            # One row more than is seen: the edge of a scaled border is neither black nor picture.
            sides.append(min(share + 1 / length, 1.0) if share > 0.01 else 0.0)
    if len(frames) < 2 or sides[0] + sides[1] > 2 * _MAX_BORDER or sides[2] + sides[3] > 2 * _MAX_BORDER:
        return (0.0, 0.0, 0.0, 0.0)
    return (sides[0], sides[1], sides[2], sides[3])


def _run(row: npt.NDArray[np.bool_]) -> int:
    """How many are true from the start."""
    return len(row) if row.all() else int(np.argmin(row))


def _without(frame: Frame, borders: tuple[float, float, float, float], *, even: bool = False) -> Frame:
    height, width = frame.shape[:2]
    top, left = round(borders[0] * height), round(borders[2] * width)
    bottom, right = height - round(borders[1] * height), width - round(borders[3] * width)
    if even:
        bottom, right = bottom - (bottom - top) % 2, right - (right - left) % 2
    return frame[top:bottom, left:right]
