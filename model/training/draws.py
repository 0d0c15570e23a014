"""What a training step draws at random for each clip: task, flow time, noise, dropouts, masked tokens.

It owns the seeds: every number depends on the run's seed and the clip's number in the run's global order alone. So a
resumed run, or one on another number of ranks, draws the same. It knows nothing of networks or losses.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.conditioning import draw_frame_mask, draw_text_dropout
from model.flow_matching import draw_kept_frames, draw_kept_tokens, draw_timesteps
from model.recipe import StageRecipe
from model.tasks import TEXTLESS, frame_mask, task_of


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
    keep_frames: Tensor | None = None
    """Token frames [B, KT] that the network sees; None = all."""

    def to(self, device: torch.device) -> "Draws":
        return Draws(
            timestep=self.timestep.to(device),
            noise=self.noise.to(device),
            frame_mask=self.frame_mask.to(device),
            text_dropped=self.text_dropped.to(device),
            keep=None if self.keep is None else self.keep.to(device),
            keep_frames=None if self.keep_frames is None else self.keep_frames.to(device),
        )


def draw(
    recipe: StageRecipe,
    numbers: Sequence[int],
    shape: torch.Size,
    *,
    mask_ratio: float,
    temporal_mask_ratio: float = 0.0,
) -> Draws:
    """For the clips with these global numbers and latents of `shape` [T, C, H, W]."""
    rows = [_draw_clip(recipe, number, shape, mask_ratio, temporal_mask_ratio) for number in numbers]
    kept = [row.keep for row in rows if row.keep is not None]
    kept_frames = [row.keep_frames for row in rows if row.keep_frames is not None]
    return Draws(
        timestep=torch.cat([row.timestep for row in rows]),
        noise=torch.cat([row.noise for row in rows]),
        frame_mask=torch.cat([row.frame_mask for row in rows]),
        text_dropped=torch.cat([row.text_dropped for row in rows]),
        keep=torch.cat(kept) if kept else None,
        keep_frames=torch.cat(kept_frames) if kept_frames else None,
    )


def _draw_clip(recipe: StageRecipe, number: int, shape: torch.Size, mask_ratio: float, temporal_ratio: float) -> Draws:
    generator = torch.Generator().manual_seed(_seed(recipe.training.seed, number))
    num_frames, _, height, width = shape
    tokens = (height // recipe.network.patch_size) * (width // recipe.network.patch_size)
    token_frames = num_frames // recipe.network.temporal_patch_size
    dropout, task = recipe.conditioning, task_of(recipe, number)
    return Draws(
        timestep=draw_timesteps(1, recipe.flow, generator),
        noise=torch.randn(1, *shape, generator=generator),
        frame_mask=draw_frame_mask(
            frame_mask(recipe, task), 1, image_dropout=dropout.image_dropout, generator=generator
        ),
        text_dropped=draw_text_dropout(1, text_dropout=dropout.text_dropout, generator=generator) | (task in TEXTLESS),
        keep=draw_kept_tokens(1, tokens, mask_ratio, generator),
        keep_frames=draw_kept_frames(1, token_frames, temporal_ratio, generator),
    )


def _seed(seed: int, number: int) -> int:
    """Well mixed: torch's CPU generator takes 32 bits of it, and neighbouring seeds start alike."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=4).digest())
