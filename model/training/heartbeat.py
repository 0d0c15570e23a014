"""A rank's signs of life: one small file of the run folder, written at every step and read by whoever watches.

It owns the file's form; it does not know who reads it, nor how long a silence is too long. It imports nothing heavy, so
that a rank can say that it starts before it loads anything.
"""

import json
import os
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Literal

from model.training.run import RunFolders

Phase = Literal["start", "compile", "step", "checkpoint", "leave", "succeeded", "stopped", "failed"]
"""What a rank is about to do: load and meet the others, its first step, a further step, a checkpoint, part from the
others; and how it ended. One that ended in none of the last three was killed."""

_RECENT_STEPS = 20
_WIDTH = 256
"""Bytes of a beat at least: each covers the one before. Only the last, with an error's text, may be longer."""
_LONGEST_ERROR = 2000


@dataclass(slots=True, frozen=True)
class Beat:
    """A rank's last sign of life."""

    rank: int
    pid: int
    phase: Phase
    step: int
    """Steps done."""
    time: float
    """Unix seconds, by the rank's clock."""
    slowest_step: float = 0.0
    """Longest of this process's recent steps in seconds; 0 before one is done."""
    error: str = ""
    """Of a rank that failed: the exception's name and text."""


class Heartbeat:
    """Tells that this rank lives: `beat(step, phase)` right before each phase; a call costs less than 20 µs."""

    def __init__(self, folders: RunFolders, rank: int) -> None:
        path = folders.heartbeat(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self.rank, self._step = rank, 0
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._step_began: float | None = None
        self(0, "start")

    def __call__(self, step: int, phase: Phase) -> None:
        now = time.monotonic()
        if self._step_began is not None:
            self._steps.append(now - self._step_began)
        self._step_began = now if phase == "step" else None
        self._write(step, phase)

    def end(self, phase: Literal["succeeded", "stopped", "failed"], error: str = "") -> None:
        """The last words of this rank, after whatever step it came to."""
        self._write(self._step, phase, error[:_LONGEST_ERROR])

    def _write(self, step: int, phase: Phase, error: str = "") -> None:
        self._step = step
        slowest = max(self._steps, default=0.0)
        beat = Beat(self.rank, os.getpid(), phase, step, time.time(), round(slowest, 6), error)
        os.pwrite(self._file, json.dumps(asdict(beat)).ljust(_WIDTH).encode() + b"\n", 0)


def read_beat(folders: RunFolders, rank: int) -> Beat | None:
    """The rank's last sign of life; None before its first, or while it is being written."""
    try:
        line, end, _ = folders.heartbeat(rank).read_bytes().partition(b"\n")
        return Beat(**json.loads(line)) if end else None
    except (FileNotFoundError, ValueError, TypeError):
        return None
