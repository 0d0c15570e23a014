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
    def captions(self) -> Path:
        """Every caption's embedding, encoded at the run's first start."""
        return self.run / "captions.safetensors"

    @property
    def progress(self) -> Path:
        return self.run / "progress.jsonl"

    @property
    def goodput(self) -> Path:
        """The ledger of where the run's time went."""
        return self.run / "goodput.jsonl"

    @property
    def metrics_port(self) -> Path:
        """The port rank 0 serves metrics on, while it runs."""
        return self.run / "metrics_port"

    @property
    def logs(self) -> Path:
        return self.run / "logs"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def heartbeat(self, rank: int) -> Path:
        """The rank's last sign of life."""
        return self.run / "heartbeats" / f"rank-{rank}.json"

    @property
    def incidents(self) -> Path:
        """What befell the ranks, one file each."""
        return self.run / "incidents"


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
    data_wait_seconds: float | None = None
    """The part of `step_seconds` in which the first rank waited for data."""
    tokens_per_second: float | None = None
    """Over all ranks, of whole clips: masked tokens count."""
    mfu: float | None = None
    """Share of the hardware's peak that the model's FLOPs took of `step_seconds`; None where the peak is unknown."""
    hfu: float | None = None
    """The same with what is computed again in backward."""
    straggler_ratio: float | None = None
    """The slowest rank's own time over the median rank's, since the line before; None of a single rank."""
    spent_seconds: dict[str, float] | None = None
    """The run's time so far by account of its ledger, interruptions included."""

    @property
    def goodput(self) -> float | None:
        """Share of that time that went into steps that count."""
        return self.spent_seconds["step"] / sum(self.spent_seconds.values()) if self.spent_seconds else None


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
def exclusive(folder: Path, *, name: str = "lock", patience: float = 60.0) -> Generator[None]:
    """Hold a run folder, so that two launches never write at once; locks of other names are held beside each other.

    The kernel drops the lock with the process that holds it, however that ends. A rank that a killed launcher left
    behind is given `patience` seconds for its last step and checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with (folder / name).open("a+") as file:
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
