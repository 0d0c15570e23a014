"""STIV's forward pass, growing and masking: what must hold whatever the weights."""

import pytest
import torch
from torch import Tensor

from model.config import NetworkConfig
from model.network import rope
from model.network.stiv import STIV
from model.training.grow import grow

CHANNELS, TEXT, POOLED = 4, 24, 20


def network(*, temporal: bool = True, pt: int = 2, seed: int = 0, depth: int = 3, **choices: object) -> STIV:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "depth": depth, "num_heads": 2, "patch_size": 2, "temporal_patch_size": pt}
    config = NetworkConfig.model_validate({**shape, "temporal_attention": temporal, **choices})
    return STIV(config, latent_channels=CHANNELS, text_size=TEXT, pooled_size=POOLED)


def opened(net: STIV) -> STIV:
    """The same network with its closed (zero) branches opened, so that every input can reach the output."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.2, generator=generator)
    return net.eval()


def inputs(batch: int = 2, frames: int = 4, side: int = 8, length: int = 5, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(batch, frames, CHANNELS, side, side, generator=g),
        "timestep": torch.rand(batch, generator=g),
        "text": torch.randn(batch, length, TEXT, generator=g),
        "text_mask": torch.ones(batch, length, dtype=torch.bool),
        "pooled": torch.randn(batch, POOLED, generator=g),
        "micro": torch.tensor([[32.0, 32, 0, 0, 1, frames]]).repeat(batch, 1),
    }


@pytest.mark.parametrize(("batch", "frames", "side", "length"), [(1, 2, 2, 1), (2, 4, 8, 5), (1, 6, 4, 9)])
def test_velocity_has_the_shape_of_the_latents(batch: int, frames: int, side: int, length: int) -> None:
    given = inputs(batch, frames, side, length)
    assert opened(network())(**given).shape == given["latents"].shape


def test_a_fresh_network_predicts_zero_velocity() -> None:
    assert network()(**inputs()).abs().max() == 0


def test_every_condition_reaches_the_output() -> None:
    net, given = opened(network()), inputs()
    before = net(**given)
    for name in ("timestep", "text", "pooled", "micro"):
        assert (net(**{**given, name: given[name] + 0.5}) - before).abs().max() > 1e-4, name


def test_padding_of_the_text_changes_nothing() -> None:
    net, given = opened(network()), inputs()
    padded = dict(given)
    padded["text"] = torch.cat([given["text"], torch.full((2, 3, TEXT), 9.0)], dim=1)
    padded["text_mask"] = torch.cat([given["text_mask"], torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    assert torch.allclose(net(**given), net(**padded), atol=1e-6)


def test_rows_do_not_see_each_other() -> None:
    net, given = opened(network()), inputs(3)
    alone = net(**{name: value[1:2] for name, value in given.items()})
    assert torch.allclose(net(**given)[1:2], alone, atol=1e-5)


def test_temporal_attention_carries_a_change_of_one_frame_to_all_others() -> None:
    net, given = opened(network()), inputs(1, frames=6)
    changed = dict(given, latents=given["latents"].clone())
    changed["latents"][:, 0] += 1.0
    difference = (net(**changed) - net(**given)).abs().amax(dim=(0, 2, 3, 4))
    assert (difference > 1e-5).all()


def test_the_explicit_softmax_equals_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    net, given = opened(network()), inputs()
    explicit = net(**given)
    monkeypatch.setattr("model.network.layers.EXPLICIT_BELOW", 0)
    assert torch.allclose(explicit, net(**given), atol=1e-5)


def test_keeping_every_token_equals_no_masking() -> None:
    net, given = opened(network()), inputs()
    keep = torch.arange(16).expand(2, 16)
    assert torch.allclose(net(**given), net(**given, keep=keep), atol=1e-5)


def test_dropped_tokens_are_invisible_to_the_kept_ones_before_the_last_blocks() -> None:
    torch.manual_seed(0)
    net, given = opened(network()), inputs(1)
    keep = torch.tensor([[0, 3, 5, 6]])
    rows, columns = 7 // 4 * 2, 7 % 4 * 2  # token 7 is dropped
    changed = dict(given, latents=given["latents"].clone())
    changed["latents"][..., rows : rows + 2, columns : columns + 2] += 5.0
    assert torch.equal(net(**given, keep=keep), net(**changed, keep=keep))


def test_rope_depends_on_relative_position_only() -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def dot(a: int, b: int) -> float:
        first = rope.rotate(q, rope.turn(rope.angles_1d(torch.tensor([[a]]), 16, 10000.0)))
        second = rope.rotate(k, rope.turn(rope.angles_1d(torch.tensor([[b]]), 16, 10000.0)))
        return float((first * second).sum())

    assert dot(3, 5) == pytest.approx(dot(10, 12), abs=1e-4)
    assert dot(3, 5) != pytest.approx(dot(3, 6), abs=1e-3)


def test_an_image_network_grows_into_video_and_keeps_its_answer_on_still_clips() -> None:
    parent = opened(network(temporal=False, pt=1, seed=1))
    child = opened(network(temporal=True, pt=2, seed=2))
    report = grow(child, parent.state_dict())
    assert set(report.inflated) == {"patch_embedding.weight", "final.head.weight", "final.head.bias"}
    assert report.new and all(".temporal." in name for name in report.new)
    for block in child.blocks:
        block.register_module("temporal", None)  # what is left must act on each token frame as the image network did
    image = inputs(2, frames=1)
    still = dict(image, latents=image["latents"].repeat(1, 4, 1, 1, 1))
    assert torch.allclose(child(**still), parent(**image).repeat(1, 4, 1, 1, 1), atol=1e-5)


def test_growing_into_another_width_or_depth_is_refused_with_the_names() -> None:
    parent = network(temporal=False, pt=1)
    with pytest.raises(ValueError, match=r"parent lacks 'blocks\.3"):
        grow(network(depth=4), parent.state_dict())
    with pytest.raises(ValueError, match="weights that this stage lacks"):
        grow(network(depth=3), network(depth=4).state_dict())
    weights = parent.state_dict()
    weights["patch_embedding.weight"] = torch.zeros(16, 16)
    with pytest.raises(ValueError, match="keep hidden_size"):
        grow(network(), weights)


@pytest.mark.parametrize(
    ("hidden_size", "depth", "num_heads", "temporal", "billions"),
    [
        (1152, 28, 18, False, 0.603),
        (1152, 28, 18, True, 0.751),
        (1536, 38, 24, False, 1.449),
        (1536, 38, 24, True, 1.807),
        (3072, 46, 48, True, 8.739),
    ],
)
def test_the_papers_sizes_have_the_papers_number_of_parameters(
    hidden_size: int, depth: int, num_heads: int, temporal: bool, billions: float
) -> None:
    """Table 1 counts blocks and the shared AdaLN; embedders and head add up to three in a hundred."""
    config = NetworkConfig(
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        temporal_patch_size=2 if temporal else 1,
        temporal_attention=temporal,
    )
    with torch.device("meta"):
        net = STIV(config, latent_channels=8, text_size=1280, pooled_size=1280)
    counted = sum(parameter.numel() for parameter in net.parameters()) / 1e9
    assert billions < counted < 1.03 * billions
