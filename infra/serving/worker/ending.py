"""How a job ends badly: alone, with an error that its client understands, whatever the database does meanwhile.

It owns that border and the words of errors; it knows nothing of the stages that jobs fail in.
"""

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager

from infra.serving.jobs.store import JobStore
from infra.serving.pipeline import Diverged
from infra.serving.safety.moderation import ModerationUnavailable, Refused
from infra.serving.worker.held import HeldJobs
from infra.serving.worker.outage import GivenUp, through_outages
from infra.store.artifacts import ArtifactCorrupt, ArtifactNotFound
from monitoring import metrics
from monitoring.logs import bound

logger = logging.getLogger(__name__)


class Endings:
    def __init__(self, jobs: JobStore, owner: str, held: HeldJobs, is_stopping: Callable[[], bool]) -> None:
        self.jobs = jobs
        self.owner = owner
        self.held = held
        self.is_stopping = is_stopping

    def wanted(self, job_id: str) -> bool:
        return self.held.find(job_id) is not None and not self.is_stopping()

    @contextmanager
    def failing_alone(self, job_id: str) -> Generator[None, None, None]:
        """What goes wrong inside fails this one job; the others never notice."""
        with bound(job_id=job_id):
            try:
                yield
            except GivenUp:
                logger.info("job %s is left as it is: it was cancelled, or this worker stops", job_id)
            except Refused as refusal:
                logger.warning("job %s is refused by the moderation: %s", job_id, refusal)
                self._fail(job_id, refusal)
            except Exception as error:
                logger.exception("job %s failed", job_id)
                self._fail(job_id, error)

    def _fail(self, job_id: str, error: Exception) -> None:
        """A canary fails nobody: what it cannot make, stable makes, or fails for good."""
        code, message = _explain(error)
        outcome = "failed" if self.jobs.track == "stable" else "handed_over"

        def fail() -> bool:
            if outcome == "handed_over":
                return self.jobs.hand_over(job_id, self.owner)
            return self.jobs.fail(job_id, self.owner, code=code, message=message)

        try:
            failed = through_outages(fail, wanted=lambda: self.wanted(job_id), what=f"failing job {job_id}")
        except GivenUp:
            return
        self.held.drop(job_id)
        if failed:
            metrics.JOBS_TOTAL.labels(outcome).inc()
            metrics.JOB_FAILURES_TOTAL.labels(code).inc()


def _explain(error: Exception) -> tuple[str, str]:
    """What the client is told; the rest is in the log."""
    if isinstance(error, Diverged):
        return (
            "generation_diverged",
            "the video's latents left the range of numbers; use a smaller guidance_scale or another seed",
        )
    if isinstance(error, Refused):
        return "content_policy_violation", f"the finished video is refused by this server's moderation: {error}"
    if isinstance(error, ModerationUnavailable):
        return (
            "moderation_unavailable",
            "the moderation of this server did not answer, so the finished video is not shown; send the request again",
        )
    if isinstance(error, ArtifactNotFound | ArtifactCorrupt):
        return "input_lost", "the uploaded image or video is no longer there; send the request again"
    return "internal_error", "the server failed while it made this video; its log has the cause under the video's id"
