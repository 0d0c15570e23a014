"""The analytic count of operations equals what torch counts while the network runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import NetworkConfig
from model.flow_matching import draw_kept_frames, draw_kept_tokens
from model.network.flops import training_flops
from model.network.stiv import STIV

CHANNELS, TEXT, POOLED, LENGTH = 4, 24, 20, 7


def counted(config: NetworkConfig, frames: int, mask_ratio: float, temporal_mask_ratio: float) -> tuple[int, int]:
    """What torch counts of one clip's forward, and of its forward and backward."""
    network = STIV(config, latent_channels=CHANNELS, text_size=TEXT, pooled_size=POOLED)
    generator = torch.Generator().manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        velocity = network(
            torch.randn(1, frames, CHANNELS, 16, 12),
            torch.rand(1),
            torch.randn(1, LENGTH, TEXT),
            torch.ones(1, LENGTH, dtype=torch.bool),
            torch.randn(1, POOLED),
            torch.rand(1, 6),
            keep=draw_kept_tokens(1, 48, mask_ratio, generator),
            keep_frames=draw_kept_frames(1, frames // config.temporal_patch_size, temporal_mask_ratio, generator),
            image=torch.randn(1, CHANNELS, 16, 12),
            image_given=torch.ones(1, dtype=torch.bool),
        )
        forward = counter.get_total_flops()
        velocity.mean().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize(
    ("choices", "frames", "mask_ratio", "temporal_mask_ratio"),
    [
        ({}, 8, 0.0, 0.0),
        ({}, 8, 0.5, 0.0),
        ({"causal_temporal_attention": True}, 12, 0.7, 0.4),
        ({"temporal_attention": False, "temporal_patch_size": 1}, 1, 0.5, 0.0),
        ({"shared_modulation": False, "temporal_modulation": True, "micro_conditions": False}, 8, 0.5, 0.0),
        ({"mlp_ratio": 2, "temporal_patch_size": 4}, 8, 0.0, 0.5),
        # On a CPU torch counts no fused attention, which longer contexts take: with the image they stay just below.
        ({"image_cross_attention": "linear"}, 4, 0.5, 0.0),
        ({"image_cross_attention": "resnet"}, 4, 0.0, 0.0),
    ],
)
def test_the_count_is_what_torch_counts(
    choices: dict[str, object], frames: int, mask_ratio: float, temporal_mask_ratio: float
) -> None:
    config = NetworkConfig.model_validate({"hidden_size": 64, "depth": 4, "num_heads": 4, **choices})
    forward, training = counted(config, frames, mask_ratio, temporal_mask_ratio)
    analytic = training_flops(
        config,
        (frames, CHANNELS, 16, 12),
        LENGTH,
        mask_ratio,
        temporal_mask_ratio=temporal_mask_ratio,
        text_size=TEXT,
        pooled_size=POOLED,
    )
    assert analytic == 3 * forward
    assert analytic == pytest.approx(training, rel=0.02)  # the inputs need no gradient


def test_masking_half_of_the_tokens_nearly_halves_the_cost_of_the_papers_video_network() -> None:
    config = NetworkConfig(hidden_size=1152, depth=28, num_heads=18)
    whole, half = (training_flops(config, (20, 8, 32, 32), 77, ratio) for ratio in (0.0, 0.5))
    assert 0.5 < half / whole < 0.55
