"""`stiv plan`: what a user reads, what the settings it prints do, and how its predictions must move."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from flows.catalog import recipe_path
from model.planning.gpu import GPUS, gpu_named, gpu_of
from model.planning.layout import Layout, spread
from model.planning.memory import usable
from model.planning.phase import phases
from model.planning.plan import SAFE, plan, weigh
from model.planning.speed import mfu, step_cost, step_time
from model.recipe import Curriculum, StageRecipe, load

Stiv = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stiv(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Stiv:
    """Run a command in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["stiv", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def curriculum(size: str, *overrides: str) -> Curriculum:
    return load(recipe_path(size), overrides)


def stage(*overrides: str, size: str = "xl", name: str = "t2v_256") -> StageRecipe:
    where = ("*" if override.startswith("vae.") else name for override in overrides)  # all stages have one codec
    return curriculum(size, *map("{}.{}".format, where, overrides)).stage(name)


def seconds(recipe: StageRecipe, gpu: str = "h200") -> float:
    """Of a masked step."""
    return step_time(phases(recipe)[0], GPUS[gpu]).total


def test_a_plan_shows_every_stage_its_memory_and_its_best_layout(stiv: Stiv) -> None:
    code, out, _ = stiv("plan", "xl", "--gpus", "64", "--gpu", "h200")
    assert code == 0
    for recipe in curriculum("xl").stages:
        assert out.count(recipe.name) >= 3
    for words in ("GPU-hours", "MFU", "masters", "activ.", "best layouts: --set", "Predicted"):
        assert words in out


def test_the_json_holds_bytes_seconds_and_operations(stiv: Stiv) -> None:
    code, out, _ = stiv("plan", "tiny", "--json")
    found = json.loads(out)
    assert code == 0 and found["gpus"] == 2 and found["gpu"]["name"] == "h200"
    best = [found_stage["best"] for found_stage in found["stages"]]
    assert found["days"] == pytest.approx(sum(layout["days"] for layout in best))
    assert found["gpu_hours"] == pytest.approx(found["days"] * 24 * 2)
    for layout in best:
        assert layout["peak"] >= layout["memory"]["weights"] + layout["memory"]["activations"]
        assert layout["phases"][0]["cost"]["model_flops"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "xl", "--gpu", "h201"), ["unknown gpu 'h201'", "h200", "l4"]),
        (("plan", "xl", "--gpus", "48"), ["t2i_256", "48 gpus", "global_batch_size 4096", "32 or 64"]),
        (("plan", "xl", "--gpus", "0"), ["--gpus 0"]),
        (
            ("plan", "m", "--gpus", "1", "--gpu", "l4"),
            ["t2i_256", "1 x l4", "GB above", "largest part", "zero_stage 2"],
        ),
    ],
)
def test_what_cannot_be_is_one_line_that_says_why(stiv: Stiv, arguments: tuple[str, ...], said: list[str]) -> None:
    code, _, err = stiv(*arguments)
    assert code == 1 and err.startswith("stiv: ") and err.count("\n") == 1
    for words in said:
        assert words in err


def test_what_does_not_fit_is_said_of_the_largest_part_and_by_how_much() -> None:
    adamw = curriculum(
        "m",
        *("*.optimizer.type='adamw'", "*.training.global_batch_size=1", "*.training.micro_batch_size=1"),
        "*.training.world_size=1",
    )
    with pytest.raises(ValueError, match=r"masters with \d+\.\d GB.*optimizer.type 'adafactor'"):
        plan(adamw, gpu_named("h200"))


def test_the_printed_settings_select_the_planned_layouts() -> None:
    before = plan(curriculum("m"), gpu_named("h200"), 128)
    after = curriculum("m", *before.settings)
    assert {s.name: Layout.of(s.training) for s in after.stages} == {s.name: s.best.layout for s in before.stages}
    assert plan(after, gpu_named("h200"), 128).settings == []


@pytest.mark.parametrize("size", ["xl", "xxl", "m"])
def test_the_built_in_recipes_fit_64_gpus_of_80_gb_as_they_are_written(size: str) -> None:
    planned = plan(curriculum(size), gpu_named("h100"), 64)
    for found in planned.stages:
        assert found.written is not None and found.written.fits, found.name
        assert found.best.seconds <= found.written.seconds


def test_the_best_layout_leaves_a_tenth_of_the_memory_where_one_does() -> None:
    for found in plan(curriculum("m"), gpu_named("h100"), 64).stages:
        assert found.best.memory.peak <= SAFE * usable(GPUS["h100"])


def test_a_network_too_large_for_its_activations_computes_them_again() -> None:
    def best(size: str) -> Layout:
        stages = plan(curriculum(size), gpu_named("h100"), 64).stages
        return next(found.best.layout for found in stages if found.name == "t2v_256")

    assert not best("xl").activation_checkpointing and best("m").activation_checkpointing


def test_a_layout_that_cannot_be_says_why() -> None:
    recipe = stage(size="m")
    with pytest.raises(ValueError, match=r"'t2v_256' on 64 ranks.*sequence_parallel 8 does not divide the clip's 10"):
        spread(recipe, replace(Layout.of(recipe.training), sequence_parallel=8))


def test_other_settings_of_training_are_kept() -> None:
    recipe = stage("training.gradient_clip=0.5")
    moved = spread(recipe, replace(Layout.of(recipe.training), micro_batch_size=4))
    assert moved.training.micro_batch_size == 4
    assert moved.training == recipe.training.model_copy(update={"micro_batch_size": 4})


@pytest.mark.parametrize(
    ("faster", "slower"),
    [
        ((), ("training.precision='fp32'",)),
        (("training.compile=true",), ()),
        ((), ("training.mask_ratio=0",)),
        (("training.activation_checkpointing=false",), ()),
        ((), ("training.micro_batch_size=1",)),  # ZeRO 2 reduces gradients after every micro-batch
        (("vae.type='patch_pca'",), ()),  # nothing to convolve
    ],
)
def test_a_choice_moves_the_predicted_step_the_right_way(faster: tuple[str, ...], slower: tuple[str, ...]) -> None:
    assert seconds(stage(*faster)) < seconds(stage(*slower))


def test_a_step_takes_longer_than_its_operations_at_the_cards_peak() -> None:
    for size in ("xl", "xxl", "m"):
        for recipe in curriculum(size).stages:
            for phase in phases(recipe):
                cost, time = step_cost(phase), step_time(phase, GPUS["h200"])
                assert 0.02 < mfu(recipe.training, cost, time.total, GPUS["h200"]) < 0.6
                assert cost.hardware_flops / time.total < 64 * GPUS["h200"].bf16


def test_mfu_at_the_published_workload_is_near_the_published_one() -> None:
    """ST-DiT-12B on H100: 40.7 % (arXiv 2503.12964, table 2). Ours of like width, on clips as long, without a codec."""
    recipe = stage(
        *("training.compile=true", "vae.type='patch_pca'", "training.mask_ratio=0", "video.num_frames=40"),
        *("network.rope_temporal_scale=0.5", "training.global_batch_size=256", "training.micro_batch_size=4"),
        *("video.height=512", "video.width=512"),
        size="m",
    )
    phase = phases(recipe)[-1]
    time = step_time(phase, GPUS["h100"])
    assert mfu(recipe.training, step_cost(phase), time.total, GPUS["h100"]) == pytest.approx(0.407, abs=0.08)


def test_a_stage_lasts_its_steps() -> None:
    recipe = stage()
    whole = weigh(recipe, GPUS["h200"])
    masked, unmasked = whole.phases
    assert (masked.steps, unmasked.steps) == (400_000, 100_000)
    assert whole.seconds == pytest.approx(400_000 * masked.time.total + 100_000 * unmasked.time.total)
    assert whole.seconds == pytest.approx(weigh(stage("training.steps=200_000"), GPUS["h200"]).seconds * 1.7, rel=0.2)


def test_operations_are_those_of_tables_13_and_14() -> None:
    """1e21 for T2V-256, all its masked steps; `test_paper_recipes` says how near the paper's 2.05 that is."""
    phase = phases(stage())[0]
    assert phase.steps * step_cost(phase).model_flops == pytest.approx(2.33e21, rel=0.01)
    assert step_cost(phase).tokens == 1024 * 10 * 256


@pytest.mark.parametrize(
    ("card", "name"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100_pcie")]
)
def test_a_card_is_found_by_the_drivers_name_for_it(card: str, name: str) -> None:
    found = gpu_of(card)
    assert found is not None and found.name == name


def test_a_card_without_figures_is_none() -> None:
    assert gpu_of("NVIDIA GeForce GTX 980") is None


def test_every_card_can_be_planned_for() -> None:
    recipe: Any = stage()
    for gpu in GPUS.values():
        assert 0 < usable(gpu) < gpu.memory
        assert math.isfinite(weigh(recipe, gpu).seconds)
