"""The exact checker of moving shapes: says what a clip shows, so that following text and image can be counted.

It owns the measurement; it knows nothing of models. On clips drawn by `moving_shapes` it is right every time; a clip
that shows no clear shape gets `None` for what cannot be told, which counts as wrong.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.data.moving_shapes import BACKGROUND, COLORS, DIRECTIONS, SHAPES, ShapeSpec, coverage

MIN_PIXELS = 12
"""Fewer foreground pixels than this are noise, not a shape."""
MAX_SHARE = 0.3
"""A larger share of the frame than this is a background, not a shape."""
MIN_IOU = 0.6
"""A shape must overlap its ideal outline by this much (soft intersection over union)."""
MIN_TRAVEL = 0.12
"""Share of the side that the centre must cross to count as motion."""

_AREA = {"circle": math.pi, "square": (2 * 0.89) ** 2, "triangle": 1.913}
"""Area of each outline of `coverage`, in units of radius squared."""
_CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 0.298}
"""Centre of mass below the outline's own centre, in units of the radius."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What a clip shows; None where it cannot be told."""

    color: str | None
    shape: str | None
    direction: str | None
    travel: float | None
    """Share of the side that the centre crosses along the direction from first to last frame: the speed."""

    def matches(self, spec: ShapeSpec) -> bool:
        """Whether the clip shows what the caption says; a caption says nothing of speed."""
        return (self.color, self.shape, self.direction) == (spec.color, spec.shape, spec.direction)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of clips in [0, 1] that follow their caption, by word and in all three words at once."""

    color: float
    shape: float
    direction: float
    joint: float


def observe(frames: npt.NDArray[np.uint8]) -> Observation:
    """What `frames` uint8 [T, H, W, 3] show."""
    foreground = frames.astype(np.float64) - BACKGROUND
    strength = foreground.max(axis=-1)
    seen = strength > 60.0
    counts = seen.sum(axis=(1, 2))
    usable = (counts >= MIN_PIXELS) & (counts <= MAX_SHARE * seen[0].size)
    visible = [index for index in range(len(frames)) if usable[index]]
    if len(visible) == 0:
        return Observation(None, None, None, None)
    color = _color(foreground[visible][seen[visible]])
    shapes: list[str | None] = []
    centres: list[npt.NDArray[np.float64]] = []
    for index in visible:
        cover = np.where(seen[index] | (strength[index] > 20.0), strength[index], 0.0)
        cover = np.clip(cover / np.percentile(strength[index][seen[index]], 75), 0.0, 1.0)
        centre = _centroid(cover)
        centres.append(centre)
        shapes.append(_shape(cover, centre))
    shape = Counter(shapes).most_common(1)[0][0]
    moved = centres[-1] - centres[0] if len(visible) > frames.shape[0] // 2 else np.zeros(2)
    direction = _direction(moved, side=frames.shape[1])
    return Observation(color, shape, direction, _travel(moved, direction, visible, frames.shape))


def accuracy(observations: Sequence[Observation], specs: Sequence[ShapeSpec]) -> Accuracy:
    """How often each word of the caption is followed."""
    pairs = list(zip(observations, specs, strict=True))
    if not pairs:
        raise ValueError("no clips to check: give at least one")

    def share(hits: list[bool]) -> float:
        return sum(hits) / len(pairs)

    return Accuracy(
        color=share([seen.color == spec.color for seen, spec in pairs]),
        shape=share([seen.shape == spec.shape for seen, spec in pairs]),
        direction=share([seen.direction == spec.direction for seen, spec in pairs]),
        joint=share([seen.matches(spec) for seen, spec in pairs]),
    )


def speed_error(observations: Sequence[Observation], travels: Sequence[float | None]) -> float:
    """Mean error of the speed relative to the wanted ones, as `Observation.travel` states them; no motion is 1.

    Clips whose wanted travel is None (none can be told) do not count; NaN if none counts.
    """
    pairs = [(seen.travel or 0.0, wanted) for seen, wanted in zip(observations, travels, strict=True) if wanted]
    return sum(abs(travel - wanted) / wanted for travel, wanted in pairs) / len(pairs) if pairs else math.nan


def first_frame_psnr(frames: npt.NDArray[np.uint8], image: npt.NDArray[np.uint8]) -> float:
    """PSNR in dB of the clip's first frame against the conditioning image, both uint8 [H, W, 3]; 99 when equal."""
    error = float(((frames[0].astype(np.float64) - image.astype(np.float64)) ** 2).mean())
    return 99.0 if error == 0.0 else min(99.0, 10.0 * math.log10(255.0**2 / error))


def _color(pixels: npt.NDArray[np.float64]) -> str | None:
    mean = np.median(pixels, axis=0)
    mean = mean / max(float(np.linalg.norm(mean)), 1e-6)
    closeness: dict[str, float] = {}
    for name, rgb in COLORS.items():
        wanted = np.array(rgb, dtype=np.float64) - BACKGROUND
        closeness[name] = float(mean @ (wanted / np.linalg.norm(wanted)))
    best = max(closeness, key=lambda name: closeness[name])
    return best if closeness[best] > 0.9 else None


def _centroid(cover: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    y, x = np.mgrid[0 : cover.shape[0], 0 : cover.shape[1]] + 0.5
    return np.array([(x * cover).sum(), (y * cover).sum()]) / cover.sum()


def _shape(cover: npt.NDArray[np.float64], centre: npt.NDArray[np.float64]) -> str | None:
    overlap: dict[str, float] = {}
    for shape in SHAPES:
        radius = math.sqrt(float(cover.sum()) / _AREA[shape])
        ideal = coverage(shape, centre - np.array([0.0, _CENTROID[shape] * radius]), radius, cover.shape[0])
        overlap[shape] = float(np.minimum(cover, ideal).sum() / np.maximum(cover, ideal).sum())
    best = max(overlap, key=lambda shape: overlap[shape])
    return best if overlap[best] > MIN_IOU else None


def _travel(
    moved: npt.NDArray[np.float64], direction: str | None, visible: list[int], shape: tuple[int, ...]
) -> float | None:
    """Way along `direction`, as if the shape had been seen from the first frame to the last."""
    if direction is None:
        return None
    along = float(moved @ np.array(DIRECTIONS[direction])) / shape[1]
    return along * (shape[0] - 1) / (visible[-1] - visible[0])


def _direction(moved: npt.NDArray[np.float64], *, side: int) -> str | None:
    along = {name: float(moved @ np.array(sign)) for name, sign in DIRECTIONS.items()}
    best = max(along, key=lambda name: along[name])
    across = math.sqrt(max(float(moved @ moved) - along[best] ** 2, 0.0))
    return best if along[best] > MIN_TRAVEL * side and along[best] > 2.0 * across else None
