"""Blows dealt to the ranks of a run at chosen points, by reading their signs of life as anybody may."""

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import psutil

from model.training.heartbeat import Phase, read_beat
from model.training.run import RunFolders


@dataclass(slots=True, frozen=True)
class Blow:
    """A signal to a rank, or to the torchrun above it."""

    signal: signal.Signals
    rank: int
    phase: Phase
    """Dealt while the rank is in this phase, or soon after it,"""
    step: int = 0
    """once it has done this many steps,"""
    delay: float = 0.0
    """and this many seconds more have passed."""
    to: Literal["rank", "torchrun"] = "rank"


class Monkey(threading.Thread):
    """Deals one blow to each start of a run, in the order given."""

    def __init__(self, folders: RunFolders, blows: Sequence[Blow]) -> None:
        super().__init__(daemon=True)
        self.folders = folders
        self.blows = tuple(blows)
        self.dealt = 0
        self._struck: set[int] = set()
        """The torchruns of starts that have had their blow."""

    def run(self) -> None:
        for blow in self.blows:
            rank, torchrun = self._find(blow)
            self._struck.add(torchrun)
            time.sleep(blow.delay)
            with suppress(ProcessLookupError):
                os.kill(rank if blow.to == "rank" else torchrun, blow.signal)
                self.dealt += 1

    def _find(self, blow: Blow) -> tuple[int, int]:
        """The processes of the rank and of its torchrun, once the time has come."""
        while True:
            beat = read_beat(self.folders, blow.rank)
            if beat is not None and beat.phase == blow.phase and beat.step >= blow.step:
                with suppress(psutil.Error):
                    torchrun = psutil.Process(beat.pid).parent()
                    # A rank without it is an orphan, of a start that had its blow.
                    if torchrun and torchrun.pid not in self._struck and "torch.distributed.run" in torchrun.cmdline():
                        return beat.pid, torchrun.pid
            time.sleep(0.001)


def random_blows(count: int, *, seed: int, steps_apart: int, ranks: int = 2) -> list[Blow]:
    """At random points of a run of `(count + 1) * steps_apart` steps; never two in a row before a first step."""
    source = random.Random(seed)
    blows: list[Blow] = []
    for number in range(count):
        early = source.random() < 0.25 and (not blows or blows[-1].phase != "start")
        phase: Phase = "start" if early else source.choice(("step", "step", "checkpoint"))
        # A rank that is stopped while it starts is found as well, only not soon: starting takes long.
        signals = (signal.SIGKILL, signal.SIGTERM) if early else (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
        chosen = source.choice(signals)
        blows.append(
            Blow(
                chosen,
                # Rank 0 alone may say that it writes a checkpoint.
                rank=0 if phase == "checkpoint" else source.randrange(ranks),
                phase=phase,
                step=0 if early else number * steps_apart + source.randrange(steps_apart),
                delay=source.uniform(0.0, 8.0 if early else 0.2),
                to="torchrun" if chosen == signal.SIGKILL and source.random() < 0.2 else "rank",
            )
        )
    return blows
