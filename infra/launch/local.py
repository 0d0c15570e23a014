"""A stage's ranks as a gang of processes: started, followed and stopped together.

It owns the protocol every home of ranks follows and the embedded home, torchrun on this machine. It knows nothing of
starting ranks again, of curricula or promotion, nor of what the ranks compute.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

import psutil

from infra.launch.host import Host
from infra.launch.rank import EXIT_STOPPED
from model.recipe import StageRecipe, dumps
from model.training.heartbeat import read_beat
from model.training.run import RunFolders

logger = logging.getLogger(__name__)

GangStatus = Literal["running", "succeeded", "stopped", "failed"]

GRACE_SECONDS = 60.0
"""From SIGTERM to SIGKILL: a step and a checkpoint must fit."""
POLL_SECONDS = 0.2
_KILL_SECONDS = 30.0
_ROOT = Path(__file__).parents[2]
_PASSED_ON = re.compile(
    r"PATH|HOME|LANG|LC_\w+|TZ|TMPDIR|VIRTUAL_ENV|PYTHON\w+|LD_LIBRARY_PATH|XDG_CACHE_HOME|HF_HOME|HF_HUB_OFFLINE"
    r"|(CUDA|NVIDIA|NCCL|GLOO|TORCH|TORCHELASTIC)_\w+"
)
"""Variables a rank may see. An allow-list, since no list of secrets is ever complete; ranks need no credentials."""
_RUN_VARIABLE = "STIV_RUN_FOLDER"
"""In the environment of torchrun and of all that descends from it: so they are found even when torchrun is gone."""
_STORE_ACCESS = re.compile(r"AWS_\w+")
_FAILURE = re.compile(r"rank\s*:\s*(\d+) \(local_rank.*?exitcode\s*:\s*(-?\d+) \(pid: (\d+)\)", re.DOTALL)
_CLOSED = re.compile(r"Sending process (\d+) closing signal")
_SIGNALLED = re.compile(r"SignalException: Process \d+ got signal: (\d+)")


@dataclass(slots=True, frozen=True)
class StageLaunch:
    """What to train and where."""

    recipe: StageRecipe
    folders: RunFolders
    metrics_port: int = 0
    """Prometheus port of rank 0; 0 takes a free one and writes it to `folders.metrics_port`."""
    checkpoint_store: str | None = None
    """Where checkpoints are kept beside the run folder; an empty run folder goes on from there."""
    host: Host | None = None
    """Of a gang that spans several; all see the run folder, and none starts again alone. None: all ranks are here."""
    grace: float = GRACE_SECONDS
    """Seconds that ranks which are asked to stop have for their step and a checkpoint."""

    @property
    def local_ranks(self) -> int:
        return self.recipe.training.world_size if self.host is None else self.host.ranks

    @property
    def torchrun_log(self) -> Path:
        """Of this host."""
        number = 0 if self.host is None else self.host.index
        return self.folders.logs / (f"torchrun-{number}.log" if number else "torchrun.log")

    def log_of(self, rank: int | None) -> Path:
        """A rank's log; of none, torchrun's own output."""
        return self.torchrun_log if rank is None else self.folders.rank_log(rank)


@dataclass(slots=True, frozen=True)
class Failure:
    """The end of the rank, or of torchrun itself where `rank` is None, that ended the gang."""

    rank: int | None
    exit_code: int
    """As Python counts it: negative is the number of the signal that ended it."""

    def __str__(self) -> str:
        who = "torchrun" if self.rank is None else f"rank {self.rank}"
        name = f" ({signal.Signals(-self.exit_code).name})" if self.exit_code < 0 else ""
        return f"{who} ended with exit code {self.exit_code}{name}"


class GangFailed(RuntimeError):
    """A rank ended in an error; the message carries its exit code and the end of its log."""

    def __init__(self, why: str, failure: Failure, log: Path | None = None, incidents: Sequence[Path] = ()) -> None:
        super().__init__(why)
        self.rank = failure.rank
        self.exit_code = failure.exit_code
        self.log = log
        """None of ranks that ran elsewhere."""
        self.incidents = tuple(incidents)
        """Where what befell the ranks is written down."""


class Gang(Protocol):
    """The ranks of one stage, wherever they run."""

    def status(self) -> GangStatus:
        """`stopped` is an end on request, after a checkpoint where a step was done: starting again resumes."""
        ...

    def wait(self, timeout: float | None = None) -> GangStatus:
        """Until the end, or for `timeout` seconds; raises GangFailed where the status is failed."""
        ...

    def terminate(self, grace: float = GRACE_SECONDS) -> GangStatus:
        """Ask all ranks to finish their step, save and stop; kill what is left after `grace` seconds."""
        ...

    def tail(self, rank: int = 0, lines: int = 20) -> str:
        """The last lines of a rank's log."""
        ...


class LocalGang:
    """Ranks started by torchrun on this machine, in a process group of their own."""

    def __init__(self, launch: StageLaunch, torchrun: subprocess.Popen[bytes]) -> None:
        self.launch = launch
        self._torchrun = torchrun

    @classmethod
    def start(cls, launch: StageLaunch) -> Self:
        """Write the recipe into the run folder and start its ranks; returns at once."""
        folders = launch.folders
        folders.logs.mkdir(parents=True, exist_ok=True)
        _write(folders.recipe, dumps(launch.recipe), str(launch.torchrun_log.stem))
        with launch.torchrun_log.open("wb") as output:
            torchrun = subprocess.Popen(
                command(launch),
                env=environment(os.environ, launch.local_ranks, store=launch.checkpoint_store is not None)
                | {_RUN_VARIABLE: str(folders.run.resolve())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        logger.info("started %s ranks of stage %s", launch.recipe.training.world_size, launch.recipe.name)
        return cls(launch, torchrun)

    @property
    def pid(self) -> int:
        """torchrun's."""
        return self._torchrun.pid

    def status(self) -> GangStatus:
        code = self._torchrun.poll()
        if code is None:
            return "running"
        if code == 0:
            return "succeeded"
        return "stopped" if self.failure().exit_code in (EXIT_STOPPED, -signal.SIGTERM) else "failed"

    def wait(self, timeout: float | None = None) -> GangStatus:
        try:
            self._torchrun.wait(timeout)
        except subprocess.TimeoutExpired:
            return "running"
        status = self.status()
        if status == "failed":
            failure = self.failure()
            log = self.launch.log_of(failure.rank)
            raise GangFailed(f"{failure}; the end of {log}:\n{tail_of(log)}", failure, log)
        return status

    def terminate(self, grace: float = GRACE_SECONDS) -> GangStatus:
        """Ranks are asked one by one: torchrun would forward the signal, and then hide their exit codes."""
        end_processes(self.launch.folders, grace)
        self._torchrun.wait()
        return self.status()

    def tail(self, rank: int = 0, lines: int = 20) -> str:
        return tail_of(self.launch.folders.rank_log(rank), lines)

    def ranks(self) -> dict[int, psutil.Process]:
        """Those alive."""
        with suppress(psutil.Error):
            found = ((_rank_of(process), process) for process in psutil.Process(self.pid).children())
            return {rank: process for rank, process in found if rank is not None}
        return {}

    def failure(self) -> Failure:
        """What ended the gang, of all that torchrun reports.

        A rank that was killed leaves the others with broken connections, and they may be quicker to end; so a killed
        one is the cause, then the one whose last words are the oldest. What torchrun itself ended is none.
        """
        report = self.launch.torchrun_log.read_text(errors="replace")
        closed = {int(pid) for pid in _CLOSED.findall(report)}
        found = {int(rank): int(code) for rank, code, pid in _FAILURE.findall(report) if int(pid) not in closed}
        if not found:
            signalled = _SIGNALLED.search(report)
            return Failure(None, -int(signalled[1]) if signalled else self._torchrun.returncode)
        rank = min(found, key=lambda rank: (found[rank] >= 0, found[rank] == EXIT_STOPPED, self._ended_at(rank)))
        return Failure(rank, found[rank])

    def _ended_at(self, rank: int) -> float:
        beat = read_beat(self.launch.folders, rank)
        return beat.time if beat is not None and beat.phase == "failed" else float("inf")


def end_processes(folders: RunFolders, grace: float = GRACE_SECONDS) -> None:
    """End all that any launch left running in a run folder: ranks are asked to save and stop, then all is killed."""
    asked: set[int] = set()
    deadline = time.monotonic() + grace
    while (left := _processes(folders)) and time.monotonic() < deadline:
        # torchrun only where it has no rank yet: later it would forward the signal, and hide its ranks' exit codes.
        for process in [process for process in left if _is_rank(process)] or ([] if asked else left):
            if process.pid not in asked:
                _signal(process, signal.SIGTERM)
                asked.add(process.pid)
        time.sleep(POLL_SECONDS)
    for process in left:
        logger.warning("process %s did not stop within %s s: killed", process.pid, grace)
        _signal(process, signal.SIGKILL)
    deadline = time.monotonic() + _KILL_SECONDS
    while left := _processes(folders):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"processes {[process.pid for process in left]} of {folders.run} live on {_KILL_SECONDS:g} s after"
                " SIGKILL: a disk or a device holds them; free it, or restart the machine"
            )
        time.sleep(POLL_SECONDS)


def _processes(folders: RunFolders) -> list[psutil.Process]:
    """All that descend from a launch of this run folder and are not yet dead."""
    run = str(folders.run.resolve())
    return [process for process in psutil.process_iter() if _variable(process, _RUN_VARIABLE) == run]


def _is_rank(process: psutil.Process) -> bool:
    """Not torchrun, and not what a rank has started."""
    with suppress(psutil.Error):
        parent = process.parent()
        return _rank_of(process) is not None and (parent is None or _rank_of(parent) is None)
    return False


def _rank_of(process: psutil.Process) -> int | None:
    rank = _variable(process, "RANK")
    return None if rank is None else int(rank)


def _variable(process: psutil.Process, name: str) -> str | None:
    """Of its environment, where it lives and is ours."""
    with suppress(psutil.Error):
        return process.environ().get(name)
    return None


def command(launch: StageLaunch) -> list[str]:
    """The command line of the whole gang."""
    folders = launch.folders
    ranks = ["--standalone", "--nproc-per-node", str(launch.local_ranks)]
    if launch.host is not None:
        ranks = launch.host.options()
    options = [
        "--recipe",
        folders.recipe,
        "--data",
        folders.data,
        "--codec",
        folders.codec,
        "--run-folder",
        folders.run,
    ]
    if folders.initial is not None:
        options += ["--initial", folders.initial]
    if folders.initial_temporal is not None:
        options += ["--initial-temporal", folders.initial_temporal]
    if launch.checkpoint_store is not None:
        options += ["--checkpoint-store", launch.checkpoint_store]
    options += ["--metrics-port", launch.metrics_port]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *ranks, "-m", "infra.launch.rank"]
    return [*torchrun, *(str(option) for option in options)]


def environment(given: Mapping[str, str], world_size: int, *, store: bool = False) -> dict[str, str]:
    """The ranks' variables: no secrets but those of a `store` they write to, our packages importable, the cores shared
    out."""
    passed_on = {
        name: value
        for name, value in given.items()
        if _PASSED_ON.fullmatch(name) or (store and _STORE_ACCESS.fullmatch(name))
    }
    path = [str(_ROOT), *filter(None, [given.get("PYTHONPATH")])]
    threads = max(1, _cores() // world_size)
    # Passive: threads that spin while others hold the cores turn a busy machine's seconds into minutes.
    own = {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return passed_on | own


def _cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _write(path: Path, text: str, by: str) -> None:
    """By one rename: the ranks of another host may be reading it."""
    temporary = path.with_suffix(f".{by}.new")
    temporary.write_text(text)
    temporary.replace(path)


def tail_of(log: Path, lines: int = 20) -> str:
    if not log.exists():
        return ""
    with log.open(errors="replace") as file:
        return "".join(deque(file, lines))
