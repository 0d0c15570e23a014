"""However a stage is spread over ranks, and however often that changes, it learns what a single process would."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import folder as checkpoint
from model.checkpoint.reader import Reader
from tests import layout_ranks
from tests.ranks import run_ranks
from tests.tiny_stage import Inputs, stage, write_inputs

STEPS = 8


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def alone(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a single process."""
    run = tmp_path_factory.mktemp("alone")
    train(inputs, run, STEPS)
    return run


def train(inputs: Inputs, run: Path, steps: int, **training: Any) -> None:
    tree = stage("ti2v", micro_batch_size=2, **training).model_dump()
    recipe = type(stage()).model_validate({**tree, "parent": None})
    run_ranks(recipe.training.world_size, layout_ranks.train, recipe, inputs.folders(run), steps)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint.latest(run / "checkpoints")
    assert folder is not None
    reader = Reader(folder)
    assert reader.step == STEPS
    parts = {part: reader.whole(part) for part in ("model", "ema", "optimizer")}
    return {f"{part}:{name}": x for part, whole in parts.items() for name, x in whole.items()}


def losses(run: Path) -> list[float]:
    return [float(line) for line in (run / "losses").read_text().split()]


def assert_same(run: Path, alone: Path) -> None:
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    found, expected = tensors(run), tensors(alone)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    "training",
    [
        {"world_size": 2, "zero_stage": 2},
        {"world_size": 2, "sequence_parallel": 2, "activation_checkpointing": True, "zero_stage": 1},
    ],
    ids=["shared", "split_clips"],
)
def test_a_stage_ends_where_a_single_process_does(
    training: dict[str, Any], inputs: Inputs, alone: Path, tmp_path: Path
) -> None:
    train(inputs, tmp_path, STEPS, **training)
    assert_same(tmp_path, alone)


def test_a_run_goes_on_over_other_ranks_and_stages(inputs: Inputs, alone: Path, tmp_path: Path) -> None:
    for world_size, zero_stage in ((1, 0), (2, 1), (4, 2), (1, 1)):
        train(inputs, tmp_path, STEPS // 4, world_size=world_size, zero_stage=zero_stage)
    assert_same(tmp_path, alone)
