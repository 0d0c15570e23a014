"""What a training step draws at random for each clip: flow time, noise, dropouts, masked tokens.

It owns the seeds: every number depends on the run's seed and the clip's number in the run's global order alone. So a
resumed run, or one on another number of ranks, draws the same. It knows nothing of networks or losses.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.conditioning import draw_frame_mask, draw_text_dropout
from model.flow_matching import draw_kept_tokens, draw_timesteps
from model.recipe import StageRecipe


@dataclass(slots=True, frozen=True)
class Draws:
    """Draws of B clips."""

    timestep: Tensor
    """[B]."""
    noise: Tensor
    """[B, T, C, H, W], i.i.d. per frame (paper App. B)."""
    frame_mask: Tensor
    """bool [B, T], True where the clean frame is given."""
    text_dropped: Tensor
    """bool [B]."""
    keep: Tensor | None
    """Spatial tokens [B, K] that the network sees; None = all."""

    def to(self, device: torch.device) -> "Draws":
        return Draws(
            timestep=self.timestep.to(device),
            noise=self.noise.to(device),
            frame_mask=self.frame_mask.to(device),
            text_dropped=self.text_dropped.to(device),
            keep=None if self.keep is None else self.keep.to(device),
        )


def draw(recipe: StageRecipe, numbers: Sequence[int], shape: torch.Size, *, mask_ratio: float) -> Draws:
    """For the clips with these global numbers and latents of `shape` [T, C, H, W]."""
    rows = [_draw_clip(recipe, number, shape, mask_ratio) for number in numbers]
    kept = [row.keep for row in rows if row.keep is not None]
    return Draws(
        timestep=torch.cat([row.timestep for row in rows]),
        noise=torch.cat([row.noise for row in rows]),
        frame_mask=torch.cat([row.frame_mask for row in rows]),
        text_dropped=torch.cat([row.text_dropped for row in rows]),
        keep=torch.cat(kept) if kept else None,
    )


def _draw_clip(recipe: StageRecipe, number: int, shape: torch.Size, mask_ratio: float) -> Draws:
    generator = torch.Generator().manual_seed(_seed(recipe.training.seed, number))
    num_frames, _, height, width = shape
    tokens = (height // recipe.network.patch_size) * (width // recipe.network.patch_size)
    dropout = recipe.conditioning
    return Draws(
        timestep=draw_timesteps(1, recipe.flow, generator),
        noise=torch.randn(1, *shape, generator=generator),
        frame_mask=draw_frame_mask(
            recipe.task, 1, num_frames, image_dropout=dropout.image_dropout, generator=generator
        ),
        text_dropped=draw_text_dropout(1, text_dropout=dropout.text_dropout, generator=generator),
        keep=draw_kept_tokens(1, tokens, mask_ratio, generator),
    )


def _seed(seed: int, number: int) -> int:
    """Well mixed: torch's CPU generator takes 32 bits of it, and neighbouring seeds start alike."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=4).digest())
