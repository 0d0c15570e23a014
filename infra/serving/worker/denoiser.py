"""The engine's loop: the rows of the scheduler's choice advance one denoise step a call, and nothing else happens here.

It owns the calls, what is done when one fails, and how long the engine stood still; it knows nothing of databases,
files or frames: whoever fills and empties the floor does.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from infra.serving.pipeline import DenoiseRow
from infra.serving.scheduling.scheduler import Scheduler
from infra.serving.worker.ending import Endings
from infra.serving.worker.held import HeldJob, Standing
from monitoring import metrics

logger = logging.getLogger(__name__)


class Floor:
    """The scheduler, which its users lock, and the bell that tells the engine of a new row."""

    def __init__(self, scheduler: Scheduler[DenoiseRow]) -> None:
        self.scheduler = scheduler
        self.lock = threading.Lock()
        self.bell = threading.Event()

    def enter(self, row: DenoiseRow) -> None:
        with self.lock:
            if any(seated.job_id == row.job_id for seated in self.scheduler.rows):
                self.scheduler.leave(row.job_id)  # its lease ran out here, and it was leased anew at once
            self.scheduler.admit(row)
        self.bell.set()

    def leave(self, job_id: str) -> None:
        with self.lock:
            self.scheduler.leave(job_id)

    def observe_delivery(self, row: DenoiseRow, seconds: float) -> None:
        """The row's video can be had, so long after its last step."""
        with self.lock:
            cost = self.scheduler.cost
            cost.observe_delivery(row.cost_key, seconds)
            alone_s = row.num_steps * cost.seconds(row.cost_key, row.rows) + seconds
        metrics.JOB_STRETCH_RATIO.observe((time.time() - row.created_at) / alone_s)

    @property
    def rows(self) -> list[DenoiseRow]:
        with self.lock:
            return self.scheduler.rows


class Denoiser:
    def __init__(
        self, floor: Floor, endings: Endings, on_done: Callable[[HeldJob], None], on_room: Callable[[], None]
    ) -> None:
        """`on_done` is given a job after its last step, `on_room` is called when one step is left; neither may wait."""
        self.floor = floor
        self.endings = endings
        self.on_done = on_done
        self.on_room = on_room
        self._since = time.perf_counter()

    def turn(self) -> bool:
        """Advance one group one step; False if there was nothing to do."""
        batch = self._next_batch()
        if not batch:
            self.count_time("starved" if len(self.endings.held) else "idle")
            return False
        self.count_time("between")
        well = self._advance(batch)
        self.count_time("denoise")
        for held in well:
            self._after_step(held)
        return True

    def count_time(self, state: str) -> None:
        """Since the last count the engine was in that state."""
        now = time.perf_counter()
        metrics.ENGINE_SECONDS_TOTAL.labels(state).inc(now - self._since)
        self._since = now

    def _next_batch(self) -> list[HeldJob]:
        """Cancelled rows leave before the next call; so do rows that another worker took over."""
        with self.floor.lock:
            for row in self.floor.scheduler.rows:
                held = self.endings.held.find(row.job_id)
                if held is None or held.row is not row:
                    logger.info("job %s left at step %s of %s", row.job_id, row.step, row.num_steps)
                    self.floor.scheduler.leave(row.job_id)
            rows = self.floor.scheduler.next_batch()
            found = [self.endings.held.find(row.job_id) for row in rows]
        return [held for held in found if held is not None]

    def _advance(self, batch: Sequence[HeldJob]) -> list[HeldJob]:
        """One engine call for all, or one each if it fails, so that only the row that breaks it is lost."""
        before = {held.job.id: _row(held).latents for held in batch}
        together = True
        try:
            self._call_engine(batch)
        except Exception:
            logger.exception("an engine call with %s videos failed, each is tried alone", len(batch))
            together = False
        well: list[HeldJob] = []
        for held in batch:
            row = _row(held)
            with self.endings.failing_alone(row.job_id):
                if not together:
                    self._call_engine([held])
                row.require_finite()
                held.standing = Standing(row.step, row.latents, before[row.job_id])
                well.append(held)
            if held not in well:
                self.floor.leave(row.job_id)
        return well

    def _call_engine(self, batch: Sequence[HeldJob]) -> None:
        rows = [_row(held) for held in batch]
        width = sum(row.rows for row in rows)
        metrics.DENOISE_BATCH_ROWS.observe(width)
        metrics.DENOISE_BATCH_OCCUPANCY_RATIO.observe(width / self.floor.scheduler.rows_of(rows[0].cost_key))
        began = time.perf_counter()
        with metrics.DENOISE_STEP_SECONDS.time():
            batch[0].pipeline.advance(rows)
        with self.floor.lock:
            self.floor.scheduler.observe(rows, time.perf_counter() - began)

    def _after_step(self, held: HeldJob) -> None:
        row = _row(held)
        if row.steps_left == 1:
            self.on_room()  # the next job is made ready meanwhile
        if row.done:
            held.drawn_at = time.monotonic()
            self.floor.leave(row.job_id)
            metrics.STAGE_SECONDS.labels("denoise").observe(time.monotonic() - held.since)
            self.on_done(held)


def _row(held: HeldJob) -> DenoiseRow:
    assert held.row is not None, "only prepared jobs are on the floor"
    return held.row
