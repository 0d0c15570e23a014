"""What a run leaves to be shown: the figures, pictures and videos that cards and the demo's report are made of.

It owns their form and checks that a report is complete; it does not know how anything is drawn or measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from infra.registry.records import GateReport
from model.recipe import StageRecipe
from model.training.run import ProgressLine
from monitoring.goodput import Booked

if TYPE_CHECKING:  # a flow's imports run anew for every refresh of a card, and this one is PyTorch
    from infra.launch.stage import StageOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """A trained stage: how it went, what its gate said, what it draws."""

    recipe: StageRecipe
    parameters: int
    digest: str
    """Of the published checkpoint."""
    progress: Sequence[ProgressLine]
    metrics: Mapping[str, float]
    """Of the evaluation, `TASK_joint_accuracy` and the like among them."""
    gate: GateReport
    grid: Path
    """PNG: a caption a row, its frames beside it."""
    animations: Mapping[str, Path]
    """Task -> animated WebP of the first samples."""
    booked: Booked | None = None
    """Where its time went, evaluation included."""

    @property
    def spent_seconds(self) -> Mapping[str, float]:
        """By account: of the whole stage, or as far as its training tells; empty where nothing was booked."""
        if self.booked is not None:
            return self.booked.seconds
        return (self.progress[-1].spent_seconds if self.progress else None) or {}

    @property
    def goodput(self) -> float | None:
        """Share of that time that went into optimizer steps that count."""
        spent = self.spent_seconds
        return spent["step"] / sum(spent.values()) if spent else None

    @property
    def unmasked_from(self) -> int | None:
        """The step after which all tokens were trained on; None if that never changed."""
        training = self.recipe.training
        return training.steps if training.unmasked_steps and training.mask_ratio else None


def stage_result(recipe: StageRecipe, outcome: "StageOutcome") -> StageResult:
    """What a controller step keeps of its stage."""
    return StageResult(
        recipe=recipe,
        parameters=int(outcome.checkpoint.metrics["parameters"]),
        digest=outcome.checkpoint.digest,
        progress=outcome.progress,
        metrics=outcome.checkpoint.metrics,
        gate=outcome.gate,
        grid=outcome.grid,
        animations=outcome.animations,
        booked=outcome.booked,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecFigures:
    """What the frozen codec keeps of a frame, the ceiling of everything drawn through it."""

    description: str
    real_psnr_db: float
    shapes_psnr_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSummary:
    """One source of the data set, with the thanks it asks for."""

    name: str
    train_clips: int
    heldout_clips: int
    licence: str
    credit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRow:
    """ONNX Runtime against PyTorch on one shape."""

    shape: str
    max_abs_error: float
    bound: float
    torch_seconds: float
    onnx_seconds: float

    @property
    def passed(self) -> bool:
        return self.max_abs_error <= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedVideo:
    """A video as the server's client received it."""

    title: str
    prompt: str
    mp4: Path
    first_frame: Path | None
    """The image the request carried."""
    transitions: Sequence[tuple[str, float]]
    """Each status the client saw and the seconds since its request."""
    facts: Mapping[str, str]
    """Whatever else of the request is worth reading."""

    @property
    def completed(self) -> bool:
        return bool(self.transitions) and self.transitions[-1][0] == "completed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """Everything the demo's report says."""

    title: str
    created: datetime
    hardware: str
    versions: Mapping[str, str]
    parts: Sequence[tuple[str, float]]
    """Name and seconds of each part, in the order they ran."""
    peak_rss_gb: float
    stages: Sequence[StageResult]
    codec: CodecFigures
    sources: Sequence[SourceSummary]
    parity: Sequence[ParityRow]
    videos: Sequence[ServedVideo]
    metrics_excerpt: str

    def __post_init__(self) -> None:
        for part in ("parts", "stages", "sources", "parity", "videos"):
            if not getattr(self, part):
                raise ValueError(f"the report's {part} are empty; a demo that ran to its end has at least one")

    @property
    def seconds_total(self) -> float:
        return sum(seconds for _, seconds in self.parts)

    @property
    def max_abs_error(self) -> float:
        return max(row.max_abs_error for row in self.parity)

    def metric(self, name: str) -> float | None:
        """From the last stage that measured it, the one the engine is exported from."""
        return next((stage.metrics[name] for stage in reversed(self.stages) if name in stage.metrics), None)
