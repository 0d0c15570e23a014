"""The worker of a server process: threads that take jobs in, advance them all in one batch, deliver and keep them.

It owns the threads, their start after a proven warm-up, the drain at the end and the swap of engines; it knows nothing
of HTTP. Each stage has a module of its own; the scheduler says who shares a call, the job store remembers.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

from infra.serving.golden import check_golden
from infra.serving.jobs.files import JobFiles
from infra.serving.jobs.owner import new_owner
from infra.serving.jobs.store import JobStore
from infra.serving.limits import ServingLimits
from infra.serving.pipeline import VideoPipeline
from infra.serving.scheduling.cost import CostModel
from infra.serving.scheduling.scheduler import Scheduler
from infra.serving.settings import ServerSettings
from infra.serving.worker.delivery import Delivery
from infra.serving.worker.denoiser import Denoiser, Floor
from infra.serving.worker.ending import Endings
from infra.serving.worker.held import HeldJobs
from infra.serving.worker.intake import Intake
from infra.serving.worker.keeper import Keeper
from infra.serving.worker.outage import OUTAGE
from monitoring import metrics

logger = logging.getLogger(__name__)

WorkerState = Literal["warming_up", "ready", "draining", "stopped", "failed"]
PAUSE_AFTER_ERROR_S = 1.0
HAND_BACK_S = 5.0
"""How long a stopping worker tries to hand its jobs back to a database that does not answer."""


class Worker:
    def __init__(self, jobs: JobStore, pipeline: VideoPipeline, files: JobFiles, settings: ServerSettings) -> None:
        self.jobs = jobs
        self.files = files
        self.pipeline = pipeline
        """Of new jobs; running ones end with the one that they began with."""
        self.settings = settings
        self.state: WorkerState = "warming_up"
        self._drain, self._leave, self._wake = threading.Event(), threading.Event(), threading.Event()
        self.held = HeldJobs()
        self.endings = Endings(jobs, new_owner(), self.held, self._leave.is_set)
        self.floor = Floor(Scheduler(2 * settings.max_rows, CostModel()))  # max_rows: videos, of two engine rows each
        self.delivery = Delivery(self.endings, files, settings, self.floor.observe_delivery)
        self.denoiser = Denoiser(self.floor, self.endings, self.delivery.take, self.wake)
        self.keeper = Keeper(self.endings, files, self.floor, settings)
        self.intake = Intake(self.endings, files, self.floor, lambda: self.pipeline, self.delivery.take, settings)
        self._threads = {
            name: threading.Thread(target=work, name=f"stiv-{name}", daemon=True)
            for name, work in (("engine", self._denoise), ("intake", self._take_in), ("keeper", self._keep))
        }

    def start(self) -> None:
        """Warm up, then take jobs; `state` says how far it is."""
        self._threads["engine"].start()

    def wake(self) -> None:
        """A job was created in this process, or there is room for one: no need to wait for the next poll."""
        self._wake.set()

    def cancel(self, job_id: str) -> None:
        """A job was deleted in this process; its row leaves before the next step."""
        self.held.drop(job_id)

    def drain(self) -> None:
        """Take no new job from now on."""
        if self.state != "failed":
            self.state = "draining"
        self._drain.set()
        self._wake.set()
        self.floor.bell.set()

    def stop(self) -> None:
        """Finish running jobs for `drain_s`, hand the others back to the queue with their latents."""
        deadline = time.monotonic() + self.settings.drain_s
        self.drain()
        for name in ("engine", "intake"):
            if self._threads[name].ident is not None:
                self._threads[name].join(max(0.0, deadline - time.monotonic()))
        if self._threads["keeper"].ident is not None:
            self.delivery.stop(deadline)
        self._leave.set()
        self.floor.bell.set()
        for thread in self._threads.values():
            if thread.ident is not None:
                thread.join()
        self._hand_back()
        self.state = "stopped"

    def swap(self, load: Callable[[], VideoPipeline]) -> None:
        """Begin new jobs with another engine; running ones end with theirs. Both are in memory until then.

        Raises:
            ValueError: it serves other requests than this one. GoldenMismatch: it draws wrong. The old one stays.
        """
        new = load()
        _require_same_service(self.pipeline, new)
        check_golden(new)
        old, self.pipeline = self.pipeline, new
        _show(new)
        logger.info("new videos are made by engine %s, it was %s", new.digest[:12], old.digest[:12])

    def _denoise(self) -> None:
        """The engine's thread: nothing else than the engine is waited for here."""
        try:
            with metrics.STAGE_SECONDS.labels("warm_up").time():
                check_golden(self.pipeline)
        except Exception:
            logger.exception("the warm-up failed: this worker takes no job")
            self.state = "failed"
            return
        _show(self.pipeline)
        self.delivery.start()
        self._threads["intake"].start()
        self._threads["keeper"].start()
        if not self._drain.is_set():
            self.state = "ready"
        logger.info("worker %s takes jobs, up to %s at a time", self.endings.owner, self.settings.max_rows)
        while not self._leave.is_set():
            self.floor.bell.clear()
            if self.denoiser.turn():
                continue
            if self._drain.is_set() and not self._threads["intake"].is_alive() and not self.floor.rows:
                return
            self.floor.bell.wait(self.settings.idle_poll_s)
            self.denoiser.count_time("starved" if len(self.held) else "idle")

    def _take_in(self) -> None:
        while not self._drain.is_set():
            self._wake.clear()
            if not self._through_outage(self.intake.turn):
                self._wake.wait(self.settings.idle_poll_s)
        self.floor.bell.set()

    def _keep(self) -> None:
        while not self._leave.wait(self.settings.progress_every_s):
            self._through_outage(self.keeper.turn)

    def _through_outage(self, turn: Callable[[], object]) -> object:
        """What the turn says, or nothing if the database or the store failed: the next turn tries again."""
        try:
            return turn()
        except OUTAGE as error:
            logger.warning(
                "the database or the store does not answer, next try in %s s: %s", PAUSE_AFTER_ERROR_S, error
            )
        except Exception:
            logger.exception("a turn of the worker failed, next one in %s s", PAUSE_AFTER_ERROR_S)
        self._leave.wait(PAUSE_AFTER_ERROR_S)
        return None

    def _hand_back(self) -> None:
        """Latents first, so that whoever leases a job again goes on from its last step."""
        deadline = time.monotonic() + HAND_BACK_S
        while True:
            try:
                self.keeper.keep_latents(every=1)
                count = self.jobs.release(self.endings.owner)
                if self.jobs.track != "stable":
                    count += self.jobs.hand_over_waiting()
                logger.info("worker %s stopped, %s jobs handed back to the queue", self.endings.owner, count)
                return
            except OUTAGE as error:
                if time.monotonic() > deadline:
                    logger.error("jobs could not be handed back, their leases will run out: %s", error)
                    return
                time.sleep(0.2)


def _require_same_service(old: VideoPipeline, new: VideoPipeline) -> None:
    """What waits was checked against the old one, so the new one must take it too."""
    if ServingLimits.of(old.recipe, old.profile) != ServingLimits.of(new.recipe, new.profile):
        raise ValueError(
            f"engine {new.digest[:12]} takes other shapes than the one that serves; start a server of its own for it"
        )
    for section in ("text", "vae", "tasks"):
        if getattr(old.recipe, section) != getattr(new.recipe, section):
            raise ValueError(
                f"engine {new.digest[:12]} is of a recipe with another '{section}'; start a server of its own for it"
            )


def _show(pipeline: VideoPipeline) -> None:
    kind, stage = type(pipeline.engine).__name__, pipeline.recipe.name
    metrics.set_info(metrics.ENGINE_INFO, engine=kind, stage=stage, digest=pipeline.digest[:12])
