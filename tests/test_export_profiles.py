"""Shape profiles: what an engine promises to take follows from the recipe, and the rest is refused with its way out."""

import pytest

from export.onnx import INPUTS
from export.profiles import AXES, Shape, ShapeProfile
from model.network.stiv import STIV
from model.recipe import StageRecipe


def recipe(**network: object) -> StageRecipe:
    return StageRecipe.model_validate(
        {
            "name": "tiny",
            "task": "ti2v",
            "network": {"hidden_size": 32, "depth": 3, "num_heads": 2, **network},
            "video": {"num_frames": 8, "height": 32, "width": 64},
            "vae": {"latent_channels": 6, "spatial_factor": 4},
            "training": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
            "gate": [{"metric": "loss", "op": "<", "bound": 1.0}],
        }
    )


@pytest.fixture
def profile() -> ShapeProfile:
    stage = recipe()
    return ShapeProfile.of(stage, STIV(stage.network, latent_channels=6, text_size=24, pooled_size=20), max_batch=8)


def test_a_profile_reaches_from_one_patch_to_four_times_the_recipes_clip(profile: ShapeProfile) -> None:
    assert profile.min == Shape(batch=1, frames=2, height=2, width=2, text_tokens=1)
    assert profile.opt == Shape(batch=2, frames=8, height=8, width=16, text_tokens=19)
    assert profile.max == Shape(batch=8, frames=32, height=32, width=64, text_tokens=77)
    assert profile.max_area == 4 * 8 * 16


def test_a_profile_survives_its_json(profile: ShapeProfile) -> None:
    assert ShapeProfile.model_validate_json(profile.model_dump_json()) == profile


def test_every_corner_is_inside_and_every_axis_is_at_both_ends_somewhere(profile: ShapeProfile) -> None:
    corners = profile.corners()
    for corner in corners:
        profile.check(corner)
    for axis in AXES:
        sizes = {getattr(corner, axis) for corner in corners}
        assert {getattr(profile.min, axis), getattr(profile.max, axis)} <= sizes, axis
    assert max(corner.height * corner.width for corner in corners) == profile.max_area


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 9}, "batch 9 is outside the engine's profile, 1 to 8"),
        ({"frames": 34}, "frames 34 is outside the engine's profile, 2 to 32"),
        ({"frames": 7}, "frames 7 of the latents is not a multiple of the network's patch, 2"),
        ({"height": 9}, "height 9 of the latents is not a multiple of the network's patch, 2"),
        ({"width": 66}, "width 66 is outside the engine's profile, 2 to 64"),
        ({"text_tokens": 78}, "text_tokens 78 is outside the engine's profile, 1 to 77"),
        ({"height": 32, "width": 32}, "height 32 x width 32 = 1024 is above the engine's 512"),
    ],
)
def test_a_shape_outside_is_refused_with_value_and_limit(
    profile: ShapeProfile, change: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        profile.check(profile.opt.model_copy(update=change))


def test_input_shapes_name_every_input_of_the_graph_in_order(profile: ShapeProfile) -> None:
    shapes = profile.input_shapes(Shape(batch=3, frames=4, height=2, width=6, text_tokens=5))
    assert tuple(shapes) == INPUTS
    assert shapes["latents"] == (3, 4, 6, 2, 6)
    assert shapes["text"] == (3, 5, 24) and shapes["text_mask"] == (3, 5)
    assert shapes["timestep"] == (3,) and shapes["pooled"] == (3, 20) and shapes["micro"] == (3, 6)


def test_ranges_are_the_shapes_of_training_and_boxes_that_stay_within_the_area(profile: ShapeProfile) -> None:
    stage = recipe()
    exact, *boxes = profile.ranges(stage)
    sizes = {"frames": 8, "height": 8, "width": 16}
    assert all({axis: getattr(end, axis) for axis in sizes} == sizes for end in (exact.min, exact.opt, exact.max))
    assert (exact.min.batch, exact.opt.batch, exact.max.batch) == (1, 2, 8)
    assert (exact.min.text_tokens, exact.max.text_tokens) == (1, 77)
    assert [(box.max.height, box.max.width) for box in boxes] == [(8, 64), (16, 32), (32, 16)]
    for box in boxes:
        assert box.holds(profile.min) and box.holds(profile.opt)
        assert box.max.height * box.max.width == profile.max_area and box.max.frames == profile.max.frames
    assert all(any(box.holds(corner) for box in boxes) for corner in profile.corners())


def test_every_bucket_of_the_data_has_a_range_of_its_own_and_room_in_the_profile() -> None:
    stage = recipe()
    buckets = [{"num_frames": 1, "height": 64, "width": 64}, {"num_frames": 8, "height": 64, "width": 32}]
    stage = stage.model_validate(
        {
            **stage.model_dump(),
            "data": {"buckets": buckets},
            "training": stage.training.model_dump() | {"micro_batch_size": 4, "global_batch_size": 4},
        }
    )
    profile = ShapeProfile.of(stage, STIV(stage.network, latent_channels=6, text_size=24, pooled_size=20), stretch=1)
    clips = [(box.opt.frames, box.opt.height, box.opt.width) for box in profile.ranges(stage)[:3]]
    assert clips == [(8, 8, 16), (2, 16, 16), (8, 16, 8)]
    for box in profile.ranges(stage)[:3]:
        profile.check(box.opt)
