"""A plan's memory against the tensors of a real engine, and against what follows from shapes by hand."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.catalog import recipe_path
from model.network.stiv import STIV
from model.planning import memory as planned
from model.planning.memory import Memory, memory, parameters
from model.recipe import StageRecipe, load
from tests import planning_ranks, tiny_stage
from tests.s3_server import free_ports

CASES = [
    {"zero_stage": 0, "precision": "bf16"},
    {"zero_stage": 0, "precision": "fp32"},
    {"zero_stage": 1, "precision": "fp32"},
    {"zero_stage": 1, "precision": "bf16"},
    {"zero_stage": 2, "precision": "bf16"},
]


def heavy_stage(**training: Any) -> StageRecipe:
    """Ten million parameters and next to no activations."""
    tree = tiny_stage.stage("t2v", global_batch_size=1, micro_batch_size=1, **training).model_dump()
    tree["network"] |= {"hidden_size": 384, "num_heads": 6}
    return StageRecipe.model_validate(tree)


def large(*overrides: str, stage: str = "t2v_256") -> StageRecipe:
    return load(recipe_path("m"), [f"{stage}.{override}" for override in overrides]).stage(stage)


@pytest.mark.slow
def test_the_peak_of_a_training_step_is_the_planned_one() -> None:
    recipes = [heavy_stage(**case) for case in CASES]
    trees = json.dumps([recipe.model_dump(mode="json") for recipe in recipes])
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-m", planning_ranks.__name__, trees],
        env={**os.environ, **place, "MASTER_PORT": str(free_ports(1)[0])},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    for case, recipe, peak in zip(CASES, recipes, measured, strict=True):
        assert memory(recipe).peak == pytest.approx(peak, rel=0.05), case


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_the_planned_one_within_a_tenth() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_m", "--quick"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"memory_ratio_to_plan\D+([\d.]+)", done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) == pytest.approx(1, abs=0.1)


def test_the_engine_reduces_as_many_values_at_a_time_as_the_plan_says() -> None:
    from model.training import parallel

    assert planned.GROUP_VALUES == parallel.GROUP_VALUES


def test_parameters_are_those_of_the_network() -> None:
    recipe = heavy_stage()
    with torch.device("meta"):
        network = STIV(recipe.network, latent_channels=4, text_size=384, pooled_size=384)
    assert parameters(recipe).total == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("zero_stage", "bytes_a_parameter"),
    # weights, gradients, masters, momentum; what all 64 ranks share is next to nothing
    [(0, 2 + 2 + 4 + 4 + 4 / 64), (1, 2 + 2 + 12 / 64), (2, 2 + 14 / 64)],
)
def test_zero_shares_what_its_stage_says(zero_stage: int, bytes_a_parameter: float) -> None:
    held = memory(large(f"training.zero_stage={zero_stage}"))
    total = parameters(large()).total
    assert held.resident - held.codec - held.second_moment == pytest.approx(bytes_a_parameter * total, rel=1e-6)


def test_zero_3_cuts_weights_too() -> None:
    adamw = ("optimizer.type='adamw'", "training.zero_stage=3")
    held, total = memory(large(*adamw)), parameters(large()).total
    assert held.weights == pytest.approx(2 * total / 64 + 2e9, rel=1e-6)
    assert held.second_moment == pytest.approx(4 * total / 64, rel=1e-6)


def test_factors_are_a_thousandth_of_adamws_second_moment() -> None:
    rows_and_columns, whole = (memory(large(f"optimizer.type='{kind}'")) for kind in ("adafactor", "adamw"))
    assert rows_and_columns.second_moment < 1e-3 * whole.second_moment


def test_gradients_of_several_micro_batches_are_summed_in_fp32() -> None:
    once, several = memory(large()), memory(large("training.micro_batch_size=2"))
    assert several.gradients == pytest.approx(2 * once.gradients)


def test_recomputing_keeps_a_tenth_of_the_activations_of_the_paper_s_largest_network() -> None:
    plain, recomputed = (
        memory(large(f"training.activation_checkpointing={value}")).activations for value in ("false", "true")
    )
    assert recomputed < 0.13 * plain


def test_ranks_that_share_a_clip_share_its_activations() -> None:
    alone, together = (
        memory(large(f"training.sequence_parallel={n}", "training.micro_batch_size=1")).activations for n in (1, 2)
    )
    assert 0.5 < together / alone < 0.7  # the bucket in which gradients are reduced is not shared


def test_masking_halves_activations_only_where_no_step_is_unmasked() -> None:
    with_unmasked = memory(large()).activations
    masked_alone = memory(large("training.unmasked_steps=0")).activations
    assert masked_alone < 0.7 * with_unmasked


def moonshot(*overrides: str) -> Memory:
    one = ("training.world_size=1", "training.global_batch_size=1", "training.micro_batch_size=1")
    return memory(large(*one, "training.unmasked_steps=0", *overrides))


def test_the_largest_network_trains_on_one_h200_with_adafactor_and_bf16_momentum_alone() -> None:
    from model.planning.gpu import GPUS

    there_is = planned.usable(GPUS["h200"])
    assert moonshot("optimizer.momentum='bf16'").peak < 0.95 * there_is
    assert moonshot().peak > there_is
    assert moonshot("optimizer.type='adamw'").peak > 1.2 * there_is


def test_the_peak_is_what_stays_and_the_most_of_what_passes() -> None:
    held = Memory(*[1] * len(asdict(memory(large()))))
    parts = asdict(held)
    assert held.resident == len(parts) - len(planned.PASSING)
    assert held.peak == held.resident + 1
