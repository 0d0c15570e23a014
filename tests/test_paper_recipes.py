"""The paper's sizes and stages as recipes: Table 1's parameters, Tables 13 and 14's FLOPs, the guide's choices."""

import re
from pathlib import Path

import pytest
import torch

from flows.catalog import recipe_path
from model.network.flops import training_flops
from model.network.stiv import STIV
from model.recipe import Curriculum, StageRecipe, load
from model.training.grow import grow

GUIDE = Path(__file__).parents[1] / "docs" / "train.md"
GRAPH = {
    "t2i_256": (None, None),
    "t2i_512": ("t2i_256", None),
    "t2v_256": ("t2i_256", None),
    "ti2v_256": ("t2v_256", None),
    "t2v_256_40": ("t2v_256", None),
    "t2v_512": ("t2i_512", "t2v_256"),
    "ti2v_512": ("t2v_512", None),
    "t2v_512_sft": ("t2v_512", None),
    "t2v_512_unmasked_sft": ("t2v_512", None),
}
"""Paper Fig. 4: stage, parent, temporal parent."""


def curriculum(size: str, *overrides: str) -> Curriculum:
    return load(recipe_path(size), overrides)


def flops(stage: StageRecipe, *, text_tokens: int) -> tuple[float, float]:
    """Of a whole stage, in 1e21: its masked steps, its unmasked ones."""
    factor = stage.vae.spatial_factor
    latents = (
        stage.video.num_frames,
        stage.vae.latent_channels,
        stage.video.height // factor,
        stage.video.width // factor,
    )
    batch = stage.training.global_batch_size / 1e21
    masked, unmasked = (
        training_flops(stage.network, latents, text_tokens, ratio) for ratio in (stage.training.mask_ratio, 0.0)
    )
    return masked * batch * stage.training.steps, unmasked * batch * stage.training.unmasked_steps


@pytest.mark.parametrize("size", ["xl", "xxl", "m"])
def test_every_size_has_the_papers_stage_graph(size: str) -> None:
    stages = {stage.name: (stage.parent, stage.temporal_parent) for stage in curriculum(size).stages}
    assert {name: stages[name] for name in GRAPH} == GRAPH


@pytest.mark.parametrize(
    ("size", "stage", "billions"),
    [
        ("xl", "t2i_256", 0.603),
        ("xl", "t2v_256", 0.751),
        ("xxl", "t2i_512", 1.449),
        ("xxl", "ti2v_512", 1.807),
        ("m", "t2v_512", 8.739),
    ],
)
def test_a_size_has_the_papers_number_of_parameters(size: str, stage: str, billions: float) -> None:
    """Table 1 counts blocks and the shared AdaLN, of XL and XXL without temporal attention; the rest adds up to 3 %."""
    recipe = curriculum(size).stage(stage)
    with torch.device("meta"):
        net = STIV(recipe.network, latent_channels=recipe.vae.latent_channels, text_size=1280, pooled_size=1280)
    assert billions < sum(parameter.numel() for parameter in net.parameters()) / 1e9 < 1.03 * billions


@pytest.mark.parametrize(
    ("stage", "unmasked", "counted", "paper"),
    [
        ("t2i_256", False, 0.71, 1.11),
        ("t2i_256", True, 0.88, 1.11),
        ("t2i_512", False, 0.83, 0.843),
        ("t2v_256", False, 2.29, 2.05),
        ("t2v_512", False, 2.03, 1.98),
    ],
)
def test_a_stage_costs_what_tables_13_and_14_say_within_the_stated_gap(
    stage: str, unmasked: bool, counted: float, paper: float
) -> None:
    """XL, in 1e21 FLOPs. How the paper counts is not said, so the two agree only roughly:

    - Our plain count of the network (a multiply-add is two, backward twice the forward, text left out) gives 0.71 for
      400k masked steps of T2I-256 and 0.88 with the 50k unmasked ones: 36 and 21 % below the 1.11 that is printed.
    - For T2V-256 the masked steps alone give 2.29, 12 % above the 2.05 that is printed; the 100k unmasked steps would
      add another 1.08, so the printed figure cannot hold them.
    - Patches of 1 or 4 latent pixels would be off by a factor of four: the reading is right.
    - 512 px: the steps are ours, chosen to fit the tables. Where Table 13 prints 8.43 for T2I-512, 0.843 must be meant:
      its totals hold with that alone.
    """
    masked, rest = flops(curriculum("xl").stage(stage), text_tokens=0)
    ours = masked + rest if unmasked else masked
    assert ours == pytest.approx(counted, rel=0.01)
    assert 0.6 < ours / paper < 1.15


def test_text_adds_a_tenth_to_images_and_next_to_nothing_to_videos() -> None:
    for stage, share in (("t2i_256", 1.09), ("t2v_256", 1.014)):
        recipe = curriculum("xl").stage(stage)
        assert flops(recipe, text_tokens=77)[0] / flops(recipe, text_tokens=0)[0] == pytest.approx(share, abs=0.005)


def test_starts_of_table_13_cost_the_same() -> None:
    """Fig. 6b compares ways to 512 px at equal FLOPs; the guide's step counts for T2V-512 must add up alike."""
    images, larger, videos = (
        flops(curriculum("xl").stage(name), text_tokens=77)[0] for name in ("t2i_256", "t2i_512", "t2v_256")
    )
    per_step = flops(curriculum("xl").stage("t2v_512"), text_tokens=77)[0] / 85_000
    totals = [
        250_000 * per_step,
        images + videos + 120_000 * per_step,
        images + larger + 170_000 * per_step,
        images + larger + videos + 85_000 * per_step,
    ]
    printed = (5.93, 6.00, 5.97, 5.98)
    assert max(totals) / min(totals) < 1.1
    assert all(total == pytest.approx(paper, rel=0.1) for total, paper in zip(totals, printed, strict=True))


def test_the_applications_are_trained_at_the_papers_sizes() -> None:
    assert {stage.task for stage in curriculum("xl").stages} >= {"upsampling", "multiview", "keyframes"}
    assert curriculum("xxl").stage("v2v_256").task == "prediction"


def choices() -> list[tuple[str, ...]]:
    """The `--set` values of each row of the guide that has some."""
    rows = [line for line in GUIDE.read_text().splitlines() if line.startswith("|")]
    return [values for row in rows if (values := tuple(re.findall(r'--set "([^"]+)"', row)))]


def network(stage: StageRecipe) -> STIV:
    return STIV(stage.network, latent_channels=stage.vae.latent_channels, text_size=16, pooled_size=8)


@pytest.mark.parametrize("overrides", choices(), ids=" ".join)
def test_every_choice_the_guide_offers_is_another_recipe_that_its_parents_grow_into(overrides: tuple[str, ...]) -> None:
    assert curriculum("xl", *overrides) != curriculum("xl")
    small = curriculum("xl", "*.network.hidden_size=32", "*.network.num_heads=2", "*.network.depth=3", *overrides)
    for name in {override.split(".")[0] for override in overrides}:
        stage = small.stage(name)
        weights = {
            parent: network(small.stage(parent)).state_dict()
            for parent in (stage.parent, stage.temporal_parent)
            if parent
        }
        if stage.parent is not None:
            grow(network(stage), weights[stage.parent], weights.get(stage.temporal_parent or ""))


def test_table_2_down_to_its_baseline_is_a_recipe() -> None:
    cumulative = [value for row in choices() for value in row if value.startswith("t2i_256.")]
    baseline = curriculum("xl", *cumulative).stage("t2i_256")
    assert (baseline.flow.objective, baseline.optimizer.type, baseline.network.positions) == (
        "diffusion",
        "adamw",
        "learned",
    )
    assert len(cumulative) == 13


@pytest.mark.parametrize("size", ["xl", "xxl", "m"])
def test_every_stage_grows_from_its_parents(size: str) -> None:
    small = curriculum(size, "*.network.hidden_size=32", "*.network.num_heads=2", "*.network.depth=3")
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for stage in small.stages:
        made = network(stage)
        if stage.parent is not None:
            grow(made, weights[stage.parent], weights.get(stage.temporal_parent or ""))
        weights[stage.name] = made.state_dict()
