"""The worker: leases jobs, advances all of them one denoise step at a time in one batch, and delivers videos.

It owns the loop and what happens when one job fails; it knows nothing of HTTP. The scheduler says who shares a call,
the pipeline does the arithmetic, the job store remembers.
"""

import logging
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.serving import media
from infra.serving.jobs.files import JobFiles
from infra.serving.jobs.owner import new_owner
from infra.serving.jobs.store import JobStore
from infra.serving.jobs.table import Beat, Job
from infra.serving.pipeline import DenoiseRow, Diverged, VideoPipeline
from infra.serving.scheduling.cost import CostModel
from infra.serving.scheduling.scheduler import Scheduler
from infra.serving.settings import ServerSettings
from model.generation import Clip
from monitoring import metrics
from monitoring.logs import bound

logger = logging.getLogger(__name__)

RECOVER_EVERY_S = 5.0
PAUSE_AFTER_ERROR_S = 1.0


@dataclass(frozen=True, slots=True)
class _Running:
    job: Job
    since: float
    """Monotonic."""


class Worker:
    def __init__(self, jobs: JobStore, pipeline: VideoPipeline, files: JobFiles, settings: ServerSettings) -> None:
        self.jobs = jobs
        self.pipeline = pipeline
        self.files = files
        self.settings = settings
        self.owner = new_owner()
        self.scheduler: Scheduler[DenoiseRow] = Scheduler(2 * settings.max_rows, CostModel())
        self._running: dict[str, _Running] = {}
        self._told_at = 0.0
        self._recovered_at = -RECOVER_EVERY_S
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stiv-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """A job was created in this process; an idle worker need not wait for its next poll."""
        self._wake.set()

    def stop(self) -> None:
        """Take no new job, finish running ones for `drain_s`, hand the others back to the queue."""
        self._stopping.set()
        self._wake.set()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping.is_set()

    def turn(self, *, admitting: bool = True) -> bool:
        """Admit, advance one group one step, deliver what is done; False if there was nothing to do."""
        self._recover()
        self._drop_lost()
        if admitting:
            self._admit()
        batch = self.scheduler.next_batch()
        if not batch:
            return False
        for row in self._advance(batch):
            if row.done:
                self._deliver(row)
        self._tell_progress()
        return True

    def _run(self) -> None:
        logger.info("worker %s takes jobs, up to %s at a time", self.owner, self.settings.max_rows)
        while not self._stopping.is_set():
            self._wake.clear()
            if not self._turn_safely():
                self._wake.wait(self.settings.idle_poll_s)
        deadline = time.monotonic() + self.settings.drain_s
        while self.scheduler.rows and time.monotonic() < deadline:
            self._turn_safely(admitting=False)
        handed_back = self.jobs.release(self.owner)
        logger.info("worker %s stopped, %s jobs handed back to the queue", self.owner, handed_back)

    def _turn_safely(self, *, admitting: bool = True) -> bool:
        try:
            return self.turn(admitting=admitting)
        except Exception:
            # The database or the disk failed, not a job: rows stay where they are and the next turn tries again.
            logger.exception("a turn of the worker failed, next one in %s s", PAUSE_AFTER_ERROR_S)
            self._stopping.wait(PAUSE_AFTER_ERROR_S)
            return True

    def _recover(self) -> None:
        if time.monotonic() - self._recovered_at < RECOVER_EVERY_S:
            return
        self._recovered_at = time.monotonic()
        found = self.jobs.requeue_abandoned(lease_s=self.settings.lease_s)
        if found:
            logger.warning("%s jobs of lost workers were taken back", found)

    def _drop_lost(self) -> None:
        """Cancelled rows leave before the next call; so do rows that another worker took over."""
        if not self.scheduler.rows:
            return
        held = self.jobs.held(self.owner)
        for row in self.scheduler.rows:
            if row.job_id not in held:
                logger.info("job %s was cancelled or taken over at step %s of %s", row.job_id, row.step, row.num_steps)
                self._leave(row.job_id)

    def _admit(self) -> None:
        if not self.scheduler.free_rows:
            return
        chosen = self.scheduler.choose(self.jobs.waiting(self.settings.max_queued), self.scheduler.free_rows)
        leased = self.jobs.lease(self.owner, chosen)
        for missed in set(chosen) - {job.id for job in leased}:
            self.scheduler.leave(missed)
        for job in leased:
            with self._failing_alone(job.id), metrics.STAGE_SECONDS.labels("encode").time():
                inputs = {role: self.files.read(digest) for role, digest in job.inputs.items()}
                row = self.pipeline.prepare(job.id, job.request, inputs)
                row.client, row.priority = job.client, job.priority
                row.created_at, row.deadline_at = job.created_at, job.deadline_at
                self._enter(job, row)

    def _enter(self, job: Job, row: DenoiseRow) -> None:
        self._leave(job.id)  # still seated if its lease ran out here and it was leased anew in the same turn
        self.scheduler.admit(row)
        self._running[job.id] = _Running(job, time.monotonic())
        metrics.JOBS_RUNNING.set(len(self._running))

    def _leave(self, job_id: str) -> None:
        self.scheduler.leave(job_id)
        self._running.pop(job_id, None)
        metrics.JOBS_RUNNING.set(len(self._running))

    def _advance(self, batch: Sequence[DenoiseRow]) -> list[DenoiseRow]:
        """One engine call for all, or one each if it fails, so that only the row that breaks it is lost.

        Returns the rows that are still well.
        """
        together = True
        try:
            self._call_engine(batch)
        except Exception:
            logger.exception("an engine call with %s videos failed, each is tried alone", len(batch))
            together = False
        well: list[DenoiseRow] = []
        for row in batch:
            with self._failing_alone(row.job_id):
                if not together:
                    self._call_engine([row])
                row.require_finite()
                well.append(row)
        return well

    def _call_engine(self, batch: Sequence[DenoiseRow]) -> None:
        metrics.DENOISE_BATCH_ROWS.observe(sum(row.rows for row in batch))
        began = time.perf_counter()
        with metrics.DENOISE_STEP_SECONDS.time():
            self.pipeline.advance(batch)
        self.scheduler.observe(batch, time.perf_counter() - began)

    def _deliver(self, row: DenoiseRow) -> None:
        running = self._running[row.job_id]
        metrics.STAGE_SECONDS.labels("denoise").observe(time.monotonic() - running.since)
        with self._failing_alone(row.job_id):
            with metrics.STAGE_SECONDS.labels("decode").time():
                frames = self.pipeline.decode(row)
            with metrics.STAGE_SECONDS.labels("store").time():
                artifacts = self._keep(frames, row.request.fps)
            if self.jobs.complete(
                row.job_id,
                self.owner,
                artifacts,
                engine=row.engine,
                retention_s=self.settings.retention_s,
            ):
                seconds = time.time() - running.job.created_at
                metrics.JOBS_TOTAL.labels("completed").inc()
                metrics.JOB_SECONDS.observe(seconds)
                logger.info("job %s completed after %.1f s", row.job_id, seconds)
        self._leave(row.job_id)

    def _keep(self, frames: Clip, fps: int) -> dict[str, str]:
        """Variant -> digest of what the client can download."""
        with tempfile.TemporaryDirectory(prefix="stiv-video-") as name:
            folder = Path(name)
            media.write_mp4(folder / "video", frames, fps)
            (folder / "thumbnail").write_bytes(media.thumbnail(frames))
            (folder / "spritesheet").write_bytes(media.spritesheet(frames))
            return {path.name: self.files.keep(path) for path in sorted(folder.iterdir())}

    def _tell_progress(self) -> None:
        if self.scheduler.rows and time.monotonic() - self._told_at >= self.settings.progress_every_s:
            self._told_at = time.monotonic()
            self.jobs.heartbeat(self.owner, {row.job_id: Beat(row.progress) for row in self.scheduler.rows})

    @contextmanager
    def _failing_alone(self, job_id: str) -> Generator[None, None, None]:
        """What goes wrong inside fails this one job: its row leaves, the others never notice."""
        with bound(job_id=job_id):
            try:
                yield
            except Exception as error:
                logger.exception("job %s failed", job_id)
                self._leave(job_id)
                code, message = _explain(error)
                if self.jobs.fail(job_id, self.owner, code=code, message=message):
                    metrics.JOBS_TOTAL.labels("failed").inc()


def _explain(error: Exception) -> tuple[str, str]:
    """What the client is told; the rest is in the log."""
    if isinstance(error, Diverged):
        return (
            "generation_diverged",
            "the video's latents left the range of numbers; use a smaller guidance_scale or another seed",
        )
    return "internal_error", "the server failed while it made this video; its log has the cause under the video's id"
