"""Conditions of the flow: text, pooled text, micro-conditions, and frame replacement with its dropouts.

Pure functions over tensors; it knows nothing of the network or of how samples are drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from model.recipe import Task, VideoConfig
from model.text import TextEmbedding


@dataclass(slots=True, frozen=True)
class Conditions:
    """All that conditions a batch of B rows beside the image."""

    text: Tensor
    """[B, L, text_size]."""
    text_mask: Tensor
    """bool [B, L], True where a token is real."""
    pooled: Tensor
    """[B, pooled_size]."""
    micro: Tensor
    """[B, 6]: original height, original width, crop top, crop left, frame stride, number of frames."""

    @classmethod
    def of(cls, embedding: TextEmbedding, micro: Tensor) -> Self:
        return cls(embedding.tokens, embedding.mask, embedding.pooled, micro)

    @classmethod
    def stack(cls, rows: Sequence["Conditions"]) -> Self:
        """One batch of all rows, text padded to the longest."""
        length = max(row.text.shape[1] for row in rows)

        def padded(x: Tensor) -> Tensor:
            missing = length - x.shape[1]
            return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1) if missing else x

        return cls(
            text=torch.cat([padded(row.text) for row in rows]),
            text_mask=torch.cat([padded(row.text_mask) for row in rows]),
            pooled=torch.cat([row.pooled for row in rows]),
            micro=torch.cat([row.micro for row in rows]),
        )

    def rows(self, index: Tensor | slice) -> "Conditions":
        return Conditions(self.text[index], self.text_mask[index], self.pooled[index], self.micro[index])

    def to(self, device: torch.device | str) -> "Conditions":
        return Conditions(
            self.text.to(device), self.text_mask.to(device), self.pooled.to(device), self.micro.to(device)
        )


def micro_conditions(video: VideoConfig, batch: int = 1) -> Tensor:
    """Micro-conditions [B, 6] of generation: original size = output size, no crop, the training stride."""
    row = [video.height, video.width, 0, 0, video.frame_stride, video.num_frames]
    return torch.tensor([row] * batch, dtype=torch.float32)


def replace_frames(latents: Tensor, clean: Tensor, frame_mask: Tensor) -> Tensor:
    """Frame replacement (paper 2.3.1): clean latents where `frame_mask` bool [B, T], the others as they are."""
    return torch.where(frame_mask[:, :, None, None, None], clean, latents)


def first_frames(batch: int, num_frames: int, count: int = 1) -> Tensor:
    """Mask bool [B, T] with the first `count` frames clean."""
    return (torch.arange(num_frames) < count).expand(batch, num_frames)


def draw_frame_mask(
    task: Task, batch: int, num_frames: int, *, image_dropout: float, generator: torch.Generator
) -> Tensor:
    """Training mask bool [B, T]: TI2V keeps the first frame clean except in `image_dropout` of the rows."""
    if task != "ti2v":
        return torch.zeros(batch, num_frames, dtype=torch.bool)
    kept = torch.rand(batch, generator=generator) >= image_dropout
    return first_frames(batch, num_frames) & kept[:, None]


def draw_text_dropout(batch: int, *, text_dropout: float, generator: torch.Generator) -> Tensor:
    """bool [B], True where the caption is replaced by the empty string; independent of the image (App. B)."""
    return torch.rand(batch, generator=generator) < text_dropout
