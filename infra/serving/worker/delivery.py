"""From finished latents to a video that can be downloaded: decoded, encoded and stored beside the engine.

It owns these stages and their threads; it knows nothing of how latents came to be. What waits to be decoded is latents,
which are small; no more than a few clips are decoded ahead of the encoders.
"""

import logging
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from infra.serving import media
from infra.serving.jobs.files import JobFiles
from infra.serving.jobs.table import Job
from infra.serving.limits import work_class
from infra.serving.pipeline import DenoiseRow
from infra.serving.provenance import Provenance
from infra.serving.safety.moderation import open_moderator, through_silence
from infra.serving.settings import ServerSettings
from infra.serving.worker.ending import Endings
from infra.serving.worker.held import HeldJob
from infra.serving.worker.outage import through_outages
from model.generation import Clip
from monitoring import metrics

logger = logging.getLogger(__name__)

Done = TypeVar("Done")

ENCODERS = 2
CLIPS_AHEAD = 2
JUDGED_FRAMES = 4
"""Of a finished video, evenly from its first to its last, where a moderator is asked."""


class Delivery:
    def __init__(
        self, endings: Endings, files: JobFiles, settings: ServerSettings, observe: Callable[[DenoiseRow, float], None]
    ) -> None:
        """`observe` is told of a row whose video can be had, and of the seconds since its last step."""
        self.endings = endings
        self.files = files
        self.settings = settings
        self.observe = observe
        self.moderator = open_moderator(settings)
        self._finished: queue.SimpleQueue[HeldJob | None] = queue.SimpleQueue()
        self._decoded: queue.Queue[tuple[HeldJob, Clip] | None] = queue.Queue(CLIPS_AHEAD)
        self._threads = [
            threading.Thread(target=self._decode_all, name="stiv-decode", daemon=True),
            *(threading.Thread(target=self._encode_all, name=f"stiv-encode-{n}", daemon=True) for n in range(ENCODERS)),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def take(self, held: HeldJob) -> None:
        """A job after its last denoise step; returns at once."""
        self._finished.put(held)

    def stop(self, deadline: float) -> None:
        """Deliver what was taken, until then (monotonic)."""
        self._finished.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _decode_all(self) -> None:
        while (held := self._finished.get()) is not None:
            with self.endings.failing_alone(held.job.id):
                self._decode(held)
        for _ in range(ENCODERS):
            self._decoded.put(None)

    def _decode(self, held: HeldJob) -> None:
        if held.row is None or self.endings.held.find(held.job.id) is not held:
            return
        with metrics.STAGE_SECONDS.labels("decode").time():
            clip = held.pipeline.decode(held.row)
        self._decoded.put((held, clip))

    def _encode_all(self) -> None:
        while (decoded := self._decoded.get()) is not None:
            held, clip = decoded
            with self.endings.failing_alone(held.job.id):
                self._deliver(held, clip)

    def _deliver(self, held: HeldJob, clip: Clip) -> None:
        self._moderate(clip)
        request = held.job.request
        provenance = Provenance(
            held.job.model, held.pipeline.digest, request.prompt if self.settings.embed_prompt else None
        )
        with tempfile.TemporaryDirectory(prefix="stiv-video-") as name:
            folder = Path(name)
            with metrics.STAGE_SECONDS.labels("mp4").time():
                media.write_mp4(folder / "video", clip, request.fps, provenance=provenance)
                (folder / "thumbnail").write_bytes(media.thumbnail(clip, provenance=provenance))
                (folder / "spritesheet").write_bytes(media.spritesheet(clip, provenance=provenance))
            with metrics.STAGE_SECONDS.labels("store").time():
                files = sorted(folder.iterdir())
                artifacts = self._trying(held, lambda: {path.name: self.files.keep(path) for path in files})
        completed = self._trying(held, lambda: self._complete(held, artifacts))
        self.endings.held.drop(held.job.id)
        if completed:
            if held.row is not None and held.drawn_at is not None:
                self.observe(held.row, time.monotonic() - held.drawn_at)
            seconds = _count(held.job, clip)
            logger.info("job %s completed after %.1f s", held.job.id, seconds)

    def _moderate(self, clip: Clip) -> None:
        """Refused or ModerationUnavailable, and nothing of the video is kept."""
        moderator = self.moderator
        if moderator is None:
            return
        with metrics.STAGE_SECONDS.labels("moderate").time():
            count = min(JUDGED_FRAMES, len(clip))
            drawn = [round(place * (len(clip) - 1) / max(1, count - 1)) for place in range(count)]
            pictures = [media.png(clip[index : index + 1]) for index in drawn]
            through_silence(lambda: moderator.check(images=pictures))

    def _complete(self, held: HeldJob, artifacts: dict[str, str]) -> bool:
        return self.endings.jobs.complete(
            held.job.id,
            self.endings.owner,
            artifacts,
            engine=held.pipeline.digest,
            retention_s=self.settings.retention_s,
        )

    def _trying(self, held: HeldJob, work: Callable[[], Done]) -> Done:
        job_id = held.job.id
        return through_outages(work, wanted=lambda: self.endings.wanted(job_id), what=f"delivering job {job_id}")


def _count(job: Job, clip: Clip) -> float:
    """Measure a delivered video; the seconds since its job was created."""
    now, work = time.time(), work_class(job.request)
    seconds = now - job.created_at
    metrics.JOBS_TOTAL.labels("completed").inc()
    metrics.JOB_SECONDS.labels(work).observe(seconds)
    metrics.JOB_RUN_SECONDS.labels(work).observe(now - (job.started_at or now))
    metrics.VIDEO_SECONDS_TOTAL.inc(len(clip) / job.request.fps)
    metrics.FRAMES_TOTAL.inc(len(clip))
    metrics.BLANK_FRAMES_TOTAL.inc(media.blank_frames(clip))
    if job.deadline_at is not None and now > job.deadline_at:
        metrics.DEADLINE_MISSES_TOTAL.inc()
    return seconds
