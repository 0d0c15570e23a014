"""The jobs that this worker holds a lease of, from the moment it asks for them until they are ended or handed back.

It owns where each of them is; it knows nothing of how one is made. Its threads share it.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from infra.serving.jobs.table import Job
from infra.serving.pipeline import DenoiseRow, VideoPipeline
from monitoring import metrics


@dataclass(frozen=True, slots=True)
class Standing:
    """A row as it stood after a denoise step."""

    step: int
    latents: Tensor
    before: Tensor
    """Latents one step earlier."""


@dataclass(slots=True)
class HeldJob:
    job: Job
    pipeline: VideoPipeline
    """Which began it; it ends with that one."""
    row: DenoiseRow | None = None
    """None until it is prepared."""
    standing: Standing | None = None
    """None until its first step here."""
    kept_step: int = 0
    previewed_at: float = 0.0
    since: float = field(default_factory=time.monotonic)
    drawn_at: float | None = None
    """When its last step here was done."""

    @property
    def progress(self) -> int:
        return self.job.progress if self.row is None else self.row.progress


class HeldJobs:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, HeldJob] = {}
        self._asked: set[str] = set()

    def __len__(self) -> int:
        return len(self._held)

    def ask(self, ids: Iterable[str]) -> None:
        """They may be ours from now on, whether the database's answer arrives or not."""
        with self._lock:
            self._asked = set(ids)

    def hold(self, held: HeldJob) -> None:
        with self._lock:
            self._held[held.job.id] = held
            metrics.JOBS_RUNNING.set(len(self._held))

    def find(self, job_id: str) -> HeldJob | None:
        return self._held.get(job_id)

    def drop(self, job_id: str) -> None:
        """It is ended, cancelled or taken over: whoever works on it finds it gone and leaves it."""
        with self._lock:
            self._held.pop(job_id, None)
            metrics.JOBS_RUNNING.set(len(self._held))

    def all(self) -> list[HeldJob]:
        with self._lock:
            return list(self._held.values())

    def strays(self, leased: set[str]) -> set[str]:
        """Those of `leased` that nobody here knows: the answer to their lease was lost."""
        with self._lock:
            return leased - self._held.keys() - self._asked
