"""A pod's entry point: `python -m infra.cluster.node ORDER`, one a node of a gang.

It owns the way from an order to ranks that train on this node, what the first node publishes and tells, and the exit
code by which the cluster tells disruptions from crashes. Restarts are the cluster's.
"""

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.cluster.jobset import WORK_FOLDER, meeting_point
from infra.cluster.journal import GangJournal, Outcome, Progress
from infra.cluster.request import NodeOrder
from infra.launch.hang import Patience
from infra.launch.host import EXIT_HOPELESS, EXIT_LOST, Host
from infra.launch.local import GangFailed, StageLaunch
from infra.launch.rank import EXIT_STOPPED
from infra.launch.stage import folders_of, input_folder, publish_trained
from infra.launch.supervise import supervise
from infra.registry.opening import open_registry
from infra.registry.registry import Registry
from infra.store.artifacts import ArtifactNotFound
from model.checkpoint import folder as checkpoint
from model.checkpoint.manifest import step_of
from model.training.run import RunFolders, read_progress

logger = logging.getLogger(__name__)

_TELL_SECONDS = 20.0
_POLL_SECONDS = 1.0
_OWN_GRACE = 0.9
"""Share of the pod's grace that its ranks get; the rest is for ending in order."""
_PEER_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|ncclRemoteError|ncclSystemError|Socket Timeout|Connection refused"
    r"|remote process exited|failed to connect|DistNetworkError|DistStoreError"
)
"""In a rank's last words: another host went away, and this one only noticed."""


class LogSaysHung(RuntimeError):
    """A line of a rank's log means that the ranks will never go on."""


def main(arguments: list[str] | None = None) -> int:
    from monitoring.logs import configure

    (path,) = arguments if arguments is not None else sys.argv[1:]
    try:
        order = NodeOrder.model_validate_json(Path(path).read_bytes())
    except ValueError as error:
        print(f"{path} is no order this image understands: {error}", file=sys.stderr)
        return EXIT_HOPELESS
    configure(stage=order.recipe.name)
    # The kernel spares a container's first process a SIGTERM that it has not asked for.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_STOPPED))
    return run_node(order, os.environ, Path(WORK_FOLDER))


def run_node(order: NodeOrder, environment: Mapping[str, str], work: Path, *, meet_at: str | None = None) -> int:
    """This node's part, to its exit code; its index is the Job controller's JOB_COMPLETION_INDEX."""
    index = int(environment.get("JOB_COMPLETION_INDEX", "0"))
    registry = open_registry(order.store, environment)
    journal = GangJournal(registry.store, order.name)
    if journal.outcome() is not None:  # an attempt before this one came to its end
        return 0
    try:
        folders = _fetch(order, registry, work, index)
        status = _train(order, folders, journal, index, meet_at or meeting_point(order.name))
    except ArtifactNotFound as error:
        logger.error("%s", error)
        return EXIT_HOPELESS
    except (GangFailed, LogSaysHung) as error:
        logger.error("%s", error)
        return exit_code(error)
    if status == "stopped":
        return EXIT_STOPPED
    if index == 0:
        manifest, _ = publish_trained(order.recipe, registry, folders, dict(order.inputs), {})
        journal.close(Outcome(checkpoint=manifest.digest))
    return 0


def exit_code(error: GangFailed | LogSaysHung) -> int:
    """What a node's end counts as: lost ranks cost nothing, a rank's own error is a crash."""
    if isinstance(error, LogSaysHung) or error.exit_code < 0 or error.exit_code == EXIT_STOPPED:
        return EXIT_LOST
    return EXIT_LOST if _PEER_LOST.search(str(error)) else 1


def _fetch(order: NodeOrder, registry: Registry, work: Path, index: int) -> RunFolders:
    """The first node fetches for all where they share a folder; each for itself where they do not."""
    deadline = time.monotonic() + order.hang.start_seconds
    for role, digest in order.inputs.items():
        folder = input_folder(work, digest)
        if index == 0:
            registry.fetch(registry.manifest(digest), folder)
        while not folder.exists():
            if time.monotonic() > deadline:
                raise LogSaysHung(f"the first node has not fetched the {role} {digest[:16]}: see its log")
            time.sleep(_POLL_SECONDS)
    return folders_of(order.inputs, work, work / "runs" / order.run)


def _train(order: NodeOrder, folders: RunFolders, journal: GangJournal, index: int, meet_at: str) -> str:
    host = Host(index, order.nodes, order.ranks_per_node, meet_at)
    checkpoints = None if order.checkpoints is None else f"{order.checkpoints.rstrip('/')}/{order.run}"
    port = order.metrics_port if index == 0 else 0
    grace = _OWN_GRACE * order.grace_seconds
    launch = StageLaunch(order.recipe, folders, port, checkpoints, host, grace)
    hang = order.hang
    patience = Patience(start=hang.start_seconds, step=hang.step_seconds, checkpoint=hang.checkpoint_seconds)
    ranks = range(index * order.ranks_per_node, (index + 1) * order.ranks_per_node)
    logs = LogPatterns([folders.rank_log(rank) for rank in ranks], hang.log_patterns)
    teller = ProgressTeller(journal, folders, order.recipe.training.total_steps) if index == 0 else None

    def look() -> None:
        logs.check()
        if teller is not None:
            teller.look()

    status = supervise(launch, on_poll=look, patience=patience)
    if teller is not None:
        teller.tell()
    return status


@dataclass(slots=True)
class LogPatterns:
    """What is written to logs from now on, held against patterns."""

    logs: list[Path]
    patterns: tuple[str, ...]
    _read: dict[Path, int] = field(default_factory=dict[Path, int])

    def __post_init__(self) -> None:
        self._read = {log: log.stat().st_size if log.exists() else 0 for log in self.logs}

    def check(self) -> None:
        """Raises LogSaysHung at the first line that a pattern is found in."""
        for log in self.logs:
            for line in self._fresh(log).splitlines():
                for pattern in self.patterns:
                    if re.search(pattern, line):
                        raise LogSaysHung(f"{log.name} has a line that hang.log_patterns names: {line[:500]}")

    def _fresh(self, log: Path) -> str:
        """Whole lines alone: the rest is read with what follows."""
        if not log.exists():
            return ""
        with log.open("rb") as file:
            file.seek(self._read[log])
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read[log] += len(whole)
        return whole.decode(errors="replace")


@dataclass(slots=True)
class ProgressTeller:
    """Tells through the store how far the run is."""

    journal: GangJournal
    folders: RunFolders
    total_steps: int
    _told: float = 0.0
    _saving_since: float | None = None
    _save_seconds: float | None = None

    def look(self) -> None:
        """Every second or so: a save is timed by how long its temporary folder is there."""
        now = time.monotonic()
        if any(self.folders.checkpoints.glob(".*.tmp")):
            self._saving_since = self._saving_since or now
        elif self._saving_since is not None:
            self._save_seconds = max(self._save_seconds or 0.0, now - self._saving_since)
            self._saving_since = None
        if now - self._told >= _TELL_SECONDS:
            self.tell()

    def tell(self) -> None:
        lines = read_progress(self.folders.progress)
        last = lines[-1] if lines else None
        newest = checkpoint.latest(self.folders.checkpoints)
        left = None if last is None else (self.total_steps - last.step) * last.step_seconds
        self.journal.tell(
            Progress(
                number=0,
                step=0 if last is None else last.step,
                total_steps=self.total_steps,
                checkpoint_step=0 if newest is None else step_of(newest.name) or 0,
                loss=None if last is None else last.loss,
                samples_per_second=None if last is None else last.samples_per_second,
                save_seconds=self._save_seconds,
                seconds_left=left,
            )
        )
        self._told = time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
