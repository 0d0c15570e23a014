"""Conditions of the flow: text, pooled text, micro-conditions, and frame replacement with its dropouts.

Pure functions over tensors; it knows nothing of the network, of how samples are drawn or of which frames a task gives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from model.config import VideoConfig
from model.text import TextEmbedding


@dataclass(slots=True, frozen=True)
class Conditions:
    """All that conditions a batch of B rows beside the frames that are replaced."""

    text: Tensor
    """[B, L, text_size]."""
    text_mask: Tensor
    """bool [B, L], True where a token is real."""
    pooled: Tensor
    """[B, pooled_size]."""
    micro: Tensor
    """[B, 6]: original height, original width, crop top, crop left, frame stride, number of frames."""
    image: Tensor | None = None
    """Clean latents [B, C, H, W] of the first frame, for networks that attend to it; zeros where none is given."""
    image_given: Tensor | None = None
    """bool [B]; there whenever `image` is."""

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
            image=_all_or_none([row.image for row in rows]),
            image_given=_all_or_none([row.image_given for row in rows]),
        )

    def with_image(self, image: Tensor, given: Tensor) -> "Conditions":
        """A copy that carries `image` [B, C, H, W] in the rows where `given` bool [B], and zeros in the others."""
        return replace(self, image=torch.where(given[:, None, None, None], image, 0.0), image_given=given)

    def rows(self, index: Tensor | slice) -> "Conditions":
        return self._each(lambda x: x[index])

    def to(self, device: torch.device | str) -> "Conditions":
        return self._each(lambda x: x.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Conditions":
        return Conditions(
            text=change(self.text),
            text_mask=change(self.text_mask),
            pooled=change(self.pooled),
            micro=change(self.micro),
            image=None if self.image is None else change(self.image),
            image_given=None if self.image_given is None else change(self.image_given),
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


def draw_frame_mask(given: Tensor, batch: int, *, image_dropout: float, generator: torch.Generator) -> Tensor:
    """Training mask bool [B, T]: the frames in `given` bool [T] are clean, in `image_dropout` of the rows none is."""
    if not given.any():
        return given.expand(batch, -1)
    kept = torch.rand(batch, generator=generator) >= image_dropout
    return given & kept[:, None]


def draw_text_dropout(batch: int, *, text_dropout: float, generator: torch.Generator) -> Tensor:
    """bool [B], True where the caption is replaced by the empty string; independent of the image (App. B)."""
    return torch.rand(batch, generator=generator) < text_dropout


def _all_or_none(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    if found and len(found) != len(parts):
        raise ValueError(
            f"{len(found)} of {len(parts)} conditions carry an image; give every row one, with `image_given` False"
            " where there is none"
        )
    return torch.cat(found) if found else None
