"""Growing a stage's network from other stages' weights: which weight comes from where, and what is refused."""

from typing import Any

import pytest
import torch

from model.config import NetworkConfig
from model.network import positions
from model.network.stiv import STIV
from model.training.grow import grow

Grid = tuple[int, int, int]


def network(seed: int = 0, *, temporal: bool = True, **choices: Any) -> STIV:
    """Every weight drawn, so that none is equal by chance of being zero."""
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
    config = NetworkConfig.model_validate(
        {
            "hidden_size": 32,
            "depth": 3,
            "num_heads": 2,
            "temporal_attention": temporal,
            "temporal_patch_size": 2 if temporal else 1,
            **choices,
        }
    )
    made = STIV(config, latent_channels=4, text_size=16, pooled_size=8)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def test_a_joint_start_takes_temporal_attention_from_one_parent_and_all_else_from_the_other() -> None:
    images, videos, joint = network(1, temporal=False), network(2), network(3)
    report = grow(joint, images.state_dict(), videos.state_dict())
    assert report.new == ()
    assert set(report.inflated) == {"patch_embedding.weight", "final.head.weight", "final.head.bias"}
    from_images, from_videos = images.state_dict(), videos.state_dict()
    for name, weight in joint.state_dict().items():
        if name not in report.inflated:
            assert torch.equal(weight, (from_videos if ".temporal." in name else from_images)[name]), name


def test_of_two_video_parents_the_temporal_one_gives_temporal_attention_alone() -> None:
    spatial, temporal, joint = network(1), network(2), network(3)
    grow(joint, spatial.state_dict(), temporal.state_dict())
    weights = joint.state_dict()
    assert torch.equal(
        weights["blocks.0.temporal.query.weight"], temporal.state_dict()["blocks.0.temporal.query.weight"]
    )
    assert torch.equal(weights["blocks.0.spatial.query.weight"], spatial.state_dict()["blocks.0.spatial.query.weight"])


def test_a_temporal_parent_must_have_all_the_temporal_attention() -> None:
    images = network(temporal=False).state_dict()
    with pytest.raises(ValueError, match="the temporal parent has no temporal attention"):
        grow(network(), images, images)
    shallow = {name: weight for name, weight in network().state_dict().items() if not name.startswith("blocks.2.")}
    with pytest.raises(ValueError, match=r"lacks 'blocks\.2\.temporal"):
        grow(network(), images, shallow)
    with pytest.raises(ValueError, match=r"this stage lacks, first \['blocks\.3\.temporal"):
        grow(network(depth=3), images, network(depth=4).state_dict() | network().state_dict())


@pytest.mark.parametrize("projection", ["linear", "resnet"])
def test_the_projection_of_the_image_starts_anew_where_the_parent_has_none(projection: str) -> None:
    parent, child = network(1), network(2, image_cross_attention=projection)
    before = {name: weight.clone() for name, weight in child.state_dict().items()}
    report = grow(child, parent.state_dict())
    assert report.new and all(name.startswith("image_tokens.") for name in report.new)
    assert all(torch.equal(child.state_dict()[name], before[name]) for name in report.new)


@pytest.mark.parametrize("shared", [True, False])
def test_modulation_of_temporal_attention_is_added_behind_the_parents(shared: bool) -> None:
    parent = network(1, temporal=False, shared_modulation=shared)
    child = network(2, shared_modulation=shared, temporal_modulation=True)
    name = "modulation.weight" if shared else "blocks.1.modulation.weight"
    before = child.state_dict()[name].clone()
    assert name in grow(child, parent.state_dict()).inflated
    assert torch.equal(child.state_dict()[name][: 6 * 32], parent.state_dict()[name])
    assert torch.equal(child.state_dict()[name][6 * 32 :], before[6 * 32 :])


@pytest.mark.parametrize(
    ("parent", "child", "message"),
    [
        ({}, {"shared_modulation": False}, "has weights that this stage lacks, first .'modulation"),
        ({}, {"qk_norm": False}, r"lacks, first .'blocks\.0\.cross\.key_norm\.weight"),
        ({"qk_norm": False}, {}, r"the parent lacks 'blocks\.0\.spatial\.query_norm\.weight'"),
        ({}, {"micro_conditions": False}, r"lacks, first .'micro_embeddings"),
        ({}, {"positions": "learned", "learned_grid": (2, 4, 4)}, r"the parent lacks 'learned_positions"),
        (
            {"positions": "learned", "learned_grid": (1, 4, 4)},
            {"positions": "learned", "learned_grid": (2, 4, 4)},
            r"'learned_positions\.frames' is \(1, 32\) in the parent and \(2, 32\) here.*learned_grid",
        ),
        ({"temporal_modulation": True}, {}, r"'modulation\.weight' is \(288, 32\) in the parent and \(192, 32\) here"),
    ],
)
def test_another_choice_than_the_parents_is_refused_by_name(
    parent: dict[str, Any], child: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grow(network(**child), network(**parent).state_dict())


def angles(grid: Grid, **scales: Any) -> tuple[torch.Tensor, torch.Tensor]:
    config = network(**scales).config
    frames, rows, columns = grid
    device = torch.device("cpu")
    spatial = positions.spatial_angles(config, rows, columns, 16, device)[0].reshape(rows, columns, -1)
    return spatial, positions.temporal_angles(config, frames, 16, device)[0]


def test_interpolated_angles_are_the_parents_at_equal_relative_positions() -> None:
    """Twice the side at scale 0.5: token 2i stands where token i stood; without the scale, token i does."""
    spatial, temporal = angles((3, 4, 4))
    wide, long = angles((6, 8, 8), rope_spatial_scale=0.5, rope_temporal_scale=0.5)
    torch.testing.assert_close(wide[::2, ::2], spatial)
    torch.testing.assert_close(long[::2], temporal)
    torch.testing.assert_close(wide[1, 1] - wide[0, 0], (spatial[1, 1] - spatial[0, 0]) / 2)
    extrapolated, longer = angles((6, 8, 8))
    torch.testing.assert_close(extrapolated[:4, :4], spatial)
    torch.testing.assert_close(longer[:3], temporal)


def test_a_network_grown_to_twice_the_side_keeps_every_weight_at_either_scale() -> None:
    parent = network(1)
    for scale in (0.5, 1.0):
        child = network(2, rope_spatial_scale=scale, rope_temporal_scale=scale)
        report = grow(child, parent.state_dict())
        assert (report.inflated, report.new) == ((), ())
        assert all(torch.equal(child.state_dict()[name], weight) for name, weight in parent.state_dict().items())
