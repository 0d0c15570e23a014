"""What it costs to train on a batch of clips: tokens, and operations as the model needs and as the hardware does them.

It adds up what `flops` counts; it knows nothing of ranks, nor of how long anything takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from model.config import NetworkConfig, TrainingConfig
from model.network.flops import forward_flops


@dataclass(slots=True, frozen=True)
class Cost:
    """Of some clips, forward and backward; costs of several batches are added, those of like ranks multiplied."""

    tokens: int = 0
    """Of whole clips: masked ones count."""
    model_flops: int = 0
    """What the network takes as it is written down: MFU counts these."""
    hardware_flops: int = 0
    """With what activation checkpointing computes again: HFU counts these."""

    def __add__(self, other: Self) -> "Cost":
        return Cost(
            self.tokens + other.tokens,
            self.model_flops + other.model_flops,
            self.hardware_flops + other.hardware_flops,
        )

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.tokens * times, self.model_flops * times, self.hardware_flops * times)


def training_cost(
    network: NetworkConfig,
    training: TrainingConfig,
    *,
    latents: Sequence[int],
    text: Sequence[int],
    pooled_size: int,
    masked: bool,
) -> Cost:
    """Of one batch.

    Args:
        latents: shape [B, T, C, H, W].
        text: shape of the encoded captions, with their padding [B, L, D].
        pooled_size: of the captions' pooled vectors.
        masked: whether tokens are dropped, as in all but the last steps.
    """
    clips, frames, channels, height, width = latents
    forward = forward_flops(
        network,
        (frames, channels, height, width),
        text[1],
        training.mask_ratio if masked else 0.0,
        temporal_mask_ratio=training.temporal_mask_ratio if masked else 0.0,
        text_size=text[2],
        pooled_size=pooled_size,
    )
    places = (height // network.patch_size) * (width // network.patch_size)
    model = 3 * forward.total
    again = forward.recomputed if training.activation_checkpointing else 0
    return Cost(frames // network.temporal_patch_size * places, model, model + again) * clips
