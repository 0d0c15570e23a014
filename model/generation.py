"""From captions and given frames to clips and films: the frozen parts around a velocity, held together.

It owns the order encode -> sample -> decode for a batch, and the running of a task's plan; it knows nothing of
training, jobs or files, nor of which frames a task gives (`tasks`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.conditioning import Conditions, first_frames, micro_conditions
from model.config import SamplingConfig, Task
from model.recipe import StageRecipe
from model.sampler import Guidance, ImageCondition, Velocity, sample_steps
from model.tasks import TEXTLESS, Pass, Plan, frame_mask, frame_stride, sampling_of
from model.text import TextEncoder
from model.vae import FrameCodec

Clip = npt.NDArray[np.uint8]
"""[T, H, W, 3]."""
ROWS_AT_ONCE = 4
"""Passes of a round that are drawn as one batch."""


@dataclass(slots=True, frozen=True)
class _Given:
    """What B rows start from beside their captions."""

    latents: Tensor
    """Clean latents [B, T, C, h, w]; anything where `frame_mask` is False."""
    frame_mask: Tensor
    """bool [B, T]."""
    micro: Tensor
    """[B, 6]."""


@dataclass(slots=True, frozen=True)
class ClipGenerator:
    """Draws clips as `recipe.sampling` says."""

    velocity: Velocity
    codec: FrameCodec
    text: TextEncoder
    recipe: StageRecipe

    def __call__(self, captions: Sequence[str], *, images: Tensor | None = None, seed: int = 0) -> list[Clip]:
        """One clip a caption; `images` [B, 3, H, W] in [-1, 1] are kept as first frames."""
        rows, num_frames = len(captions), self.recipe.video.num_frames
        latents = torch.zeros(self._latent_shape(rows))
        if images is not None:
            latents[:, :1] = self.codec.encode(images[:, None])
        given = _Given(
            latents=latents,
            frame_mask=first_frames(rows, num_frames, count=0 if images is None else 1),
            micro=micro_conditions(self.recipe.video, rows),
        )
        return self._clips(captions, given, self.recipe.sampling, seed)

    def complete(self, captions: Sequence[str], clips: Tensor, task: Task, *, seed: int = 0) -> list[Clip]:
        """One clip a caption, the frames that `task` gives taken from `clips` [B, T, 3, H, W], cut as for training."""
        given = _Given(
            latents=self.codec.encode(clips),
            frame_mask=frame_mask(self.recipe, task).expand(len(captions), -1),
            micro=self._micro(frame_stride(self.recipe.video, task)).repeat(len(captions), 1),
        )
        texts = [""] * len(captions) if task in TEXTLESS else captions
        return self._clips(texts, given, sampling_of(self.recipe, task), seed)

    @torch.no_grad()
    def film(
        self,
        plan: Plan,
        caption: str = "",
        frames: Tensor | None = None,
        *,
        seed: int = 0,
        on_step: Callable[[], None] = lambda: None,
    ) -> Clip:
        """What `plan` returns from `frames` [N, 3, H, W] in [-1, 1]; `on_step` is called after each denoise step."""
        board = dict(enumerate(self._encoded(plan, frames)))
        generator = torch.Generator().manual_seed(seed)
        for batch in _batches(plan):
            texts = [caption if plan.takes_text else ""] * len(batch)
            drawn = self._sample(texts, self._read(board, batch), plan.sampling, generator, on_step)
            for one, latents in zip(batch, drawn, strict=True):
                board.update({place: latents[frame] for frame, place in one.kept})
        size = self.recipe.video.num_frames
        parts = [plan.returned[at : at + size] for at in range(0, len(plan.returned), size)]
        decoded = [self.codec.decode(torch.stack([board[place] for place in part])[None]) for part in parts]
        return np.concatenate([to_clips(part)[0] for part in decoded])

    def _encoded(self, plan: Plan, frames: Tensor | None) -> Tensor:
        """Latents [N, C, h, w] of the user's frames."""
        video = self.recipe.video
        wanted = (plan.num_inputs, 3, video.height, video.width)
        found = (0, *wanted[1:]) if frames is None else tuple(frames.shape)
        if found != wanted:
            raise ValueError(f"the plan of task '{plan.task}' takes frames of shape {wanted}, not {found}")
        if frames is None or not plan.num_inputs:
            return torch.zeros(self._latent_shape(1)[1:])[:0]
        return self.codec.encode(frames[None])[0]

    def _read(self, board: dict[int, Tensor], passes: Sequence[Pass]) -> _Given:
        latents = torch.zeros(self._latent_shape(len(passes)))
        mask = torch.zeros(latents.shape[:2], dtype=torch.bool)
        for row, one in enumerate(passes):
            for frame, place in one.given:
                latents[row, frame] = board[place]
                mask[row, frame] = True
        return _Given(latents, mask, torch.cat([self._micro(one.frame_stride) for one in passes]))

    def _clips(self, captions: Sequence[str], given: _Given, sampling: SamplingConfig, seed: int) -> list[Clip]:
        latents = self._sample(captions, given, sampling, torch.Generator().manual_seed(seed))
        return to_clips(self.codec.decode(latents))

    def _sample(
        self,
        captions: Sequence[str],
        given: _Given,
        sampling: SamplingConfig,
        generator: torch.Generator,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Latents [B, T, C, h, w]."""
        recipe, rows = self.recipe, len(captions)
        noise = torch.randn(self._latent_shape(rows), generator=generator)
        conditional = Conditions.of(self.text.encode(captions), given.micro)
        if recipe.network.image_cross_attention != "off":
            conditional = conditional.with_image(given.latents[:, 0], given.frame_mask[:, 0])
        guidance = Guidance(
            conditional=conditional,
            null=Conditions.of(self.text.encode([""] * rows), given.micro),
            scale=torch.full((rows,), sampling.guidance_scale),
        )
        replaced = given.frame_mask & recipe.conditioning.frame_replacement
        image = ImageCondition(given.latents, replaced, noise)
        latents, shift = noise, recipe.flow.shift
        for moved in sample_steps(self.velocity, noise, guidance, image, sampling, shift=shift, generator=generator):
            latents = moved
            on_step()
        return latents

    def _micro(self, stride: int) -> Tensor:
        return micro_conditions(self.recipe.video.model_copy(update={"frame_stride": stride}))

    def _latent_shape(self, rows: int) -> tuple[int, int, int, int, int]:
        video, factor = self.recipe.video, self.codec.spatial_factor
        return rows, video.num_frames, self.codec.latent_channels, video.height // factor, video.width // factor


def denoise_steps(plan: Plan) -> int:
    """How often `ClipGenerator.film` calls `on_step`."""
    return len(_batches(plan)) * plan.sampling.num_steps


def _batches(plan: Plan) -> list[tuple[Pass, ...]]:
    return [
        passes[first : first + ROWS_AT_ONCE] for passes in plan.rounds for first in range(0, len(passes), ROWS_AT_ONCE)
    ]


def to_clips(frames: Tensor) -> list[Clip]:
    """Frames [B, T, 3, H, W] in [-1, 1] -> uint8 clips."""
    pixels = ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return list(pixels.permute(0, 1, 3, 4, 2).contiguous().cpu().numpy())


def to_frames(clips: Sequence[Clip]) -> Tensor:
    """uint8 clips of one shape -> frames [B, T, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(np.stack(clips)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
