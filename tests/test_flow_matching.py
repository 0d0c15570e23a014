"""Flow matching and conditioning: closed-form cases of path, loss, masks and dropouts."""

import pytest
import torch

from model.conditioning import Conditions, draw_frame_mask, draw_text_dropout, first_frames, replace_frames
from model.config import FlowConfig
from model.flow_matching import (
    draw_kept_frames,
    draw_kept_tokens,
    draw_timesteps,
    interpolate,
    loss_weight,
    masked_loss,
    shift_timesteps,
    velocity_target,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_path_runs_straight_from_noise_to_data() -> None:
    data, noise = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 4, 4, 4)
    assert torch.equal(interpolate(data, noise, torch.zeros(2)), noise)
    assert torch.equal(interpolate(data, noise, torch.ones(2)), data)
    early, late = torch.tensor([0.2, 0.5]), torch.tensor([0.6, 0.9])
    moved = interpolate(data, noise, early) + (late - early).view(-1, 1, 1, 1, 1) * velocity_target(data, noise)
    assert torch.allclose(moved, interpolate(data, noise, late), atol=1e-6)


def test_logit_normal_times_centre_at_a_half_and_shift_moves_them_to_noise() -> None:
    plain = draw_timesteps(20_000, FlowConfig(), generator())
    assert plain.median().item() == pytest.approx(0.5, abs=0.01)
    assert plain.std().item() == pytest.approx(0.208, abs=0.01)  # of sigmoid(N(0, 1))
    shifted = draw_timesteps(20_000, FlowConfig(shift=3.0), generator())
    assert shifted.median().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(shift_timesteps(torch.tensor([0.0, 1.0]), 7.0), torch.tensor([0.0, 1.0]))


def test_uniform_times_are_uniform() -> None:
    t = draw_timesteps(20_000, FlowConfig(timestep_distribution="uniform"), generator())
    assert torch.histc(t, 10, 0, 1).div(2000).sub(1).abs().max() < 0.1


def test_an_error_under_a_clean_frame_costs_nothing() -> None:
    latents, mask = torch.zeros(2, 4, 3, 8, 8), first_frames(2, 4)
    wrong = latents.clone()
    wrong[:, 0] = 100.0
    weight = loss_weight(mask, latents, keep=None, patch_size=2)
    assert masked_loss(wrong, latents, weight) == 0
    wrong[:, 1] = 1.0
    assert masked_loss(wrong, latents, weight).item() == pytest.approx(1 / 3)  # one of three counted frames


def test_an_error_in_a_dropped_token_costs_nothing() -> None:
    latents, mask = torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, dtype=torch.bool)
    weight = loss_weight(mask, latents, keep=torch.tensor([[0, 3]]), patch_size=2)
    wrong = latents.clone()
    wrong[..., 0:2, 2:4] = 9.0  # token 1
    wrong[..., 2:4, 0:2] = 9.0  # token 2
    assert masked_loss(wrong, latents, weight) == 0
    wrong[..., 0:2, 0:2] = 1.0  # token 0, half of what is kept
    assert masked_loss(wrong, latents, weight).item() == pytest.approx(0.5)


def test_an_error_in_a_dropped_token_frame_costs_nothing() -> None:
    latents, mask = torch.zeros(2, 6, 3, 4, 4), first_frames(2, 6)
    weight = loss_weight(
        mask,
        latents,
        keep=torch.tensor([[0], [3]]),
        patch_size=2,
        keep_frames=torch.tensor([[0, 2], [1, 2]]),
        temporal_patch_size=2,
    )
    assert weight[0, :, 0, 0, 0].tolist() == [0, 1, 0, 0, 1, 1]  # frame 0 is given, frames 2 and 3 are dropped
    assert weight[1, :, 0, 3, 3].tolist() == [0, 0, 1, 1, 1, 1]
    assert weight[0, :, 0, :, 2:].sum() == weight[1, :, 0, :2].sum() == 0  # dropped spatial tokens


def test_a_clip_without_anything_to_learn_has_zero_loss_not_nan() -> None:
    latents, mask = torch.zeros(1, 1, 3, 4, 4), torch.ones(1, 1, dtype=torch.bool)
    assert masked_loss(latents + 1, latents, loss_weight(mask, latents, keep=None, patch_size=2)) == 0


def test_masking_keeps_the_right_number_of_distinct_tokens_and_none_is_no_masking() -> None:
    keep = draw_kept_tokens(5, 16, 0.5, generator())
    assert keep is not None and keep.shape == (5, 8)
    assert all(len(set(row.tolist())) == 8 for row in keep)
    assert len({tuple(row.tolist()) for row in keep}) > 1
    assert draw_kept_tokens(5, 16, 0.0, generator()) is None


def test_temporal_masking_keeps_its_share_of_the_token_frames() -> None:
    keep = draw_kept_frames(64, 8, 0.25, generator())
    assert keep is not None and keep.shape == (64, 6)
    assert all(len(set(row.tolist())) == 6 and row.tolist() == sorted(row.tolist()) for row in keep)
    assert keep.flatten().bincount().min() > 30  # no frame is spared
    assert draw_kept_frames(5, 8, 0.0, generator()) is None


def test_text_and_image_are_dropped_independently_at_their_rates() -> None:
    rng = generator()
    text = draw_text_dropout(20_000, text_dropout=0.1, generator=rng)
    image = ~draw_frame_mask(first_frames(1, 4)[0], 20_000, image_dropout=0.08, generator=rng)[:, 0]
    assert text.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert image.float().mean().item() == pytest.approx(0.08, abs=0.01)
    assert (text & image).float().mean().item() == pytest.approx(0.008, abs=0.003)


def test_frame_replacement_touches_only_the_masked_frames() -> None:
    noisy, clean = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    replaced = replace_frames(noisy, clean, first_frames(2, 4, 2))
    assert torch.equal(replaced[:, :2], clean[:, :2]) and torch.equal(replaced[:, 2:], noisy[:, 2:])


def test_stacking_pads_text_and_its_mask_to_the_longest_row() -> None:
    def row(length: int) -> Conditions:
        return Conditions(
            torch.ones(1, length, 3), torch.ones(1, length, dtype=torch.bool), torch.ones(1, 2), torch.ones(1, 6)
        )

    both = Conditions.stack([row(2), row(5)])
    assert both.text.shape == (2, 5, 3)
    assert both.text_mask.tolist() == [[True, True, False, False, False], [True] * 5]
    assert both.text[0, 2:].abs().max() == 0
