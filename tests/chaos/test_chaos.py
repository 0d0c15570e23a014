"""Real gangs of two ranks, struck at random points: what they leave is what undisturbed ones leave, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infra.launch.hang import Patience
from infra.launch.local import GangFailed, GangStatus, LocalGang, StageLaunch, end_processes
from infra.launch.supervise import CONTROLLER_LOCK, Restarts, supervise
from model.checkpoint import folder as checkpoint
from model.recipe import StageRecipe, dumps
from model.training.heartbeat import read_beat
from model.training.run import RunBusy, RunFolders, exclusive, read_progress
from monitoring import metrics
from tests.chaos.monkey import Blow, Monkey, random_blows
from tests.tiny_stage import Inputs, stage, write_inputs

KILLS = 5
NIGHTLY_KILLS = 100
STEPS_APART = 8
SEED = 1
PATIENCE = Patience(compile=60.0, step=10.0, checkpoint=10.0, leave=60.0)
"""Short, but longer than a machine that is busy with something else keeps a step waiting."""
SOON = Restarts(first_delay=0.1)
KINDS = {signal.SIGKILL: "killed", signal.SIGTERM: "stopped", signal.SIGSTOP: "hung"}
WAIT_SECONDS = 180.0

pytestmark = pytest.mark.timeout(600)


def recipe_of(kills: int) -> StageRecipe:
    """Long enough for that many kills, each some steps after the one before."""
    steps = (kills + 1) * STEPS_APART
    return stage(world_size=2, steps=steps - 4, unmasked_steps=4, checkpoint_every=3, log_every=1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalGang]:
    """The short run that nobody strikes."""
    gang = LocalGang.start(StageLaunch(recipe_of(KILLS), inputs.folders(tmp_path_factory.mktemp("undisturbed"))))
    assert gang.wait(WAIT_SECONDS) == "succeeded", gang.tail()
    yield gang


@contextmanager
def cleared(folders: RunFolders) -> Iterator[None]:
    """Whatever a test leaves running is killed."""
    try:
        yield
    finally:
        end_processes(folders, grace=0.0)


def struck(recipe: StageRecipe, folders: RunFolders, blows: Sequence[Blow], restarts: Restarts = SOON) -> GangStatus:
    monkey = Monkey(folders, blows)
    monkey.start()
    with cleared(folders):
        status = supervise(StageLaunch(recipe, folders), patience=PATIENCE, restarts=restarts)
    assert monkey.dealt == len(blows), f"{monkey.dealt} blows of {len(blows)} were dealt before the run was over"
    return status


def incidents(folders: RunFolders) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folders.incidents.glob("*.json"))]


def tensors(folders: RunFolders) -> dict[str, torch.Tensor]:
    """All of the last checkpoint that a run decides: python's and numpy's generators have no seed of ours."""
    folder = checkpoint.latest(folders.checkpoints)
    assert folder is not None
    weights = {part: checkpoint.load_weights(folder, part) for part in ("model", "ema")}
    found = weights | {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    return {
        f"{origin}/{name}": tensor
        for origin, named in found.items()
        for name, tensor in named.items()
        if name not in ("python", "numpy")
    }


def assert_same(folders: RunFolders, other: RunFolders) -> None:
    """Every tensor, and every loss on the way."""
    here, there = tensors(folders), tensors(other)
    assert here.keys() == there.keys()
    assert len(here) > 100
    assert [name for name in there if not torch.equal(here[name], there[name])] == []
    assert [(line.step, line.loss) for line in read_progress(folders.progress)] == [
        (line.step, line.loss) for line in read_progress(other.progress)
    ]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_five_blows_at_random_points_leave_no_trace_in_what_is_trained(
    inputs: Inputs, undisturbed: LocalGang, tmp_path: Path
) -> None:
    """One of each sort: a rank killed while it starts, hung between steps, told to stop, killed as a checkpoint is
    written, and torchrun killed."""
    soon = random.Random(SEED).uniform
    blows = [
        Blow(signal.SIGKILL, rank=1, phase="start", delay=soon(0, 3)),
        Blow(signal.SIGSTOP, rank=1, phase="step", step=6, delay=soon(0, 0.1)),
        Blow(signal.SIGTERM, rank=0, phase="step", step=14, delay=soon(0, 0.1)),
        Blow(signal.SIGKILL, rank=0, phase="checkpoint", step=21, delay=soon(0, 0.02)),
        Blow(signal.SIGKILL, rank=0, phase="step", step=31, delay=soon(0, 0.1), to="torchrun"),
    ]
    assert len(blows) == KILLS
    before = metrics.STAGE_INCIDENTS_TOTAL.labels(stage="t2v", kind="hung")._value.get()
    folders = inputs.folders(tmp_path / "run")
    assert struck(recipe_of(KILLS), folders, blows) == "succeeded"
    assert_same(folders, undisturbed.launch.folders)

    found = incidents(folders)
    assert [incident["kind"] for incident in found] == [KINDS[blow.signal] for blow in blows]
    assert [incident["ranks"] for incident in found if incident["kind"] == "killed"] == [[1], [0], []]
    steps = [incident["step"] for incident in found]
    assert steps == sorted(steps) and steps[0] == 0 < steps[1]
    assert metrics.STAGE_INCIDENTS_TOTAL.labels(stage="t2v", kind="hung")._value.get() == before + 1

    hung = found[1]
    assert hung["ranks"] == [1]
    assert "rank 1 is stopped, by a signal or a debugger: step after step" in hung["why"]
    waiting, stopped = hung["reports"]
    assert (waiting["state"], stopped["state"]) == ("sleeping", "stopped")
    assert stopped["silent_seconds"] >= PATIENCE.step
    assert "model/training/loop.py" in stopped["stack"] and "torch/distributed" in waiting["stack"]
    text = next(folders.incidents.glob("002.txt")).read_text()
    assert "rank 1 is stopped" in text and "in train" in text


@pytest.mark.slow
@pytest.mark.timeout(NIGHTLY_KILLS * 180)
def test_a_hundred_blows_at_random_points_leave_no_trace_in_what_is_trained(inputs: Inputs, tmp_path: Path) -> None:
    recipe = recipe_of(NIGHTLY_KILLS)
    blows = random_blows(NIGHTLY_KILLS, seed=SEED, steps_apart=STEPS_APART)
    straight, folders = inputs.folders(tmp_path / "straight"), inputs.folders(tmp_path / "run")
    assert supervise(StageLaunch(recipe, straight)) == "succeeded"
    assert struck(recipe, folders, blows) == "succeeded"
    assert_same(folders, straight)
    assert len(incidents(folders)) >= NIGHTLY_KILLS


def test_a_controller_that_is_stopped_or_killed_is_followed_by_one_that_goes_on(
    inputs: Inputs, undisturbed: LocalGang, tmp_path: Path
) -> None:
    folders = inputs.folders(tmp_path / "run")
    (tmp_path / "recipe.json").write_text(dumps(recipe_of(KILLS)))
    command = [sys.executable, "-m", "tests.chaos.controller"]
    paths = [tmp_path / "recipe.json", folders.data, folders.codec, folders.run]

    def beyond(step: int) -> int:
        """The process of rank 1, once it has done more steps."""
        until(lambda: (beat := read_beat(folders, 1)) and beat.phase == "step" and beat.step > step)
        beat = read_beat(folders, 1)
        assert beat is not None
        return beat.pid

    with cleared(folders):
        with subprocess.Popen([*command, *map(str, paths)], stdout=subprocess.PIPE, text=True) as controller:
            beyond(5)
            controller.terminate()
            told, _ = controller.communicate(timeout=WAIT_SECONDS)
        assert (told, controller.returncode) == ("stopped\n", 0)
        with exclusive(folders.run, patience=0.0):  # no rank is left
            saved = checkpoint.latest(folders.checkpoints)
        assert saved is not None

        with subprocess.Popen([*command, *map(str, paths)], stdout=subprocess.PIPE, text=True) as controller:
            orphan = beyond(20)
            controller.kill()
        os.kill(orphan, 0)  # its ranks train on
        assert supervise(StageLaunch(recipe_of(KILLS), folders), patience=PATIENCE) == "succeeded"
        with pytest.raises(ProcessLookupError):
            os.kill(orphan, 0)
    assert incidents(folders) == []
    assert_same(folders, undisturbed.launch.folders)


@pytest.mark.slow
def test_two_controllers_do_not_share_a_run(inputs: Inputs, tmp_path: Path) -> None:
    folders = inputs.folders(tmp_path / "run")
    with exclusive(folders.run, name=CONTROLLER_LOCK), pytest.raises(RunBusy, match=str(os.getpid())):
        supervise(StageLaunch(recipe_of(1), folders))


def test_a_killed_gang_starts_again_and_one_that_crashes_does_not(inputs: Inputs, tmp_path: Path) -> None:
    recipe = recipe_of(KILLS)
    optimizer = recipe.optimizer.model_copy(update={"lr": 1e30, "warmup_steps": 0})
    folders = inputs.folders(tmp_path / "run")
    blow = Blow(signal.SIGKILL, rank=0, phase="start")
    with pytest.raises(
        GangFailed, match=r"(?s)rank \d ended with exit code 1 \(kept in .*002.json\).*Diverged"
    ) as caught:
        struck(recipe.model_copy(update={"optimizer": optimizer}), folders, [blow])
    assert [incident["kind"] for incident in incidents(folders)] == ["killed", "crashed"]
    assert [path.name for path in caught.value.incidents] == ["001.json", "002.json"]
    assert caught.value.exit_code == 1


def test_a_gang_that_is_lost_again_and_again_without_a_step_is_given_up(inputs: Inputs, tmp_path: Path) -> None:
    folders = inputs.folders(tmp_path / "run")
    blows = [Blow(signal.SIGKILL, rank=rank, phase="start") for rank in (0, 1)]
    with pytest.raises(GangFailed, match=r"2 times in a row without getting beyond step 0, .*SIGKILL.*002\.json"):
        struck(recipe_of(KILLS), folders, blows, Restarts(without_progress=2, first_delay=0.1))
    assert [incident["ranks"] for incident in incidents(folders)] == [[0], [1]]


def test_starts_wait_longer_the_longer_nothing_helps() -> None:
    restarts = Restarts()
    assert [restarts.delay(in_a_row) for in_a_row in (0, 1, 2)] == [1.0, 2.0, 4.0]
    assert restarts.delay(1000) == restarts.longest_delay
