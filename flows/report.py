"""The demo's report: one HTML file with everything inside it, so that it opens anywhere and offline.

It owns what the page concludes from a report; its looks are in `templates/`. It knows nothing of measuring.
"""

import base64
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flows.curves import loss_plot, time_parts
from flows.figures import TASKS, count, decibel, duration, error, figure, percent, task_name
from flows.results import DemoReport, StageResult
from model.data.moving_shapes import COLORS, DIRECTIONS, SHAPES

TEMPLATES = Path(__file__).parent / "templates"

_MEDIA_TYPES = {".png": "image/png", ".webp": "image/webp", ".mp4": "video/mp4"}
_WORDS = ("color", "shape", "direction", "joint")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that had to work, and whether it did."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the run as a bar: where it begins and how long it is, in percent of the whole."""

    name: str
    seconds: float
    begin: float
    share: float


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """How often a stage's samples follow their captions in one task; None where the task has no such word."""

    stage: str
    task: str
    prompts: int
    words: tuple[float | None, ...]


def write_report(report: DemoReport, path: Path) -> None:
    """Write the page to `path`, which appears only whole."""
    page = render(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)


def render(report: DemoReport) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(  # pyright: ignore[reportUnknownMemberType]
        count=count,
        data_uri=data_uri,
        decibel=decibel,
        duration=duration,
        error=error,
        figure=figure,
        percent=percent,
        task=task_name,
    )
    checks = list(_checks(report))
    return environment.get_template("report.html.j2").render(
        report=report,
        checks=checks,
        passed=all(check.passed for check in checks),
        parts=_parts(report),
        accuracy=list(_accuracy(report.stages)),
        chance=_chance(),
        plots=[loss_plot(stage.progress, marker=stage.unmasked_from) for stage in report.stages],
        times=[time_parts(stage.spent_seconds) for stage in report.stages],
    )


def data_uri(path: Path) -> str:
    """A picture or video as an address that carries its bytes."""
    media_type = _MEDIA_TYPES.get(path.suffix)
    if media_type is None:
        raise ValueError(f"{path} cannot go into the report: its ending must be one of {sorted(_MEDIA_TYPES)}")
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _checks(report: DemoReport) -> Iterator[Check]:
    stages = report.stages
    promoted = sum(stage.gate.passed for stage in stages)
    yield Check("gates", promoted == len(stages), f"{promoted} of {len(stages)} stages promoted")
    agreeing = sum(row.passed for row in report.parity)
    yield Check(
        "ONNX parity", agreeing == len(report.parity), f"{agreeing} of {len(report.parity)} shapes within their bound"
    )
    served = sum(video.completed for video in report.videos)
    yield Check("serving", served == len(report.videos), f"{served} of {len(report.videos)} requests completed")
    metrics = [line for line in report.metrics_excerpt.splitlines() if line and not line.startswith("#")]
    yield Check("metrics", bool(metrics), f"{len(metrics)} series in the excerpt")


def _parts(report: DemoReport) -> list[Part]:
    parts: list[Part] = []
    begin = 0.0
    for name, seconds in report.parts:
        share = 100 * seconds / max(report.seconds_total, 1e-9)
        parts.append(Part(name, seconds, round(begin, 2), round(share, 2)))
        begin += share
    return parts


def _accuracy(stages: Sequence[StageResult]) -> Iterator[AccuracyRow]:
    for stage in stages:
        for task in TASKS:
            words = tuple(stage.metrics.get(f"{task}_{word}_accuracy") for word in _WORDS)
            if any(value is not None for value in words):
                yield AccuracyRow(stage.recipe.name, task, stage.recipe.evaluation.sample_prompts, words)


def _chance() -> tuple[float, ...]:
    """What guessing each word would score; all three at once is the last."""
    words = [1 / len(names) for names in (COLORS, SHAPES, DIRECTIONS)]
    return (*words, math.prod(words))
