"""Whole runs as real gangs: torchrun, DeepSpeed, 1 and 2 ranks, stopped, killed and resumed."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from infra.launch.local import GangFailed, LocalGang, StageLaunch, command, environment
from model.recipe import StageRecipe
from model.training import checkpoint
from model.training.run import RunFolders, read_progress
from tests.tiny_stage import Inputs, stage, write_inputs

STEPS: dict[str, Any] = {"steps": 12, "unmasked_steps": 4, "checkpoint_every": 2, "log_every": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> RunFolders:
    """A run of two ranks that nothing disturbed."""
    folders = inputs.folders(tmp_path_factory.mktemp("finished"))
    assert start(stage(world_size=2, **STEPS), folders).wait(200) == "succeeded"
    return folders


def start(recipe: StageRecipe, folders: RunFolders) -> LocalGang:
    return LocalGang.start(StageLaunch(recipe, folders))


def until(condition: Callable[[], bool], gang: LocalGang, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert gang.status() == "running", gang.tail()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def steps_saved(folders: RunFolders) -> int:
    folder = checkpoint.latest(folders.checkpoints) if folders.checkpoints.exists() else None
    return 0 if folder is None else int(folder.name.removeprefix("step-"))


def kill_everything(gang: LocalGang) -> None:
    torchrun = psutil.Process(gang.pid)
    for process in [torchrun, *torchrun.children(recursive=True)]:
        process.kill()


def weights(folders: RunFolders) -> dict[str, torch.Tensor]:
    state = checkpoint.load(folders.checkpoints / "step-00000016")
    return {
        f"{part}:{name}": tensor
        for part in ("model", "ema", "optimizer")
        for name, tensor in getattr(state, part).items()
    }


def test_a_run_stopped_then_killed_ends_where_an_undisturbed_one_does(
    inputs: Inputs, finished: RunFolders, tmp_path: Path
) -> None:
    recipe, folders = stage(world_size=2, **STEPS), inputs.folders(tmp_path / "run")
    gang = start(recipe, folders)
    until(lambda: bool(read_progress(folders.progress)), gang)
    assert gang.terminate() == "stopped", gang.tail()
    stopped_at = steps_saved(folders)
    assert 0 < stopped_at < 16

    gang = start(recipe, folders)
    until(lambda: steps_saved(folders) > stopped_at, gang)
    kill_everything(gang)
    with pytest.raises(GangFailed) as caught:
        gang.wait(60)
    assert caught.value.exit_code == -signal.SIGKILL
    assert stopped_at < steps_saved(folders) < 16

    assert start(recipe, folders).wait(200) == "succeeded"
    undisturbed, resumed = weights(finished), weights(folders)
    assert undisturbed.keys() == resumed.keys()
    assert [name for name, tensor in undisturbed.items() if not torch.equal(tensor, resumed[name])] == []
    assert [line.step for line in read_progress(folders.progress)] == list(range(1, 17))


def test_one_rank_trains_as_two_do_on_the_same_global_batch(
    inputs: Inputs, finished: RunFolders, tmp_path: Path
) -> None:
    """And a launcher that dies takes its ranks along, so that the next one finds the run free and resumes it."""
    recipe, folders = stage(world_size=1, **STEPS), inputs.folders(tmp_path / "run")
    gang = start(recipe, folders)
    until(lambda: steps_saved(folders) > 0, gang)
    os.kill(gang.pid, signal.SIGKILL)
    again = start(recipe, folders)
    with pytest.raises(GangFailed, match="torchrun ended with exit code -9"):
        gang.wait(60)
    assert again.wait(200) == "succeeded"
    assert "resumed after step" in again.tail()
    one, two = read_progress(folders.progress), read_progress(finished.progress)
    assert [line.loss for line in one] == pytest.approx([line.loss for line in two], abs=1e-5)
    together = weights(finished)
    for name, tensor in weights(folders).items():
        if name.startswith("ema:"):
            torch.testing.assert_close(tensor, together[name], atol=1e-5, rtol=1e-4)


def test_a_stage_grows_from_its_parent_with_image_conditions(
    inputs: Inputs, finished: RunFolders, tmp_path: Path
) -> None:
    parent = checkpoint.latest(finished.checkpoints)
    folders = inputs.folders(tmp_path / "run", initial=parent)
    gang = start(stage("ti2v", steps=3, unmasked_steps=1, log_every=1), folders)
    assert gang.wait(200) == "succeeded"
    assert "grown: " in gang.tail()
    assert [line.step for line in read_progress(folders.progress)] == [1, 2, 3, 4]
    assert not folders.metrics_port.exists()


def test_a_run_that_diverges_says_where_and_what_is_left(inputs: Inputs, tmp_path: Path) -> None:
    recipe = stage(steps=4, checkpoint_every=1)
    wild = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": 1e30, "warmup_steps": 0})})
    folders = inputs.folders(tmp_path / "run")
    with pytest.raises(GangFailed, match=r"(?s)rank 0 ended with exit code 1.*Diverged: step \d.*last good") as caught:
        start(wild, folders).wait(200)
    assert str(folders.checkpoints / "step-00000001") in str(caught.value)
    assert (caught.value.rank, caught.value.exit_code) == (0, 1)


def test_ranks_see_no_secret_and_share_the_cores() -> None:
    given = {"PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "x", "HF_TOKEN": "x", "CUDA_VISIBLE_DEVICES": "0", "API_KEY": "x"}
    seen = environment({**given, "PYTHONPATH": "/mine"}, world_size=1)
    assert seen.keys() == {"PATH", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"}
    assert seen["PYTHONPATH"].endswith("/mine")
    assert seen["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert environment(given, world_size=1000)["OMP_NUM_THREADS"] == "1"


def test_the_command_is_torchrun_over_the_rank_module(tmp_path: Path) -> None:
    folders = RunFolders(tmp_path / "data", tmp_path / "codec", tmp_path / "run", tmp_path / "parent")
    line = command(StageLaunch(stage(world_size=2), folders, metrics_port=9000))
    assert line[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert line[line.index("--nproc-per-node") + 1] == "2"
    assert line[line.index("--initial") + 1] == str(tmp_path / "parent")
    assert line[line.index("--metrics-port") + 1] == "9000"
    assert "--initial" not in command(StageLaunch(stage(), RunFolders(tmp_path, tmp_path, tmp_path)))
