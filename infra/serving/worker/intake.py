"""From the queue to the engine: jobs are chosen, leased, their texts and images encoded, and given to the scheduler.

It owns that order and the taking back of lost workers' jobs; it knows nothing of how rows advance.
"""

import logging
import time
from collections.abc import Callable

from infra.serving.jobs.files import JobFiles
from infra.serving.jobs.table import Job
from infra.serving.pipeline import DenoiseRow, VideoPipeline
from infra.serving.settings import ServerSettings
from infra.serving.worker.denoiser import Floor
from infra.serving.worker.ending import Endings
from infra.serving.worker.held import HeldJob
from infra.serving.worker.outage import through_outages
from monitoring import metrics

logger = logging.getLogger(__name__)

RECOVER_EVERY_S = 5.0
DELIVERIES_AHEAD = 8
"""Finished videos that may wait for decoding and encoding before no more jobs are taken."""


class Intake:
    def __init__(
        self,
        endings: Endings,
        files: JobFiles,
        floor: Floor,
        pipeline: Callable[[], VideoPipeline],
        on_done: Callable[[HeldJob], None],
        settings: ServerSettings,
    ) -> None:
        """`pipeline` is the one that new jobs begin with; `on_done` is given jobs that only want delivery."""
        self.endings = endings
        self.jobs = endings.jobs
        self.files = files
        self.floor = floor
        self.pipeline = pipeline
        self.settings = settings
        self.on_done = on_done
        self._recovered_at = -RECOVER_EVERY_S

    def turn(self) -> bool:
        """Take back what lost workers left, and take in what there is room for; False if nothing came."""
        self._recover()
        with self.floor.lock:
            limit = self.floor.scheduler.free_rows
        resident = len(self.floor.scheduler.rows)
        limit = min(limit, resident + limit + DELIVERIES_AHEAD - len(self.endings.held))
        if limit <= 0:
            return False
        waiting = self.jobs.waiting(self.settings.max_queued)
        with self.floor.lock:
            ids = self.floor.scheduler.choose(waiting, limit)
        self.endings.held.ask(ids)
        try:
            leased = self.jobs.lease(self.endings.owner, ids)
            pipeline = self.pipeline()
            for job in leased:
                self.endings.held.hold(HeldJob(job, pipeline, kept_step=job.kept_step))
                if job.attempts == 1:
                    metrics.JOB_QUEUE_SECONDS.observe(time.time() - job.created_at)
        except BaseException:
            self._unchoose(ids)
            raise
        finally:
            self.endings.held.ask(())
        self._unchoose(set(ids) - {job.id for job in leased})
        for job in leased:
            with self.endings.failing_alone(job.id), metrics.STAGE_SECONDS.labels("encode").time():
                self._prepare(job)
            if self.endings.held.find(job.id) is None:
                self._unchoose({job.id})
        return bool(leased)

    def _recover(self) -> None:
        if time.monotonic() - self._recovered_at < RECOVER_EVERY_S:
            return
        found = self.jobs.requeue_abandoned(lease_s=self.settings.lease_s)
        if self.jobs.track == "stable":
            found += self.jobs.hand_over_waiting(older_than_s=self.settings.lease_s)
        self._recovered_at = time.monotonic()
        if found:
            logger.warning("%s jobs of lost workers were taken back", found)

    def _unchoose(self, ids: set[str] | list[str]) -> None:
        with self.floor.lock:
            for job_id in ids:
                self.floor.scheduler.leave(job_id)

    def _prepare(self, job: Job) -> None:
        held = self.endings.held.find(job.id)
        if held is None:
            return

        def read() -> dict[str, bytes]:
            return {role: self.files.read(digest) for role, digest in job.inputs.items()}

        inputs = through_outages(read, wanted=lambda: self.endings.wanted(job.id), what=f"reading inputs of {job.id}")
        row = held.pipeline.prepare(job.id, job.request, inputs)
        row.client, row.priority, row.deadline_at, row.created_at = (
            job.client,
            job.priority,
            job.deadline_at,
            job.created_at,
        )
        if job.kept_step:
            self._go_on(job, row)
        held.row = row
        if row.done:
            self.floor.leave(job.id)
            self.on_done(held)
        else:
            self.floor.enter(row)

    def _go_on(self, job: Job, row: DenoiseRow) -> None:
        """From the latents that the last worker kept, if they are of the same engine."""
        kept = through_outages(
            lambda: self.jobs.latents(job.id),
            wanted=lambda: self.endings.wanted(job.id),
            what=f"reading latents of {job.id}",
        )
        if kept is not None and row.resume(kept):
            logger.info("job %s goes on after step %s of %s", job.id, row.step, row.num_steps)
        else:
            logger.info("job %s begins anew: its latents are another engine's", job.id)
