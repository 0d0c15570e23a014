"""The network's choices beside the paper's default: each has the property it is named for, whatever the weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import NetworkConfig
from model.flow_matching import draw_kept_frames, draw_kept_tokens
from model.network.stiv import STIV
from tests.test_network import CHANNELS, POOLED, TEXT, inputs, network, opened

GRID = (4, 4, 4)
CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "rope_sinusoid": {"positions": "rope_sinusoid"},
    "learned": {"positions": "learned", "learned_grid": GRID},
    "causal": {"causal_temporal_attention": True},
    "temporal_modulation": {"temporal_modulation": True},
    "no_qk_norm": {"qk_norm": False},
    "no_sandwich_norm": {"sandwich_norm": False},
    "no_condition_norm": {"condition_norm": False},
    "own_modulation": {"shared_modulation": False},
    "no_micro_conditions": {"micro_conditions": False},
    "image": {"image_cross_attention": "linear"},
    "image_resnet": {"image_cross_attention": "resnet"},
    "table_2_baseline": {
        "positions": "learned",
        "learned_grid": GRID,
        "qk_norm": False,
        "sandwich_norm": False,
        "condition_norm": False,
        "shared_modulation": False,
        "micro_conditions": False,
    },
    "no_sandwich_norm_temporal_modulation": {"sandwich_norm": False, "temporal_modulation": True},
}


def image_inputs(batch: int = 2, given: bool = True) -> dict[str, Tensor]:
    image = torch.randn(batch, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(5))
    return {"image": image, "image_given": torch.full((batch,), given)}


def same_weights(net: STIV, **choices: object) -> STIV:
    """`net` with other choices and every weight that both have."""
    config = NetworkConfig.model_validate({**net.config.model_dump(), **choices})
    other = STIV(config, latent_channels=CHANNELS, text_size=TEXT, pooled_size=POOLED)
    other.load_state_dict(net.state_dict(), strict=False)
    return other.eval()


def by_token_frame(velocity: Tensor) -> Tensor:
    """[B, T, C, H, W] -> [B, T', values] at two frames a token."""
    return velocity.reshape(velocity.shape[0], velocity.shape[1] // 2, -1)


@pytest.mark.parametrize("name", CHOICES)
def test_the_loss_moves_every_weight_from_the_first_steps_on(name: str) -> None:
    net = network(**CHOICES[name])
    given, target = inputs(frames=8), torch.randn(2, 8, CHANNELS, 8, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(4):  # closed branches open one behind the other
        optimizer.zero_grad()
        draws = torch.Generator().manual_seed(0)
        masks = {"keep": draw_kept_tokens(2, 16, 0.5, draws), "keep_frames": draw_kept_frames(2, 4, 0.5, draws)}
        F.mse_loss(net(**given, **masks, **image_inputs()), target).backward()
        optimizer.step()
    still = [name for name, weight in net.named_parameters() if weight.grad is None or weight.grad.abs().max() == 0]
    assert not still


@pytest.mark.parametrize("name", ["rope_sinusoid", "causal", "no_qk_norm", "no_sandwich_norm", "no_condition_norm"])
def test_a_choice_without_weights_of_its_own_changes_what_the_same_weights_answer(name: str) -> None:
    net, given = opened(network()), inputs(frames=6)
    assert (same_weights(net, **CHOICES[name])(**given) - net(**given)).abs().max() > 1e-3


@pytest.mark.parametrize("frames_per_token", [1, 2, 4])
def test_a_token_covers_one_two_or_four_frames(frames_per_token: int) -> None:
    net, given = opened(network(pt=frames_per_token)), inputs(frames=8)
    seen: list[Tensor] = []
    net.final.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    assert net(**given).shape == given["latents"].shape
    assert seen[0].shape[1] == 8 // frames_per_token


# --- positions


def shuffled(latents: Tensor) -> Tensor:
    """Token frames, and token columns, in another order."""
    return latents.reshape(2, 4, 2, CHANNELS, 8, 4, 2)[:, [2, 0, 3, 1]][..., [3, 1, 0, 2], :].reshape(latents.shape)


def test_without_its_table_a_network_of_learned_positions_sees_a_set_of_tokens() -> None:
    net, given = opened(network(**CHOICES["learned"])), inputs(frames=8)
    moved = {**given, "latents": shuffled(given["latents"])}
    assert (net(**moved) - shuffled(net(**given))).abs().max() > 1e-3
    assert net.learned_positions is not None
    for table in net.learned_positions.parameters():
        nn.init.zeros_(table)
    assert torch.allclose(net(**moved), shuffled(net(**given)), atol=1e-5)


def test_learned_positions_end_with_their_table() -> None:
    net = opened(network(**CHOICES["learned"]))
    assert net(**inputs(frames=2, side=4)).shape == (2, 2, CHANNELS, 4, 4)
    with pytest.raises(ValueError, match=r"5x4x4 token frames, rows and columns exceed network\.learned_grid 4x4x4"):
        net(**inputs(frames=10))


# --- temporal attention


@pytest.mark.parametrize("explicit_below", [0, 64])
def test_causal_attention_hides_later_frames_from_earlier_ones(
    explicit_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.network.layers.EXPLICIT_BELOW", explicit_below)
    net, given = opened(network(causal_temporal_attention=True)), inputs(frames=8)
    changed = {**given, "latents": given["latents"].clone()}
    changed["latents"][:, 4] += 1.0  # the third of four token frames
    difference = by_token_frame(net(**changed) - net(**given)).abs().amax(dim=(0, 2))
    assert (difference[:2] < 1e-6).all() and (difference[2:] > 1e-3).all()


def test_modulated_temporal_attention_starts_closed() -> None:
    for modulated in (True, False):
        net, given = network(temporal_modulation=modulated), inputs()
        nn.init.normal_(net.final.head.weight)
        before = net(**given)
        for name, weight in net.named_parameters():
            if ".temporal." in name:
                nn.init.normal_(weight, std=0.5)
        assert torch.equal(before, net(**given)) == modulated


@pytest.mark.parametrize(("modulated", "vectors"), [(False, 6), (True, 9)])
def test_every_vector_of_the_shared_modulation_acts(modulated: bool, vectors: int) -> None:
    net = opened(network(temporal_modulation=modulated))
    assert net.modulation is not None and net.modulation.out_features == vectors * 32
    net(**inputs()).square().mean().backward()
    assert net.modulation.bias.grad is not None
    assert (net.modulation.bias.grad.reshape(vectors, 32).abs().amax(dim=1) > 1e-5).all()


def test_without_a_post_norm_a_block_starts_as_the_identity() -> None:
    net = network(sandwich_norm=False)
    x = torch.randn(1, 2, 4, 32)
    modulation = net.modulation(torch.randn(1, 32)) if net.modulation else torch.zeros(1, 6 * 32)
    out = net.blocks[0](x, modulation, torch.randn(1, 3, 32), torch.ones(1, 3, dtype=torch.bool), None, None)
    assert torch.equal(x, out)


# --- masking


@pytest.mark.parametrize("name", ["default", "causal", "learned"])
def test_keeping_every_frame_equals_no_masking(name: str) -> None:
    net, given = opened(network(**CHOICES[name])), inputs(frames=8)
    everything = {"keep": torch.arange(16).expand(2, 16), "keep_frames": torch.arange(4).expand(2, 4)}
    assert torch.allclose(net(**given), net(**given, **everything), atol=1e-5)
    assert torch.allclose(net(**given), net(**given, keep_frames=everything["keep_frames"]), atol=1e-5)


@pytest.mark.parametrize("keep", [None, torch.tensor([[0, 3, 5, 6], [1, 2, 8, 15]])])
def test_dropped_frames_are_invisible_to_the_kept_ones_before_the_last_blocks(keep: Tensor | None) -> None:
    net, given = opened(network()), inputs(frames=8)
    keep_frames = torch.tensor([[0, 3], [1, 2]])
    changed = {**given, "latents": given["latents"].clone()}
    changed["latents"][0, 2:6] += 5.0
    changed["latents"][1, :2] += 5.0
    changed["latents"][1, 6:] += 5.0
    masks = {"keep": keep, "keep_frames": keep_frames}
    assert torch.equal(net(**given, **masks), net(**changed, **masks))


@pytest.mark.parametrize("causal", [True, False])
def test_kept_frames_attend_to_each_other_as_far_apart_as_they_stand(causal: bool) -> None:
    net, given = opened(network(unmasked_depth=0, causal_temporal_attention=causal)), inputs(frames=8)
    keep = torch.tensor([[0, 3, 5, 6], [1, 2, 8, 15]])
    velocity = by_token_frame(net(**given, keep=keep, keep_frames=torch.tensor([[0, 2], [1, 2]])))
    for row, frames, apart in ((0, [0, 2], 2.0), (1, [1, 2], 1.0)):
        alone = {name: value[row : row + 1] for name, value in given.items()}
        alone["latents"] = alone["latents"].unflatten(1, (4, 2))[:, frames].flatten(1, 2)
        spread = same_weights(net, rope_temporal_scale=apart)
        expected = by_token_frame(spread(**alone, keep=keep[row : row + 1]))
        assert torch.allclose(velocity[row, frames], expected[0], atol=1e-5)
        assert not torch.allclose(velocity[row, frames], expected[0].flip(0), atol=1e-2)


# --- the first frame in cross-attention


@pytest.mark.parametrize("kind", ["linear", "resnet"])
def test_only_rows_with_an_image_see_it(kind: str) -> None:
    net, given = opened(network(image_cross_attention=kind)), inputs()
    image = image_inputs()["image"]
    seen = net(**given, image=image, image_given=torch.tensor([True, False]))
    without = same_weights(net, image_cross_attention="off")(**given)
    assert torch.allclose(seen[1], without[1], atol=1e-5)
    assert (seen[0] - without[0]).abs().max() > 1e-3
    other = net(**given, image=image + 1.0, image_given=torch.tensor([True, False]))
    assert torch.equal(seen[1], other[1]) and not torch.allclose(seen[0], other[0], atol=1e-4)


def test_cross_attention_knows_where_a_patch_of_the_image_stands() -> None:
    net, given = opened(network(image_cross_attention="linear")), inputs()
    image = image_inputs()
    moved = {**image, "image": image["image"].roll(2, dims=3)}  # by one patch
    assert (net(**given, **moved) - net(**given, **image)).abs().max() > 1e-3


def test_a_network_that_looks_at_the_image_wants_one() -> None:
    with pytest.raises(ValueError, match="image_cross_attention 'linear' needs image and image_given"):
        network(image_cross_attention="linear")(**inputs())


# --- what the choices weigh


@pytest.mark.parametrize(
    ("choices", "fixed", "per_block"),
    [
        ({"temporal_attention": False}, 6, 16),
        ({"temporal_attention": False, "shared_modulation": False}, 0, 22),
        ({}, 6, 20),
        ({"temporal_modulation": True}, 9, 20),
        ({"temporal_modulation": True, "shared_modulation": False}, 0, 29),
    ],
)
def test_blocks_and_modulation_weigh_what_the_paper_counts(
    choices: dict[str, object], fixed: int, per_block: int
) -> None:
    """In squares of the width: (6 + 16 N) d^2 with the shared AdaLN, 22 N d^2 with one a block, 4 more for time."""
    shape = {"hidden_size": 1152, "depth": 28, "num_heads": 18}
    with torch.device("meta"):
        config = NetworkConfig.model_validate({**shape, **choices})
        net = STIV(config, latent_channels=8, text_size=1280, pooled_size=1280)
    matrices = [w for name, w in net.named_parameters() if name.startswith(("blocks.", "modulation.")) and w.ndim == 2]
    assert sum(weight.numel() for weight in matrices) == (fixed + 28 * per_block) * 1152**2


def test_without_micro_conditions_there_is_nothing_to_embed_them() -> None:
    net, given = opened(network(micro_conditions=False)), inputs()
    assert not [name for name, _ in net.named_parameters() if "micro" in name]
    assert torch.equal(net(**given), net(**{**given, "micro": given["micro"] + 1.0}))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_qk_norm_alone_makes_attention_blind_to_the_length_of_its_queries(qk_norm: bool) -> None:
    net, given = opened(network(qk_norm=qk_norm)), inputs()
    before = net(**given)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if ".query." in name:
                weight.mul_(10.0)
    assert torch.allclose(net(**given), before, atol=1e-3) == qk_norm
