"""Moving shapes: captioned clips of one coloured shape moving in one direction, for which every claim can be checked.

It owns how a clip is drawn and worded; it knows nothing of shards or training. A clip's caption says all that the
clip shows ('a red circle moves right'), so a model that follows text and image can be measured exactly (`checker`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 220, 40),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
"""Name -> sign of the motion in x (to the right) and y (downwards)."""

BACKGROUND = 20
TRAVEL = 0.5
"""Share of the frame's side that a shape crosses from first to last frame, if it has so much room."""


@dataclass(frozen=True, slots=True)
class ShapeSpec:
    """What a clip shows, in the words of its caption."""

    color: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.color} {self.shape} moves {self.direction}"

    @property
    def image_caption(self) -> str:
        return f"a {self.color} {self.shape}"


ALL_SPECS = tuple(ShapeSpec(*names) for names in product(COLORS, SHAPES, DIRECTIONS))


@dataclass(frozen=True, slots=True)
class ShapeClip:
    """One clip: frames uint8 [T, size, size, 3] and what they show."""

    frames: npt.NDArray[np.uint8]
    spec: ShapeSpec


def generate(count: int, *, num_frames: int, size: int, seed: int) -> Iterator[ShapeClip]:
    """`count` clips; every combination of colour, shape and direction comes equally often."""
    rng = np.random.default_rng(seed)
    left: list[ShapeSpec] = []
    for _ in range(count):
        left = left or [ALL_SPECS[place] for place in rng.permutation(len(ALL_SPECS)).tolist()]
        yield draw(left.pop(), num_frames=num_frames, size=size, rng=rng)


def draw(spec: ShapeSpec, *, num_frames: int, size: int, rng: np.random.Generator) -> ShapeClip:
    """One clip of `spec`, its size and its start drawn so that the shape never leaves the frame."""
    if size < 16:
        raise ValueError(f"size {size} is too small to tell shapes apart; use at least 16")
    radius = rng.uniform(0.17, 0.21) * size
    low, high = radius + 1, size - radius - 1
    travel = min(TRAVEL * size, high - low)
    sign = np.array(DIRECTIONS[spec.direction], dtype=np.float64)
    centre = rng.uniform(low, high, size=2)
    axis = int(np.flatnonzero(sign)[0])
    # Where a shape has just enough room, rounding must not turn the range around.
    begin = (low, max(low, high - travel)) if sign[axis] > 0 else (min(low + travel, high), high)
    centre[axis] = rng.uniform(*begin)
    steps = np.linspace(0.0, 1.0, num_frames) if num_frames > 1 else np.zeros(1)
    color = np.array(COLORS[spec.color], dtype=np.float64)
    frames = np.empty((num_frames, size, size, 3), dtype=np.uint8)
    for index, step in enumerate(steps):
        cover = coverage(spec.shape, centre + sign * travel * step, radius, size)[..., None]
        frames[index] = np.rint(cover * color + (1 - cover) * BACKGROUND).astype(np.uint8)
    return ShapeClip(frames, spec)


def coverage(shape: str, centre: npt.NDArray[np.float64], radius: float, size: int) -> npt.NDArray[np.float64]:
    """Share of each pixel [size, size] that the shape covers: a signed distance, softened over one pixel."""
    y, x = np.mgrid[0:size, 0:size] + 0.5
    dx, dy = x - centre[0], y - centre[1]
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.89 * radius
    else:
        slanted = (2.0 * np.abs(dx) - dy) / np.sqrt(5.0)  # sides of an isosceles triangle, tip up
        distance = np.maximum(dy - 0.95 * radius, slanted - 0.45 * radius)
    return np.clip(0.5 - distance, 0.0, 1.0)
