"""The terminal display of a stage in training; it knows nothing of where progress comes from."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from model.training.run import ProgressLine


class StageDisplay:
    """A bar a stage, with its loss and speed."""

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self._progress = Progress(
            TextColumn("{task.description}"), *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, stage: str, total_steps: int, lines: Sequence[ProgressLine]) -> None:
        """Bring the stage's bar to its last line; the bar appears with the first call."""
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=total_steps, note="starting ranks")
        if lines:
            last = lines[-1]
            note = f"loss {last.loss:.3f}, {last.samples_per_second:.0f} samples/s"
            if last.step == total_steps:
                note += ", evaluating"
            self._progress.update(self._bars[stage], completed=last.step, note=note)

    def finish(self, stage: str, note: str) -> None:
        """Leave the stage's bar with its outcome."""
        if stage in self._bars:
            self._progress.update(self._bars[stage], note=note)
