"""Whether a gang hangs, and which rank is the cause.

It owns patience, the questioning of ranks and the judgement over their answers; what is done with a gang that hangs is
not known here.
"""

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from infra.launch.incident import RankReport
from infra.launch.rank import STACK_SIGNAL
from model.training.heartbeat import Beat, Phase, read_beat
from model.training.run import RunFolders

_LONGEST_LOOK = 5.0
"""Seconds of silence one look may add: time in which the watcher itself, or the whole machine, slept is nobody's."""
_EFFORT_SECONDS = 1.0
_ANSWER_SECONDS = 3.0
_LONGEST_STACK = 20_000
_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
_ORDER: tuple[Phase, ...] = ("start", "checkpoint", "compile", "step", "leave", "succeeded", "stopped", "failed")
"""As phases follow one another after the same number of steps."""
_COLLECTIVE = re.compile(r'File "[^"]*/(torch/distributed|deepspeed/comm)/')
_INNERMOST = 8
"""Frames of a stack in which a collective shows."""


@dataclass(slots=True, frozen=True)
class Patience:
    """Seconds without a sign of life, by what a rank said it was about to do.

    All lie below the 30 minutes after which torch would give up a collective, and tell less.
    """

    start: float = 1200.0
    """Loading libraries, weights and captions, meeting the others."""
    compile: float = 1200.0
    """The first step."""
    step: float = 120.0
    """A further step, at least; slow ones get `slack` times the slowest of a rank's recent ones."""
    checkpoint: float = 1200.0
    leave: float = 600.0
    """Parting from the others and ending as a process."""
    slack: float = 5.0

    def of(self, beat: Beat | None) -> float:
        if beat is None:
            return self.start
        match beat.phase:
            case "step":
                return max(self.step, self.slack * beat.slowest_step)
            case "succeeded" | "stopped" | "failed":
                return self.leave
            case phase:
                return float(getattr(self, phase))


class Watch:
    """Counts each rank's silence, by this process's own clock: ranks' clocks may differ."""

    def __init__(self, folders: RunFolders, patience: Patience) -> None:
        self.folders = folders
        self.patience = patience
        self.furthest_step = 0
        """That any rank has done."""
        self.beats: dict[int, Beat] = {}
        self.silent: dict[int, float] = {}
        """Rank -> seconds since its last sign of life."""
        self._without_ranks = 0.0
        self._looked = time.monotonic()

    def look(self, ranks: Mapping[int, psutil.Process]) -> None:
        """Take note of the living ranks' signs of life; call it every few seconds."""
        now = time.monotonic()
        passed = min(now - self._looked, _LONGEST_LOOK)
        self._looked = now
        self._without_ranks = 0.0 if ranks else self._without_ranks + passed
        self.silent = {rank: self.silent.get(rank, 0.0) + passed for rank in ranks}
        for rank, process in ranks.items():
            beat = read_beat(self.folders, rank)
            if beat is None or beat.pid != process.pid or beat == self.beats.get(rank):
                continue  # none, a former launch's, or the one that was there before
            self.beats[rank] = beat
            self.silent[rank] = 0.0
            self.furthest_step = max(self.furthest_step, beat.step)

    def close(self, world_size: int) -> None:
        """Take note of how far the ranks came, once they are dead."""
        last = [read_beat(self.folders, rank) for rank in range(world_size)]
        self.furthest_step = max([self.furthest_step, *(beat.step for beat in last if beat is not None)])

    def hangs(self) -> bool:
        """Whether all ranks are silent for too long.

        All, since a rank may rightly wait for another one's checkpoint or first step; and where one is stuck, the
        others wait for it within a step.
        """
        if not self.silent:
            return self._without_ranks > self.patience.start
        return all(seconds > self.patience.of(self.beats.get(rank)) for rank, seconds in self.silent.items())


def question(ranks: Mapping[int, psutil.Process], watch: Watch) -> list[RankReport]:
    """Ask every rank for its stack, and the kernel for what it knows of each.

    A stopped rank is woken for its answer, so the gang is to be ended after this.
    """
    states = {rank: (_state(process), _waits_in(process)) for rank, process in ranks.items()}
    busy = _busy(ranks)
    stacks = _ask(ranks, {rank: watch.folders.rank_log(rank) for rank in ranks})
    reports: list[RankReport] = []
    for rank, process in sorted(ranks.items()):
        beat = watch.beats.get(rank)
        reports.append(
            RankReport(
                rank=rank,
                pid=process.pid,
                phase=beat.phase if beat else "start",
                step=beat.step if beat else 0,
                silent_seconds=round(watch.silent.get(rank, 0.0), 1),
                state=states[rank][0],
                waits_in=states[rank][1],
                busy=busy[rank],
                stack=stacks[rank],
            )
        )
    return reports


def _busy(ranks: Mapping[int, psutil.Process]) -> dict[int, float]:
    before = {rank: _cpu_seconds(process) for rank, process in ranks.items()}
    time.sleep(_EFFORT_SECONDS)
    return {rank: round((_cpu_seconds(process) - before[rank]) / _EFFORT_SECONDS, 2) for rank, process in ranks.items()}


def _ask(ranks: Mapping[int, psutil.Process], logs: Mapping[int, Path]) -> dict[int, str]:
    """Rank -> its stacks; nothing of one that does not answer in time."""
    before = {rank: _size(log) for rank, log in logs.items()}
    for process in ranks.values():
        with suppress(psutil.Error):
            process.send_signal(STACK_SIGNAL)
            if process.status() in _STOPPED:
                process.resume()
    deadline = time.monotonic() + _ANSWER_SECONDS
    while time.monotonic() < deadline and any(_size(log) == before[rank] for rank, log in logs.items()):
        time.sleep(0.1)
    time.sleep(0.2)  # for the end of an answer that has begun
    return {rank: _stack(log, before[rank]) for rank, log in logs.items()}


def cause(reports: Sequence[RankReport]) -> tuple[tuple[int, ...], str]:
    """The ranks the others wait for, and why they are taken to be it; none where all look alike."""
    if not reports:
        return (), "torchrun runs no rank"
    places = [(report.step, _ORDER.index(report.phase)) for report in reports]
    suspects: dict[str, list[RankReport]] = {
        "stopped, by a signal or a debugger": [report for report in reports if report.state in _STOPPED],
        "held in the kernel by a disk or a device": [report for report in reports if report.state == "disk-sleep"],
        "behind the others": [
            report for report, place in zip(reports, places, strict=True) if place == min(places) != max(places)
        ],
        "without an answer": [report for report in reports if not report.stack],
        "outside the collective the others wait in": [report for report in reports if not _in_collective(report.stack)],
    }
    for why, found in suspects.items():
        # What holds for all tells nothing apart; but that all are stopped, or stuck in the kernel, is itself the cause.
        if found and (len(found) < len(reports) or found[0].state in (*_STOPPED, "disk-sleep")):
            first = found[0]
            ranks = tuple(report.rank for report in found)
            who = f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
            effort = "" if first.state in _STOPPED else f", {first.state}, {_effort(first.busy)}"
            return ranks, f"{who} {why}: {first.phase} after step {first.step}{effort}"
    return (), "all ranks answer and stand at the same place; the stacks tell where"


def _effort(busy: float) -> str:
    return f"spinning ({busy:.0%} of a core)" if busy > 0.5 else "waiting"


def _in_collective(stack: str) -> bool:
    """Of the main thread, which faulthandler prints last, its innermost frames first."""
    main = re.split(r"^(?:Current thread|Thread) .*$", stack, flags=re.MULTILINE)[-1]
    return any(_COLLECTIVE.search(line) for line in main.strip().splitlines()[:_INNERMOST])


def _stack(log: Path, start: int) -> str:
    """What came to the log since it had `start` bytes, from the first stack on."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read(_LONGEST_STACK).decode(errors="replace")
    found = re.search(r"^(?:Current thread|Thread) 0x", text, re.MULTILINE)
    return text[found.start() :] if found else ""


def _state(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.status()
    return "gone"


def _waits_in(process: psutil.Process) -> str:
    with suppress(OSError):
        name = Path(f"/proc/{process.pid}/wchan").read_text().strip()
        return "" if name == "0" else name
    return ""


def _cpu_seconds(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        times = process.cpu_times()
        return times.user + times.system
    return 0.0


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0
