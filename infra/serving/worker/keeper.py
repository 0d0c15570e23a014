"""Signs of life: leases are kept, progress, previews and latents are published, cancelled jobs are noticed.

It owns what the database is told of running jobs and how often, and the tidying of what is over; it knows nothing of
how jobs advance. It runs beside the engine, so a slow database never holds a denoise step up.
"""

import logging
import time

from infra.serving import media
from infra.serving.jobs.files import JobFiles
from infra.serving.jobs.table import Beat, KeptLatents
from infra.serving.settings import ServerSettings
from infra.serving.worker.denoiser import Floor
from infra.serving.worker.ending import Endings
from infra.serving.worker.held import HeldJob
from monitoring import metrics

logger = logging.getLogger(__name__)

TIDY_EVERY_S = 60.0
SAY_EVERY_S = 1.0


class Keeper:
    def __init__(self, endings: Endings, files: JobFiles, floor: Floor, settings: ServerSettings) -> None:
        self.endings = endings
        self.jobs = endings.jobs
        self.files = files
        self.floor = floor
        self.settings = settings
        self._tidied_at = time.monotonic()
        self._said_at = -SAY_EVERY_S

    def turn(self) -> None:
        self.drop_lost()
        self._tell()
        self.keep_latents(every=self.settings.keep_latents_steps)
        if time.monotonic() - self._tidied_at >= TIDY_EVERY_S:
            self._tidied_at = time.monotonic()
            self.tidy()

    def drop_lost(self) -> None:
        """Jobs that were cancelled or taken over leave; leases whose answer was lost are given back."""
        known = [held.job.id for held in self.endings.held.all()]
        leased = self.jobs.held(self.endings.owner)
        for job_id in known:
            if job_id not in leased:
                logger.info("job %s was cancelled or taken over", job_id)
                self.endings.held.drop(job_id)
        strays = self.endings.held.strays(leased)
        if strays:
            self.jobs.release(self.endings.owner, strays)

    def keep_latents(self, *, every: int) -> None:
        """Of rows that came forward by `every` steps since theirs were kept last.

        Not where steps are foretold: what a row remembers is not kept, and another video would come of it.
        """
        due: dict[str, KeptLatents] = {}
        for held in self.endings.held.all():
            standing = held.standing
            if held.pipeline.recipe.sampling.step_cache:
                continue
            if standing is not None and held.row is not None and standing.step - held.kept_step >= every:
                due[held.job.id] = held.row.kept(standing.step, standing.latents)
        if not due:
            return
        with metrics.STAGE_SECONDS.labels("keep").time():
            self.jobs.keep_latents(self.endings.owner, due)
        for held in self.endings.held.all():
            if held.job.id in due:
                held.kept_step = due[held.job.id].step

    def tidy(self) -> None:
        """Files that nobody needs and jobs that ended long ago are removed for good."""
        deleted = self.files.delete_expired()
        forgotten = self.jobs.forget(ended_before=time.time() - self.settings.history_s)
        if deleted or forgotten:
            logger.info("%s files that no job needs were deleted, %s old jobs forgotten", deleted, forgotten)

    def _tell(self) -> None:
        """What the outlook says is published too: any replica answers for what this one will do."""
        with self.floor.lock:
            outlook = self.floor.scheduler.outlook()
        done_at = outlook.estimates(())
        beats = {
            held.job.id: Beat(held.progress, done_at.get(held.job.id), self._preview(held))
            for held in self.endings.held.all()
        }
        if beats:
            self.jobs.heartbeat(self.endings.owner, beats)
        if time.monotonic() - self._said_at >= SAY_EVERY_S:
            self._said_at = time.monotonic()
            self.jobs.publish_state(self.endings.owner, outlook.to_json())

    def _preview(self, held: HeldJob) -> bytes | None:
        """Of one frame, now and then; never where pictures must be judged before they are shown."""
        row, standing, now = held.row, held.standing, time.monotonic()
        if self.settings.moderates:
            return None
        if row is None or standing is None or row.done or now - held.previewed_at < self.settings.preview_every_s:
            return None
        held.previewed_at = now
        with self.endings.failing_alone(held.job.id):  # what cannot be decoded now cannot be at the end either
            return media.thumbnail(held.pipeline.preview(row, standing.step, standing.latents, standing.before))
        return None
