"""A stage's ranks kept going: started again whenever they are killed or hang, for as long as that helps.

It owns what counts as a disruption and what as a crash, and when to give up. How ranks run is the gang's, whether they
hang is `hang`'s.
"""

import logging
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.launch.hang import Patience, Watch, cause, question
from infra.launch.incident import Incident, IncidentKind, keep
from infra.launch.local import (
    Failure,
    GangFailed,
    GangStatus,
    LocalGang,
    StageLaunch,
    end_processes,
    tail_of,
)
from model.training.run import exclusive
from monitoring import metrics
from monitoring.goodput import announce

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
HUNG_GRACE_SECONDS = 5.0
"""For ranks that were only slow to save all the same."""
CONTROLLER_LOCK = "controller.lock"


@dataclass(slots=True, frozen=True)
class Restarts:
    """How often, and how soon, ranks start again."""

    without_progress: int = 3
    """Incidents in a row without a step further than ever before that end it; with progress there is no bound."""
    first_delay: float = 1.0
    longest_delay: float = 60.0

    def delay(self, in_a_row: int) -> float:
        """Seconds to wait after this many incidents in a row without progress."""
        return min(self.longest_delay, self.first_delay * 2.0 ** min(in_a_row, 30))


def supervise(
    launch: StageLaunch,
    *,
    on_poll: Callable[[], None] = lambda: None,
    patience: Patience | None = None,
    restarts: Restarts | None = None,
) -> GangStatus:
    """Run a stage's ranks to their end, from the run folder's latest checkpoint each time; what befalls them is kept.

    A rank that is killed, stopped from outside or hangs is a disruption: all ranks start again. A rank that ends in
    an error of its own is a crash, and is not tried again. What an earlier launch, whose controller died, left running
    is asked to save and stop first. SIGTERM to this process, where this is its main thread, stops the ranks after a
    checkpoint.

    Returns:
        `succeeded`, or `stopped` where this process was asked to stop.

    Raises:
        GangFailed: a crash, or too many disruptions in a row without progress. RunBusy: another controller has the run.
    """
    with (
        exclusive(launch.folders.run, name=_lock_of(launch)),
        _stop_requests() as stop,
    ):
        return _Supervisor(launch, on_poll, patience or Patience(), restarts or Restarts(), stop).run()


def _lock_of(launch: StageLaunch) -> str:
    """Every host has its own controller."""
    number = 0 if launch.host is None else launch.host.index
    return f"controller-{number}.lock" if number else CONTROLLER_LOCK


@dataclass(slots=True)
class _Supervisor:
    launch: StageLaunch
    on_poll: Callable[[], None]
    patience: Patience
    restarts: Restarts
    stop: threading.Event

    def run(self) -> GangStatus:
        furthest, in_a_row = 0, 0
        kept: list[Path] = []
        while not self.stop.is_set():
            end_processes(self.launch.folders)
            if self.launch.host is None or self.launch.host.index == 0:
                announce(self.launch.folders.goodput, "init")
            end = self._attempt()
            if not isinstance(end, Incident):
                return end
            kept.append(self._keep(end))
            in_a_row = 0 if end.step > furthest else in_a_row + 1
            furthest = max(furthest, end.step)
            if end.kind == "crashed" or self.launch.host is not None:  # one host of several cannot start again alone
                raise self._failed(f"{end.why} (kept in {kept[-1]})", end, kept)
            if in_a_row >= self.restarts.without_progress:
                names = ", ".join(path.name for path in kept[-in_a_row:])
                why = f"{in_a_row} times in a row without getting beyond step {furthest}, the ranks were lost; at last:"
                raise self._failed(f"{why} {end.why} (kept in {self.launch.folders.incidents}: {names})", end, kept)
            delay = self.restarts.delay(in_a_row)
            logger.warning("%s; the ranks start again in %.1f s (kept in %s)", end.why, delay, kept[-1])
            self.stop.wait(delay)
        return "stopped"

    def _attempt(self) -> GangStatus | Incident:
        """One gang from its start to its end, or to what befell it."""
        watch = Watch(self.launch.folders, self.patience)
        gang = LocalGang.start(self.launch)
        try:
            while (status := gang.wait(POLL_SECONDS)) == "running" and not self.stop.is_set():
                self.on_poll()
                watch.look(gang.ranks())
                if watch.hangs():
                    return _hung(gang, watch)
            if status == "running":
                status = gang.terminate(self.launch.grace)
        except GangFailed as error:
            return self._ended(gang, watch, "killed" if error.exit_code < 0 else "crashed")
        except BaseException:
            gang.terminate(self.launch.grace)
            raise
        if self.stop.is_set():
            return "succeeded" if status == "succeeded" else "stopped"
        return status if status == "succeeded" else self._ended(gang, watch, "stopped")

    def _ended(self, gang: LocalGang, watch: Watch, kind: IncidentKind) -> Incident:
        """What befell ranks that are gone."""
        watch.close(self.launch.recipe.training.world_size)
        failure = gang.failure()
        return Incident(
            kind=kind,
            why=f"{failure}: a signal from outside told it to stop" if kind == "stopped" else str(failure),
            ranks=() if failure.rank is None else (failure.rank,),
            exit_code=failure.exit_code,
            step=watch.furthest_step,
            log=tail_of(gang.launch.log_of(failure.rank)),
        )

    def _keep(self, incident: Incident) -> Path:
        metrics.STAGE_INCIDENTS_TOTAL.labels(stage=self.launch.recipe.name, kind=incident.kind).inc()
        return keep(self.launch.folders, incident)

    def _failed(self, why: str, incident: Incident, kept: list[Path]) -> GangFailed:
        failure = Failure(incident.ranks[0] if incident.ranks else None, incident.exit_code)
        log = self.launch.log_of(failure.rank)
        return GangFailed(f"{why}; the end of {log}:\n{incident.log}", failure, log, kept)


def _hung(gang: LocalGang, watch: Watch) -> Incident:
    """Question the ranks, then end them; one that was only stopped is awake by now, and they may yet save."""
    living = gang.ranks()
    logs = {rank: tail_of(gang.launch.log_of(rank)) for rank in (None, *living)}
    reports = question(living, watch)
    ranks, why = cause(reports)
    gang.terminate(HUNG_GRACE_SECONDS)
    watch.close(gang.launch.recipe.training.world_size)
    longest = max(watch.silent.values(), default=watch.patience.start)
    return Incident(
        kind="hung",
        why=f"no rank gave a sign of life for {longest:.0f} s: {why}",
        ranks=ranks,
        exit_code=-signal.SIGKILL,
        step=watch.furthest_step,
        log=logs[ranks[0] if ranks else None],
        reports=tuple(reports),
    )


@contextmanager
def _stop_requests() -> Generator[threading.Event]:
    """Set by SIGTERM while the block runs; signals are the main thread's, so elsewhere it is never set."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
