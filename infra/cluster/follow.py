"""A gang followed to its end: how often it may start again, with how many nodes, and when it is given up.

It owns those decisions; it makes none that depends on what happened while nobody looked, so a controller that comes
after another decides the same.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from infra.cluster.diagnosis import Finding, diagnose
from infra.cluster.gang import ClusterGang
from infra.cluster.journal import GangJournal, Progress
from infra.cluster.request import Carried
from infra.cluster.state import FINAL, Standing
from infra.launch.local import Failure, GangFailed

logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0
STUCK_SECONDS = 30.0
"""What waiting will not mend ends it after so long; the first look at a pod may come before all is said."""


@dataclass(slots=True, frozen=True)
class Look:
    """What whoever watches is shown."""

    standing: Standing
    restarts: int
    """In all, of every JobSet that bore the name."""
    progress: Progress | None
    finding: Finding | None


@dataclass(slots=True)
class Follower:
    """Looks, judges and acts, once a call of `step`."""

    gang: ClusterGang
    journal: GangJournal
    poll_seconds: float = POLL_SECONDS
    stuck_seconds: float = STUCK_SECONDS
    _waiting_since: float | None = None
    _stuck_since: float | None = None
    _restarts_seen: int | None = None
    _carried: Carried = field(default_factory=Carried)

    def step(self) -> Look:
        """One look; GangFailed where the gang failed, was lost or is given up."""
        standing = self.gang.look(self.poll_seconds)
        self._carried = self.gang.carried() if self.gang.view.job_set is not None else self._carried
        progress = self.journal.progress()
        restarts = self._carried.restarts + standing.restarts
        finding = None
        if standing.state in ("pending", "starting", "restarting", "suspended"):
            nodes = self.gang.cluster_nodes()
            finding = diagnose(self.gang.request.cluster, self.gang.view.pods.values(), self.gang.events(), nodes)
        look = Look(standing, restarts, progress, finding)
        self._end(look)
        self._count(look)
        self._give_up_on(finding)
        self._resize(look)
        return look

    def _end(self, look: Look) -> None:
        name, standing = self.gang.request.name, look.standing
        if standing.state == "lost":
            raise _failed(
                f"somebody deleted JobSet '{name}'; launch the stage again: it goes on from its latest checkpoint"
            )
        if standing.state == "failed":
            raise _failed(
                f"gang '{name}' failed after {look.restarts} restarts, {self._carried.crashes + standing.crashes} of"
                f" them crashes: {standing.why}; see `stiv logs`"
            )

    def _count(self, look: Look) -> None:
        """Restarts in a row without a newer checkpoint are bounded, whatever caused them."""
        step = 0 if look.progress is None else look.progress.checkpoint_step
        if step > self._carried.step:
            self._carried = self._carried.model_copy(update={"step": step, "restarts_at_step": look.restarts})
            self.gang.note(self._carried)
        in_a_row = look.restarts - self._carried.restarts_at_step
        if look.standing.state not in FINAL and in_a_row >= self.gang.request.cluster.restarts.without_progress:
            self.gang.terminate()
            raise _failed(
                f"gang '{self.gang.request.name}' started again {in_a_row} times in a row without getting beyond the"
                f" checkpoint of step {self._carried.step}; it was stopped. See `stiv logs`, and launch again to go on"
            )

    def _give_up_on(self, finding: Finding | None) -> None:
        if finding is None or finding.waits:
            self._stuck_since = None
            return
        now = time.monotonic()
        self._stuck_since = self._stuck_since or now
        if now - self._stuck_since >= self.stuck_seconds:
            raise _failed(f"{finding.what}. The JobSet '{self.gang.request.name}' waits; `stiv cancel` deletes it")

    def _resize(self, look: Look) -> None:
        """Fewer nodes where the present number finds no place; all of them again with the next restart."""
        request, standing = self.gang.request, look.standing
        elastic, sizes = request.cluster.elastic, request.cluster.sizes(request.recipe)
        restarted = self._restarts_seen is not None and look.restarts > self._restarts_seen
        self._restarts_seen = look.restarts
        if elastic is None:
            return
        unplaced = look.finding is not None and look.finding.waits and standing.state in ("pending", "restarting")
        if not unplaced:
            self._waiting_since = None
            if restarted and 0 < standing.nodes < sizes[0]:
                self._remake(sizes[0], look)
            return
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        fewer = [nodes for nodes in sizes if nodes < standing.nodes]
        if fewer and now - self._waiting_since >= elastic.patience_seconds:
            self._remake(fewer[0], look)

    def _remake(self, nodes: int, look: Look) -> None:
        logger.warning("gang %s: %s nodes instead of %s", self.gang.request.name, nodes, look.standing.nodes)
        crashes = self._carried.crashes + look.standing.crashes
        carried = self._carried.model_copy(update={"restarts": look.restarts, "crashes": crashes})
        save_seconds = None if look.progress is None else look.progress.save_seconds
        self.gang.resize(nodes, carried, save_seconds=save_seconds)
        self._waiting_since = None


def follow(follower: Follower, on_look: Callable[[Look], None] = lambda _: None) -> Look:
    """Until the gang has succeeded; GangFailed where it has not and will not."""
    while True:
        look = follower.step()
        on_look(look)
        if look.standing.state == "succeeded":
            return look


def _failed(why: str) -> GangFailed:
    return GangFailed(why, Failure(None, 1))
