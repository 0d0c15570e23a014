"""Masked training (MaskDiT): which tokens the masked blocks see, and how they return to their places.

It knows nothing of how they are drawn (`flow_matching`) or of what the blocks compute.
B batch, T token frames of which KT are kept, S spatial tokens of which K are kept, D hidden size.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True, frozen=True)
class Kept:
    """The tokens that stay: the same places in every kept frame (a tube); None keeps all."""

    tokens: Tensor | None
    """[B, K], places among S."""
    frames: Tensor | None
    """[B, KT], ascending places among T."""

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, S, D] -> [B, KT, K, D]."""
        if self.frames is not None:
            x = x.gather(1, _frame_index(self.frames, x))
        if self.tokens is not None:
            x = x.gather(2, _token_index(self.tokens, x))
        return x

    def scatter(self, kept: Tensor, mask_token: Tensor, frames: int, tokens: int) -> Tensor:
        """[B, KT, K, D] back to its places in [B, T, S, D], `mask_token` [D] in all others."""
        batch, kept_frames, _, size = kept.shape
        if self.tokens is not None:
            fill = mask_token.expand(batch, kept_frames, tokens, size)
            kept = fill.scatter(2, _token_index(self.tokens, kept), kept)
        if self.frames is not None:
            fill = mask_token.expand(batch, frames, tokens, size)
            kept = fill.scatter(1, _frame_index(self.frames, kept), kept)
        return kept

    def angles(
        self, spatial: Tensor | None, temporal: Tensor | None, frames: int, tokens: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of the kept ones: [1, S, n] -> [B * frames, K, n] and [1, T, n] -> [B * tokens, KT, n].

        `frames` and `tokens` are what is left of either: `Attention` takes every frame, and every place, as a row.
        """
        if spatial is not None and self.tokens is not None:
            spatial = spatial[0][self.tokens].repeat_interleave(frames, dim=0)
        if temporal is not None and self.frames is not None:
            temporal = temporal[0][self.frames].repeat_interleave(tokens, dim=0)
        return spatial, temporal


def _frame_index(frames: Tensor, x: Tensor) -> Tensor:
    return frames[:, :, None, None].expand(-1, -1, x.shape[2], x.shape[3])


def _token_index(tokens: Tensor, x: Tensor) -> Tensor:
    return tokens[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
