"""What the benchmark leaves for its page: every row's figures by seed, in one committed JSON a machine.

It owns the file's form; it knows nothing of how the page looks.
"""

import statistics
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict

from benchmarks.miniature.claims import Finding, judge
from benchmarks.miniature.findings import CLAIMS
from benchmarks.miniature.rows import Row
from benchmarks.miniature.runs import RunResult
from benchmarks.result import RESULTS, hardware

FOLDER = RESULTS / "miniature"


class RowOutcome(BaseModel):
    """A row over all seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    steps: int
    """0 where another row's checkpoint is drawn in another way."""
    flops: float
    """Of its own training."""
    figures: dict[str, dict[int, float]]
    """Measure -> seed -> value."""

    def mean(self, measure: str) -> float | None:
        values = self.figures.get(measure)
        return None if values is None else statistics.fmean(values.values())

    def spread(self, measure: str) -> float | None:
        """Standard deviation over seeds."""
        values = self.figures.get(measure)
        return None if values is None or len(values) < 2 else statistics.stdev(values.values())


class Outcome(BaseModel):
    """All rows of one benchmark."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hardware: str
    date: AwareDatetime
    seeds: tuple[int, ...]
    cpu_hours: float
    """Processor time of all runs, one core each."""
    rows: dict[str, RowOutcome]
    strong: dict[str, float]
    """Figures of the strong recipe's checkpoint."""

    @property
    def findings(self) -> list[Finding]:
        figures = {name: _by_seed(row) for name, row in self.rows.items()}
        return [judge(claim, figures) for claim in CLAIMS if claim.row in figures and claim.than in figures]

    def write(self, folder: Path = FOLDER) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rows.{self.hardware}.json"
        path.write_text(self.model_dump_json(indent=1) + "\n")
        return path


def collect(
    rows: Mapping[str, Row], results: Mapping[tuple[str, int], RunResult], strong: Mapping[str, float]
) -> Outcome:
    """From the runs' results."""
    seeds = tuple(sorted({seed for _, seed in results}))
    seconds = sum(result.train_seconds + result.measure_seconds for result in results.values())
    return Outcome(
        hardware=hardware(),
        date=datetime.now(UTC).replace(microsecond=0),
        seeds=seeds,
        cpu_hours=round(seconds / 3600, 3),
        rows={name: _row(row, {seed: results[name, seed] for seed in seeds}) for name, row in rows.items()},
        strong=dict(strong),
    )


def read_outcomes(folder: Path = FOLDER) -> list[Outcome]:
    return [Outcome.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("rows.*.json"))]


def _row(row: Row, results: Mapping[int, RunResult]) -> RowOutcome:
    measures = list(next(iter(results.values())).figures)
    return RowOutcome(
        title=row.title,
        steps=0 if row.drawn_from else row.recipe(0).training.total_steps,
        flops=row.flops,
        figures={name: {seed: round(result.figures[name], 6) for seed, result in results.items()} for name in measures},
    )


def _by_seed(row: RowOutcome) -> dict[int, dict[str, float]]:
    seeds = sorted({seed for values in row.figures.values() for seed in values})
    return {seed: {name: values[seed] for name, values in row.figures.items()} for seed in seeds}
