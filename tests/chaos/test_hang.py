"""Signs of life, and who is the cause when they end: on real processes that sleep, spin or are stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from infra.launch.hang import Patience, Watch, cause, question
from infra.launch.incident import Incident, RankReport, keep
from model.training.heartbeat import Heartbeat, read_beat
from model.training.run import RunFolders

RANK = """
import sys
from pathlib import Path
from infra.launch.rank import _print_stacks, _redirect
from model.training.heartbeat import Heartbeat
from model.training.run import RunFolders
import time

def spin():
    while True:
        pass

def wait():
    time.sleep(600)

folder, rank, doing = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
folders = RunFolders(folder, folder, folder)
_redirect(folders.rank_log(rank))
if doing != "deaf":
    _print_stacks()
Heartbeat(folders, rank)(7, "step")
spin() if doing == "spin" else wait()
"""
"""A rank as far as signs of life and stacks go, without anything to train."""

Rank = Callable[[int, str], psutil.Process]


@pytest.fixture
def folders(tmp_path: Path) -> RunFolders:
    return RunFolders(tmp_path, tmp_path, tmp_path)


@pytest.fixture
def rank(folders: RunFolders) -> Iterator[Rank]:
    started: list[subprocess.Popen[bytes]] = []

    def start(number: int, doing: str) -> psutil.Process:
        command = [sys.executable, "-c", RANK, str(folders.run), str(number), doing]
        started.append(subprocess.Popen(command, cwd=Path(__file__).parents[2]))
        deadline = time.monotonic() + 60
        while (beat := read_beat(folders, number)) is None or beat.step != 7:
            assert started[-1].poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        return psutil.Process(started[-1].pid)

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_beat_says_what_a_rank_is_about_to_do_and_how_slow_its_steps_are(folders: RunFolders) -> None:
    assert read_beat(folders, 3) is None
    beat = Heartbeat(folders, 3)
    first = read_beat(folders, 3)
    assert first is not None
    assert (first.rank, first.pid, first.phase, first.step) == (3, os.getpid(), "start", 0)
    beat(10, "compile")
    time.sleep(0.2)
    beat(11, "step")
    found = read_beat(folders, 3)
    assert found is not None and found.slowest_step == 0.0  # the first step is no measure of the others
    time.sleep(0.05)
    beat(12, "checkpoint")
    beat.end("failed", "ValueError: " + "x" * 3000)
    last = read_beat(folders, 3)
    assert last is not None
    assert (last.phase, last.step) == ("failed", 12)
    assert 0.05 <= last.slowest_step < 0.2
    assert last.error.startswith("ValueError: xxx")
    assert abs(last.time - time.time()) < 60


def test_a_beat_is_cheap_and_a_torn_one_is_none(folders: RunFolders) -> None:
    beat = Heartbeat(folders, 0)
    began = time.perf_counter()
    for step in range(1000):
        beat(step, "step")
    assert (time.perf_counter() - began) / 1000 < 1e-3
    text = folders.heartbeat(0).read_text()
    folders.heartbeat(0).write_text(text[: len(text) // 2])
    assert read_beat(folders, 0) is None


def test_a_gang_hangs_only_when_all_its_ranks_are_silent_for_too_long(folders: RunFolders) -> None:
    patience = Patience(step=0.3, checkpoint=600.0, slack=1.0)
    watch = Watch(folders, patience)
    ranks = {0: psutil.Process(), 1: psutil.Process()}
    saving, waiting = Heartbeat(folders, 0), Heartbeat(folders, 1)
    saving(5, "checkpoint")
    waiting(5, "step")
    watch.look(ranks)
    assert watch.furthest_step == 5
    time.sleep(0.5)
    watch.look(ranks)
    assert watch.silent[1] > patience.step and not watch.hangs()  # rank 1 waits for rank 0's checkpoint
    saving(5, "step")
    watch.look(ranks)
    assert not watch.hangs()
    time.sleep(0.5)
    watch.look(ranks)
    assert watch.hangs()
    waiting(6, "step")
    watch.look(ranks)
    assert not watch.hangs()


def test_a_step_that_was_always_slow_is_given_time(folders: RunFolders) -> None:
    patience = Patience(step=1.0, slack=5.0)
    beat = Heartbeat(folders, 0)
    beat(1, "step")
    time.sleep(0.5)
    beat(2, "step")
    found = read_beat(folders, 0)
    assert found is not None
    assert patience.of(found) == 5.0 * found.slowest_step > 2.4
    assert patience.of(replace(found, slowest_step=0.01)) == 1.0
    assert patience.of(None) == patience.of(replace(found, phase="start")) == patience.start
    assert patience.of(replace(found, phase="succeeded")) == patience.leave


def test_signs_of_life_of_a_former_launch_are_none(folders: RunFolders, rank: Rank) -> None:
    Heartbeat(folders, 0)(90, "step")  # of this process, which is not the rank that is watched
    watch = Watch(folders, Patience(start=0.2, step=600.0))
    other = psutil.Process(os.getppid())
    watch.look({0: other})
    time.sleep(0.4)
    watch.look({0: other})
    assert watch.beats == {} and watch.hangs()


def test_the_stopped_the_spinning_and_the_deaf_are_told_apart(folders: RunFolders, rank: Rank) -> None:
    ranks = {0: rank(0, "wait"), 1: rank(1, "spin"), 2: rank(2, "deaf"), 3: rank(3, "wait")}
    ranks[3].send_signal(signal.SIGSTOP)
    while ranks[3].status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    watch = Watch(folders, Patience())
    watch.look(ranks)
    reports = question(ranks, watch)
    assert [report.rank for report in reports] == [0, 1, 2, 3]
    assert all((report.phase, report.step) == ("step", 7) for report in reports)
    waiting, spinning, deaf, stopped = reports
    assert waiting.state == "sleeping" and waiting.busy < 0.1 and "in wait" in waiting.stack
    assert spinning.busy > 0.1 and "in spin" in spinning.stack
    assert deaf.stack == ""
    assert stopped.state == "stopped" and "in wait" in stopped.stack
    assert cause(reports) == ((3,), "rank 3 is stopped, by a signal or a debugger: step after step 7")
    found, why = cause(reports[:3])
    assert found == (2,) and why.startswith("rank 2 is without an answer")


IN_COLLECTIVE = """Thread 0x01 (most recent call first):
  File "/lib/threading.py", line 1 in run

Current thread 0x02 (most recent call first):
  File "/lib/torch/distributed/distributed_c10d.py", line 3252 in all_reduce
  File "/main/model/training/stage.py", line 55 in train_step
"""
LOADING = """Thread 0x01 (most recent call first):
  File "/lib/torch/distributed/elastic/timer.py", line 1 in run

Thread 0x02 (most recent call first):
  File "/main/model/data/loader.py", line 117 in _batch
  File "/main/model/training/loop.py", line 45 in train
"""


def report(rank: int, **fields: object) -> RankReport:
    found = RankReport(rank, 100 + rank, "step", 7, 130.0, "sleeping", "futex_wait", 0.0, IN_COLLECTIVE)
    return replace(found, **fields)  # type: ignore[arg-type]


def test_the_cause_is_the_rank_the_others_wait_for() -> None:
    spinning = report(2, state="running", busy=1.0, stack=LOADING)
    assert cause([report(0), report(1), spinning]) == (
        (2,),
        "rank 2 is outside the collective the others wait in: step after step 7, running, spinning (100% of a core)",
    )
    assert cause([report(0, phase="checkpoint", state="disk-sleep"), report(1)])[0] == (0,)
    found, why = cause([report(0, phase="checkpoint", stack=LOADING), report(1), report(2)])
    assert found == (0,) and "rank 0 is behind the others: checkpoint after step 7" in why
    assert cause([report(0), report(1, step=6), report(2, step=6)])[1].startswith("ranks 1, 2 are behind the others")
    both = cause([report(0, state="stopped"), report(1, state="stopped")])
    assert both == ((0, 1), "ranks 0, 1 are stopped, by a signal or a debugger: step after step 7")
    assert cause([report(0), report(1)]) == ((), "all ranks answer and stand at the same place; the stacks tell where")
    assert cause([]) == ((), "torchrun runs no rank")


def test_incidents_are_kept_in_their_order_for_machines_and_for_people(folders: RunFolders) -> None:
    killed = Incident("killed", "rank 1 ended with exit code -9 (SIGKILL)", (1,), -9, 40, "last line\n")
    hung = Incident("hung", "no sign of life", (), -9, 41, "", reports=(report(0), report(1, stack="")))
    assert [keep(folders, incident).name for incident in (killed, hung)] == ["001.json", "002.json"]
    first, second = (path.read_text() for path in sorted(folders.incidents.glob("*.txt")))
    assert "killed: rank 1 ended with exit code -9 (SIGKILL)" in first and "last line" in first
    assert "in all_reduce" in second and "it did not answer when asked for its stack" in second
    assert "silent for 130.0 s; sleeping in futex_wait" in second
