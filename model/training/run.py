"""A run's folder: where each thing lies in it, its lock, and the progress that others follow.

It knows nothing of how a stage is trained, and imports nothing heavy: launchers and flows read it too.
"""

import fcntl
import json
import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO


class RunBusy(RuntimeError):
    """Another process trains in this run folder."""


@dataclass(slots=True, frozen=True)
class RunFolders:
    """What a stage reads and where it writes."""

    data: Path
    """Holds the shards `train/`."""
    codec: Path
    """Holds the frozen codec."""
    run: Path
    """Written by this run alone; one that holds checkpoints is resumed."""
    initial: Path | None = None
    """The parent stage's checkpoint to grow from."""
    initial_temporal: Path | None = None
    """The temporal parent's, where temporal attention comes from another stage than the rest."""

    @property
    def recipe(self) -> Path:
        return self.run / "recipe.json"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    @property
    def progress(self) -> Path:
        return self.run / "progress.jsonl"

    @property
    def metrics_port(self) -> Path:
        """The port rank 0 serves metrics on, while it runs."""
        return self.run / "metrics_port"

    @property
    def logs(self) -> Path:
        return self.run / "logs"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"


@dataclass(slots=True, frozen=True)
class ProgressLine:
    """One line of `progress.jsonl`."""

    step: int
    """Steps done."""
    total_steps: int
    loss: float
    """Mean over the steps since the line before, as far as this process did them."""
    grad_norm: float
    """Of the last step, before clipping."""
    learning_rate: float
    step_seconds: float
    """Mean over the steps since the line before."""
    samples_per_second: float
    """Over all ranks."""
    elapsed_seconds: float
    """Spent in this run's steps and checkpoints, interruptions left out."""


def read_progress(path: Path) -> list[ProgressLine]:
    """All whole lines so far; none where the run has not begun."""
    if not path.exists():
        return []
    return [ProgressLine(**json.loads(line)) for line in _whole_lines(path)]


def rewind_progress(path: Path, step: int) -> float:
    """Drop the lines after `step`, which a resumed run will write again; the seconds spent until then."""
    kept = [line for line in read_progress(path) if line.step <= step]
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(json.dumps(asdict(line)) + "\n" for line in kept))
    temporary.replace(path)
    return kept[-1].elapsed_seconds if kept else 0.0


def append_progress(path: Path, line: ProgressLine) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(line)) + "\n")


@contextmanager
def exclusive(folder: Path, *, patience: float = 60.0) -> Generator[None]:
    """Hold a run folder, so that two launches never write at once.

    The kernel drops the lock with the process that holds it, however that ends. A rank that a killed launcher left
    behind is given `patience` seconds for its last step and checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with (folder / "lock").open("a+") as file:
        while not _locked(file):
            if time.monotonic() > deadline:
                file.seek(0)
                raise RunBusy(
                    f"process {file.read()} trains in {folder} and did not end within {patience:g} s; wait for it, stop"
                    " it, or use another run folder"
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _whole_lines(path: Path) -> Iterator[str]:
    """A line without its end is being written, or was cut off by a kill."""
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield line
