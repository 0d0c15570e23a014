"""A training run in pictures: its loss as a curve, thinned and smoothed, and its time as a bar; places in an SVG.

It owns the arithmetic that the live card and the report share; it draws nothing itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model.training.run import ProgressLine
from monitoring.goodput import Account

POINTS = 400
"""A curve has no more points than this, however long the run."""


ACCOUNTS: Mapping[Account, tuple[str, str]] = {
    "step": ("optimizer steps", "#2f6fdb"),
    "data_wait": ("waiting for data", "#e69f00"),
    "checkpoint_stall": ("stalled by checkpoints", "#56b4e9"),
    "compile": ("compiling", "#cc79a7"),
    "init": ("starting", "#8a94a0"),
    "evaluation": ("evaluating", "#009e73"),
    "lost_to_restart": ("lost to restarts", "#d55e00"),
    "idle": ("idle", "#c9ced5"),
}
"""What time is spent on, in words, and its colour, one that the colour-blind tell from the others; the useful first."""


@dataclass(frozen=True, slots=True)
class LossPoint:
    """One point of a curve: the loss as it was logged, and the average around it."""

    step: int
    loss: float
    smoothed: float


@dataclass(frozen=True, slots=True)
class Tick:
    """A place on an axis and its label."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class TimePart:
    """A part of a run's time; where it begins and how long it is, in percent of the whole."""

    account: Account
    words: str
    color: str
    seconds: float
    begin: float
    share: float


@dataclass(frozen=True, slots=True)
class Plot:
    """A loss curve laid out in pixels; `raw` and `smoothed` are SVG path data."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    raw: str
    smoothed: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    hovers: tuple[tuple[float, float, str], ...]
    """x, y and what to say there."""
    marker: float | None


def loss_points(progress: Sequence[ProgressLine], limit: int = POINTS) -> list[LossPoint]:
    """The run's loss, thinned evenly to `limit` points; a loss that is not a number leaves a gap, not a zero."""
    finite = [line for line in progress if math.isfinite(line.loss)]
    losses = [line.loss for line in finite]
    points = [
        LossPoint(line.step, line.loss, _mean_around(losses, index, reach=len(losses) // 40))
        for index, line in enumerate(finite)
    ]
    if len(points) <= limit:
        return points
    return [points[round(index * (len(points) - 1) / (limit - 1))] for index in range(limit)]


def loss_plot(
    progress: Sequence[ProgressLine], *, marker: int | None = None, width: float = 720, height: float = 240
) -> Plot | None:
    """The loss over the steps, from zero; `marker` is a step to point out. None if there is no loss to draw."""
    points = loss_points(progress)
    if not points:
        return None
    left, right, top, bottom = 48.0, width - 24.0, 12.0, height - 34.0
    y_values = _ticks(max(point.loss for point in points))
    last = max(point.step for point in points)
    x_values = [value for value in _ticks(last) if value <= last]

    def x(step: float) -> float:
        return round(left + (right - left) * step / max(last, 1), 1)

    def y(loss: float) -> float:
        return round(bottom - (bottom - top) * loss / y_values[-1], 1)

    def path(values: Sequence[float]) -> str:
        return "M" + "L".join(f"{x(point.step)} {y(value)}" for point, value in zip(points, values, strict=True))

    return Plot(
        width,
        height,
        left,
        right,
        top,
        bottom,
        raw=path([point.loss for point in points]),
        smoothed=path([point.smoothed for point in points]),
        x_ticks=tuple(Tick(x(value), f"{value:,.0f}") for value in x_values),
        y_ticks=tuple(Tick(y(value), f"{value:.3g}") for value in y_values),
        hovers=tuple(
            (
                x(point.step),
                y(point.smoothed),
                f"step {point.step:,}: loss {point.loss:.4f}, average {point.smoothed:.4f}",
            )
            for point in points
        ),
        marker=None if marker is None else x(marker),
    )


def time_parts(spent_seconds: Mapping[str, float]) -> list[TimePart]:
    """Where a run's time went, the parts one after the other; what took none is left out."""
    total = sum(spent_seconds.values())
    parts: list[TimePart] = []
    begin = 0.0
    for account, (words, color) in ACCOUNTS.items():
        seconds = spent_seconds.get(account, 0.0)
        if seconds > 0:
            share = 100 * seconds / total
            parts.append(TimePart(account, words, color, seconds, round(begin, 2), round(share, 2)))
            begin += share
    return parts


def _mean_around(losses: Sequence[float], index: int, *, reach: int) -> float:
    """The mean of as many losses before as after, so that a falling curve is not shown too late."""
    reach = min(reach, index, len(losses) - 1 - index)
    return sum(losses[index - reach : index + reach + 1]) / (2 * reach + 1)


def _ticks(highest: float) -> list[float]:
    """Round values from 0 to the first that is not below `highest`."""
    rough = max(highest, 1e-9) / 4
    scale = 10.0 ** math.floor(math.log10(rough))
    step = scale * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * scale >= rough)
    return [step * index for index in range(math.ceil(highest / step - 1e-9) + 1)]
