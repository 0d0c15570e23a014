"""Whole runs as real gangs: torchrun, DeepSpeed, 1 and 2 ranks, stopped, orphaned, killed and resumed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from infra.ingest import ingest
from infra.launch.local import GangFailed, LocalGang, StageLaunch, command, environment
from infra.launch.stage import run_stage
from infra.registry.registry import Registry
from infra.store.location import open_store
from model.checkpoint import folder as checkpoint
from model.checkpoint.reader import Reader
from model.checkpoint.state import PARTS
from model.config import CorpusConfig, GateRule
from model.recipe import Curriculum, StageRecipe
from model.training.heartbeat import Heartbeat
from model.training.prepare import latest_of
from model.training.run import RunFolders, read_progress
from monitoring.goodput import read
from tests.tiny_stage import Inputs, stage, write_inputs

STEPS: dict[str, Any] = {"steps": 12, "unmasked_steps": 4, "checkpoint_every": 2, "log_every": 1}
TOTAL_STEPS = 16
A_FINITE_NUMBER = GateRule(metric="heldout_loss", op="<", bound=1e9)
PATIENCE = 120.0
"""Seconds for a run of a second and a start of ten, on a machine that may be busy."""

Start = Callable[[StageRecipe, RunFolders], LocalGang]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalGang]:
    """A run of two ranks that nobody stops; it goes on in the background of the first test."""
    folders = inputs.folders(tmp_path_factory.mktemp("undisturbed"))
    gang = LocalGang.start(StageLaunch(stage(world_size=2, **STEPS), folders))
    yield gang
    kill_everything(gang)


@pytest.fixture
def start() -> Iterator[Start]:
    gangs: list[LocalGang] = []

    def start_one(recipe: StageRecipe, folders: RunFolders) -> LocalGang:
        gangs.append(LocalGang.start(StageLaunch(recipe, folders)))
        return gangs[-1]

    yield start_one
    for gang in gangs:
        kill_everything(gang)


def kill_everything(gang: LocalGang) -> None:
    if gang.status() == "running":
        torchrun = psutil.Process(gang.pid)
        for process in [torchrun, *torchrun.children(recursive=True)]:
            process.kill()


def until(condition: Callable[[], bool], gang: LocalGang) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert gang.status() == "running", gang.tail()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def steps_saved(folders: RunFolders) -> int:
    folder = checkpoint.latest(folders.checkpoints) if folders.checkpoints.exists() else None
    return 0 if folder is None else int(folder.name.removeprefix("step-"))


def final(gang: LocalGang) -> dict[str, torch.Tensor]:
    """What a run that has done all its steps leaves behind, all in one."""
    assert gang.wait(PATIENCE) == "succeeded", gang.tail()
    saved = Reader(gang.launch.folders.checkpoints / f"step-{TOTAL_STEPS:08d}")
    return {f"{part}:{name}": tensor for part in PARTS for name, tensor in saved.whole(part).items()}


def losses(gang: LocalGang) -> list[float]:
    lines = read_progress(gang.launch.folders.progress)
    assert [line.step for line in lines] == list(range(1, TOTAL_STEPS + 1))
    return [line.loss for line in lines]


def test_one_rank_stopped_and_orphaned_trains_as_two_undisturbed_do(
    inputs: Inputs, undisturbed: LocalGang, start: Start, tmp_path: Path
) -> None:
    recipe, folders = stage(world_size=1, **STEPS), inputs.folders(tmp_path / "run")
    gang = start(recipe, folders)
    until(lambda: bool(read_progress(folders.progress)), gang)
    assert gang.terminate() == "stopped", gang.tail()
    stopped_at = steps_saved(folders)
    assert stopped_at == read_progress(folders.progress)[-1].step < TOTAL_STEPS

    gang = start(recipe, folders)
    until(lambda: steps_saved(folders) > stopped_at, gang)
    os.kill(gang.pid, signal.SIGKILL)  # torchrun alone: its rank saves and goes, and the next launch waits for that
    again = start(recipe, folders)
    with pytest.raises(GangFailed, match="torchrun ended with exit code -9"):
        gang.wait(PATIENCE)
    one = final(again)
    assert "resumed after step" in again.tail()

    two = final(undisturbed)
    assert losses(again) == pytest.approx(losses(undisturbed), abs=1e-5)
    for name in one:
        if not name.startswith("optimizer:"):
            torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)


def test_two_ranks_killed_end_where_undisturbed_ones_do_bit_for_bit(
    inputs: Inputs, undisturbed: LocalGang, start: Start, tmp_path: Path
) -> None:
    recipe, folders = stage(world_size=2, **STEPS), inputs.folders(tmp_path / "run")
    began = time.time_ns()
    gang = start(recipe, folders)
    until(lambda: steps_saved(folders) > 0, gang)
    kill_everything(gang)
    with pytest.raises(GangFailed) as caught:
        gang.wait(PATIENCE)
    assert caught.value.exit_code == -signal.SIGKILL
    assert 0 < steps_saved(folders) < TOTAL_STEPS

    gang = start(recipe, folders)
    resumed, straight = final(gang), final(undisturbed)
    assert resumed.keys() == straight.keys()
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []
    assert losses(gang) == losses(undisturbed)

    booked, whole = read(folders.goodput), read(undisturbed.launch.folders.goodput)
    assert booked is not None and whole is not None
    assert (booked.restarts, whole.restarts, whole.spent["lost_to_restart"]) == (1, 0, 0)
    assert booked.spent["lost_to_restart"] > 0 and min(booked.spent["step"], booked.spent["data_wait"]) > 0
    assert sum(booked.spent.values()) == booked.elapsed
    # All of it but what torchrun took before its first rank and after its last.
    assert 0.3 * (time.time_ns() - began) < booked.elapsed < time.time_ns() - began


def test_a_stage_grows_from_its_parent_and_says_where_it_diverged(
    inputs: Inputs, undisturbed: LocalGang, start: Start, tmp_path: Path
) -> None:
    final(undisturbed)
    recipe = stage("ti2v", steps=4, checkpoint_every=1)
    wild = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": 1e30, "warmup_steps": 0})})
    folders = inputs.folders(tmp_path / "run", initial=checkpoint.latest(undisturbed.launch.folders.checkpoints))
    gang = start(wild, folders)
    with pytest.raises(GangFailed, match=r"(?s)rank 0 ended with exit code 1.*Diverged: step \d.*last good") as caught:
        gang.wait(PATIENCE)
    assert (caught.value.rank, caught.value.exit_code) == (0, 1)
    assert str(folders.checkpoints / f"step-{steps_saved(folders):08d}") in str(caught.value)
    log = gang.tail(lines=100)
    assert re.search(r"grown: \d+ weights copied, 0 inflated, 0 new", log), log


def ema_of(folders: RunFolders) -> dict[str, torch.Tensor]:
    """Of the last step's checkpoint."""
    folder = checkpoint.latest(folders.checkpoints)
    assert folder is not None and folder.name == f"step-{TOTAL_STEPS:08d}"
    return checkpoint.load_weights(folder, "ema")


@pytest.mark.slow
def test_an_empty_machine_goes_on_from_the_store_of_checkpoints(inputs: Inputs, tmp_path: Path) -> None:
    recipe, folders, store = stage(**STEPS), inputs.folders(tmp_path / "run"), str(tmp_path / "store")
    gang = LocalGang.start(StageLaunch(recipe, folders, checkpoint_store=store))
    assert gang.wait(PATIENCE) == "succeeded"
    weights = ema_of(folders)

    elsewhere = inputs.folders(tmp_path / "elsewhere")
    gang = LocalGang.start(StageLaunch(recipe, elsewhere, checkpoint_store=store))
    assert gang.wait(PATIENCE) == "succeeded"
    assert not read_progress(elsewhere.progress), "it had nothing left to do"
    found = ema_of(elsewhere)
    assert all(torch.equal(found[name], x) for name, x in weights.items())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_joint_start_takes_time_from_one_promoted_parent_and_the_rest_from_the_other(tmp_path: Path) -> None:
    images, videos = short("t2i", lr=1e-3), short("t2v", lr=1e-3)
    # So small a rate that the weights end where they began: what was grown is what is published.
    joint = short("t2v", lr=1e-12, name="joint", parent="t2i", temporal_parent="t2v")
    registry = Registry(open_store(str(tmp_path / "store")))
    corpus = CorpusConfig(
        shapes=16, heldout_shapes=8, num_frames=4, gate=(GateRule(metric="train_samples", op=">=", bound=1),)
    )
    curriculum = Curriculum(name="joint", corpus=corpus, stages=(images, videos, joint))
    ingest(registry, curriculum, tmp_path / "ingest", videos=None, who="tests")

    outcomes = {
        stage.name: run_stage(stage, registry, tmp_path / "work", who="tests", on_progress=lambda _: None)
        for stage in curriculum.stages
    }
    done = {name: outcome.checkpoint for name, outcome in outcomes.items()}
    for outcome in outcomes.values():
        assert outcome.booked is not None and outcome.booked.restarts == 0
        spent = outcome.booked.seconds
        assert all(spent[account] > 0 for account in ("init", "step", "checkpoint_stall", "evaluation"))
    parents = done["joint"].parents
    assert (parents["checkpoint"], parents["temporal_checkpoint"]) == (done["t2i"].digest, done["t2v"].digest)

    weights = {
        name: checkpoint.load_weights(registry.fetch(manifest, tmp_path / "fetched" / name), "ema")
        for name, manifest in done.items()
    }
    for name, weight in weights["joint"].items():
        parent = weights["t2v" if ".temporal." in name else "t2i"]
        if weight.shape == parent[name].shape:  # not what is inflated
            torch.testing.assert_close(weight, parent[name], atol=1e-6, rtol=0)
    assert not torch.equal(
        weights["t2i"]["blocks.0.spatial.query.weight"], weights["t2v"]["blocks.0.spatial.query.weight"]
    )

    state = Reader(tmp_path / "fetched" / "joint")
    assert {"initial", "initial_temporal"} <= state.inputs.keys()
    run = RunFolders(tmp_path, tmp_path, tmp_path / "work" / "joint")
    other = {**state.inputs, "initial_temporal": state.inputs["initial"]}
    with pytest.raises(ValueError, match="initial_temporal was"):
        latest_of(joint, run, other)

    elsewhere = corpus.model_copy(update={"seed": 7})
    ingest(registry, curriculum.model_copy(update={"corpus": elsewhere}), tmp_path / "again", videos=None, who="tests")
    with pytest.raises(ValueError, match=r"'t2i/promoted' was trained on codec \w+, and 'codec/promoted' is \w+"):
        run_stage(joint, registry, tmp_path / "new", who="tests", on_progress=lambda _: None)


def short(task: str, *, lr: float, **fields: Any) -> StageRecipe:
    """A stage of two steps that measures little and refuses nothing."""
    made = stage(task, steps=2, unmasked_steps=0).model_dump()
    made |= {
        "optimizer": {"lr": lr, "warmup_steps": 0},
        "sampling": {"num_steps": 1},
        "evaluation": {"heldout_clips": 4, "sample_prompts": 2},
        "gate": (A_FINITE_NUMBER,),
        **fields,
    }
    return StageRecipe.model_validate(made)


FAILURES = """
W1122 23:00:00.0 11 torch/distributed/elastic/multiprocessing/api.py:1] Sending process 103 closing signal SIGTERM
Failures:
[1]:
  time      : 2026-11-22_23:00:00
  rank      : 1 (local_rank: 1)
  exitcode  : {exit_code} (pid: 102)
  error_file: <N/A>
[2]:
  time      : 2026-11-22_23:00:30
  rank      : 2 (local_rank: 2)
  exitcode  : -9 (pid: 103)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_23:00:00
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 101)
"""


def test_of_ranks_that_ended_together_the_cause_is_the_killed_one_or_the_first_to_fail(tmp_path: Path) -> None:
    folders = RunFolders(tmp_path, tmp_path, tmp_path)
    folders.logs.mkdir()
    log = folders.logs / "torchrun.log"
    with subprocess.Popen(["sh", "-c", "exit 1"]) as torchrun:
        gang = LocalGang(StageLaunch(stage(), folders), torchrun)
    log.write_text(FAILURES.format(exit_code=-9))  # rank 0 lost its connection to rank 1; torchrun killed rank 2
    assert (gang.failure().rank, gang.failure().exit_code) == (1, -9)
    assert str(gang.failure()) == "rank 1 ended with exit code -9 (SIGKILL)"

    log.write_text(FAILURES.format(exit_code=1))
    for rank in (1, 0):
        Heartbeat(folders, rank).end("failed", "ValueError")
    assert (gang.failure().rank, gang.failure().exit_code) == (1, 1)

    log.write_text("SignalException: Process 100 got signal: 15")
    assert (gang.failure().rank, gang.failure().exit_code) == (None, -signal.SIGTERM)


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
    assert "--initial-temporal" not in line
    assert line[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert line[line.index("--nproc-per-node") + 1] == "2"
    assert line[line.index("--initial") + 1] == str(tmp_path / "parent")
    assert line[line.index("--metrics-port") + 1] == "9000"
    joint = command(StageLaunch(stage(), replace(folders, initial_temporal=tmp_path / "videos")))
    assert joint[joint.index("--initial-temporal") + 1] == str(tmp_path / "videos")
    assert "--initial" not in command(StageLaunch(stage(), RunFolders(tmp_path, tmp_path, tmp_path)))
