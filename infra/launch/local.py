"""A stage's ranks as a gang of processes: started, followed and stopped together.

It owns the protocol every home of ranks follows and the embedded home, torchrun on this machine. It knows nothing of
curricula, promotion or what the ranks compute.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

import psutil

from infra.launch.rank import EXIT_STOPPED
from model.recipe import StageRecipe, dumps
from model.training.run import RunFolders

logger = logging.getLogger(__name__)

GangStatus = Literal["running", "succeeded", "stopped", "failed"]

GRACE_SECONDS = 60.0
"""From SIGTERM to SIGKILL: a step and a checkpoint must fit."""
POLL_SECONDS = 0.2
_ROOT = Path(__file__).parents[2]
_PASSED_ON = re.compile(
    r"PATH|HOME|LANG|LC_\w+|TZ|TMPDIR|VIRTUAL_ENV|PYTHON\w+|LD_LIBRARY_PATH|XDG_CACHE_HOME|HF_HOME|HF_HUB_OFFLINE"
    r"|(CUDA|NVIDIA|NCCL|GLOO|TORCH|TORCHELASTIC)_\w+"
)
"""Variables a rank may see. An allow-list, since no list of secrets is ever complete; ranks need no credentials."""
_ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)


@dataclass(slots=True, frozen=True)
class StageLaunch:
    """What to train and where."""

    recipe: StageRecipe
    folders: RunFolders
    metrics_port: int = 0
    """Prometheus port of rank 0; 0 takes a free one and writes it to `folders.metrics_port`."""


class GangFailed(RuntimeError):
    """A rank ended in an error; the message carries its exit code and the end of its log."""

    def __init__(self, rank: int | None, exit_code: int, log: Path, lines: str) -> None:
        who = "torchrun" if rank is None else f"rank {rank}"
        super().__init__(f"{who} ended with exit code {exit_code}; the end of {log}:\n{lines}")
        self.rank = rank
        self.exit_code = exit_code
        """As Python counts it: negative is the number of the signal that ended it."""
        self.log = log


class Gang(Protocol):
    """The ranks of one stage, wherever they run."""

    def status(self) -> GangStatus:
        """`stopped` is an end on request, after a checkpoint: starting again resumes."""
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
        folders.recipe.write_text(dumps(launch.recipe))
        with _log(folders).open("wb") as output:
            torchrun = subprocess.Popen(
                command(launch),
                env=environment(os.environ, launch.recipe.training.world_size),
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
        return "stopped" if self._failure()[1] == EXIT_STOPPED else "failed"

    def wait(self, timeout: float | None = None) -> GangStatus:
        try:
            self._torchrun.wait(timeout)
        except subprocess.TimeoutExpired:
            return "running"
        status = self.status()
        if status == "failed":
            rank, exit_code = self._failure()
            log = _log(self.launch.folders) if rank is None else self.launch.folders.rank_log(rank)
            raise GangFailed(rank, exit_code, log, _tail(log, 20))
        return status

    def terminate(self, grace: float = GRACE_SECONDS) -> GangStatus:
        """Ranks are asked one by one: torchrun would forward the signal, and then hide their exit codes."""
        processes = self._processes()
        for process in processes[1:] or processes:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while self._torchrun.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for process in self._processes():
            logger.warning("process %s did not stop within %s s: killed", process.pid, grace)
            _signal(process, signal.SIGKILL)
        self._torchrun.wait()
        return self.status()

    def tail(self, rank: int = 0, lines: int = 20) -> str:
        return _tail(self.launch.folders.rank_log(rank), lines)

    def _processes(self) -> list[psutil.Process]:
        """Those alive: torchrun, then its ranks, which have sessions of their own."""
        try:
            torchrun = psutil.Process(self._torchrun.pid)
            return [torchrun, *torchrun.children(recursive=True)] if self._torchrun.poll() is None else []
        except psutil.NoSuchProcess:
            return []

    def _failure(self) -> tuple[int | None, int]:
        """The rank that failed first and its exit code, as torchrun reports them."""
        report = _ROOT_CAUSE.search(_log(self.launch.folders).read_text(errors="replace"))
        if report is None:
            return None, self._torchrun.returncode
        return int(report[1]), int(report[2])


def command(launch: StageLaunch) -> list[str]:
    """The command line of the whole gang."""
    folders = launch.folders
    ranks = ["--standalone", "--nproc-per-node", str(launch.recipe.training.world_size)]
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
    options += ["--metrics-port", launch.metrics_port]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *ranks, "-m", "infra.launch.rank"]
    return [*torchrun, *(str(option) for option in options)]


def environment(given: Mapping[str, str], world_size: int) -> dict[str, str]:
    """The ranks' variables: no secrets, our packages importable, the cores shared out."""
    passed_on = {name: value for name, value in given.items() if _PASSED_ON.fullmatch(name)}
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


def _log(folders: RunFolders) -> Path:
    """torchrun's own output."""
    return folders.logs / "torchrun.log"


def _tail(log: Path, lines: int) -> str:
    if not log.exists():
        return ""
    with log.open(errors="replace") as file:
        return "".join(deque(file, lines))
