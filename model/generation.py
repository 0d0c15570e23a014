"""From captions and images to clips: the frozen parts around a velocity, held together.

It owns the order encode -> sample -> decode for a batch; it knows nothing of training, jobs or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.conditioning import Conditions, first_frames, micro_conditions
from model.recipe import StageRecipe
from model.sampler import Guidance, ImageCondition, Velocity, no_image, sample
from model.text import TextEncoder
from model.vae import FrameCodec

Clip = npt.NDArray[np.uint8]
"""[T, H, W, 3]."""


@dataclass(slots=True, frozen=True)
class ClipGenerator:
    """Draws clips as `recipe.sampling` says."""

    velocity: Velocity
    codec: FrameCodec
    text: TextEncoder
    recipe: StageRecipe

    def __call__(self, captions: Sequence[str], *, images: Tensor | None = None, seed: int = 0) -> list[Clip]:
        """One clip a caption; `images` [B, 3, H, W] in [-1, 1] are kept as first frames."""
        recipe, rows = self.recipe, len(captions)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self._latent_shape(rows), generator=generator)
        micro = micro_conditions(recipe.video, rows)
        guidance = Guidance(
            conditional=Conditions.of(self.text.encode(captions), micro),
            null=Conditions.of(self.text.encode([""] * rows), micro),
            scale=torch.full((rows,), recipe.sampling.guidance_scale),
            renormalize=recipe.sampling.renormalize,
        )
        condition = no_image(noise) if images is None else self._first_frame(images, noise)
        latents = sample(
            self.velocity, noise, guidance, condition, recipe.sampling, shift=recipe.flow.shift, generator=generator
        )
        return to_clips(self.codec.decode(latents))

    def _first_frame(self, images: Tensor, noise: Tensor) -> ImageCondition:
        latents = torch.zeros_like(noise)
        latents[:, :1] = self.codec.encode(images[:, None])
        return ImageCondition(latents, first_frames(noise.shape[0], noise.shape[1]), noise)

    def _latent_shape(self, rows: int) -> tuple[int, int, int, int, int]:
        video, factor = self.recipe.video, self.codec.spatial_factor
        return rows, video.num_frames, self.codec.latent_channels, video.height // factor, video.width // factor


def to_clips(frames: Tensor) -> list[Clip]:
    """Frames [B, T, 3, H, W] in [-1, 1] -> uint8 clips."""
    pixels = ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return list(pixels.permute(0, 1, 3, 4, 2).contiguous().cpu().numpy())


def to_frames(clips: Sequence[Clip]) -> Tensor:
    """uint8 clips of one shape -> frames [B, T, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(np.stack(clips)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
