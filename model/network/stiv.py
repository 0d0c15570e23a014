"""STIV: the diffusion transformer of arXiv 2412.07730, sections 2.1 and 2.2, as plain PyTorch.

It owns the forward pass and the initial weights; it knows nothing of losses, guidance, training or where its inputs
come from. Frame replacement happens before it is called (`conditioning`), so text-to-video and image-to-video are
the same call.
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.config import NetworkConfig
from model.network.image import ImageTokens
from model.network.layers import Block, FinalLayer, ScalarEmbedder, TextProjection, modulation_vectors, norm
from model.network.masking import Kept
from model.network.positions import LearnedPositions, sinusoids, spatial_angles, temporal_angles
from model.network.rope import Turn, turn
from model.network.sequence import SequenceGroup

MICRO_GROUPS = [2, 2, 1, 1]
"""Scalars a group of micro-conditions: original size, crop corner, frame stride, number of frames."""


class STIV(nn.Module):
    """Velocity network over latents.

    Args:
        config: shape of the network.
        latent_channels: channels C of the codec.
        text_size: width of the text encoder's token embeddings.
        pooled_size: width of its pooled embedding.
    """

    def __init__(self, config: NetworkConfig, *, latent_channels: int, text_size: int, pooled_size: int) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = latent_channels
        self.sequence: SequenceGroup | None = None
        size = config.hidden_size
        patch_values = config.temporal_patch_size * config.patch_size**2 * latent_channels

        self.patch_embedding = nn.Linear(patch_values, size)
        self.learned_positions = LearnedPositions(config.learned_grid, size) if config.learned_grid else None
        self.text_projection = TextProjection(text_size, size)
        self.image_tokens = ImageTokens(config, latent_channels) if config.image_cross_attention != "off" else None
        self.timestep_embedding = ScalarEmbedder(1, size, scale=1000.0)
        self.pooled_projection = nn.Linear(pooled_size, size)
        groups = MICRO_GROUPS if config.micro_conditions else []
        self.micro_embeddings = nn.ModuleList([ScalarEmbedder(count, size) for count in groups])
        self.modulation = nn.Linear(size, modulation_vectors(config) * size) if config.shared_modulation else None
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.mask_token = nn.Parameter(torch.zeros(size))
        self.final = FinalLayer(size, patch_values)
        self._initialize()

    def forward(  # noqa: PLR0913 a network's inputs, which export and engines name one by one
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor,
        pooled: Tensor,
        micro: Tensor,
        keep: Tensor | None = None,
        keep_frames: Tensor | None = None,
        image: Tensor | None = None,
        image_given: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B, T, C, H, W] of noisy latents [B, T, C, H, W] at flow time `timestep` [B] in [0, 1].

        Weights in bf16 take float32 inputs and give a float32 velocity: what is large is rounded here, time is not.

        Args:
            text: [B, L, text_size]; `text_mask` bool [B, L], True where a token is real (never all False).
            pooled: [B, pooled_size]. micro: [B, 6], see `conditioning.micro_conditions`.
            keep: spatial tokens [B, K] that all but the last `unmasked_depth` blocks see (MaskDiT); None = all.
            keep_frames: token frames [B, KT], ascending, that those blocks see; None = all.
            image: clean latents [B, C, H, W] of the first frame, for `image_cross_attention`, and bool [B] where
                it is given.
        """
        config, dtype, precision = self.config, latents.dtype, self.mask_token.dtype
        latents, text, pooled = latents.to(precision), text.to(precision), pooled.to(precision)
        if self.sequence is not None and keep_frames is not None:
            raise ValueError(
                "keep_frames and share_clips both cut frames; set training.temporal_mask_ratio 0 or sequence_parallel 1"
            )
        frames = latents.shape[1] // config.temporal_patch_size
        height, width = latents.shape[3] // config.patch_size, latents.shape[4] // config.patch_size

        x = self._add_positions(self.patch_embedding(self._patchify(latents)), height, width)  # [B, T', S, D]
        if self.sequence is not None:
            x = self.sequence.scatter(x)
        text, text_mask = self._context(text, text_mask, image, image_given)  # [B, L, D], [B, L]
        condition = self._condition(timestep, pooled, micro)  # [B, D]
        modulation = F.silu(condition)
        if self.modulation is not None:
            modulation = self.modulation(modulation)  # [B, 6D or 9D], the same for all blocks
        angles = self._angles(frames, height, width, x.device)  # spatial [1, S, head/2], temporal [1, T', head/2]

        masked_depth = 0
        if keep is not None or keep_frames is not None:
            masked_depth = config.depth - config.unmasked_depth
            kept = Kept(keep, keep_frames)
            x = kept.gather(x)
            kept_turns = _turns(kept.angles(*angles, frames=x.shape[1], tokens=x.shape[2]))
            for block in self.blocks[:masked_depth]:
                x = block(x, modulation, text, text_mask, *kept_turns)
            x = kept.scatter(x, self.mask_token, frames, height * width)
        turns = _turns(angles)
        for block in self.blocks[masked_depth:]:
            x = block(x, modulation, text, text_mask, *turns)
        velocity = self._unpatchify(self.final(x, condition), height, width)
        if self.sequence is not None:
            velocity = self.sequence.gather(velocity)
        return velocity.to(dtype)

    def share_clips(self, sequence: SequenceGroup) -> None:
        """Let the ranks of a group hold a part of each clip's frames; every one still takes and gives whole clips."""
        self.sequence = sequence
        for block in self.blocks:
            cast(Block, block).sequence = sequence

    def _context(
        self, text: Tensor, text_mask: Tensor, image: Tensor | None, image_given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What cross-attention sees [B, L, D] and where it may look, bool [B, L]: the text, then the image's tokens."""
        text = self.text_projection(text)
        if self.image_tokens is None:
            return text, text_mask
        if image is None or image_given is None:
            raise ValueError(
                f"network.image_cross_attention '{self.config.image_cross_attention}' needs image and image_given;"
                " rows without an image take zeros and image_given False"
            )
        tokens = self.image_tokens(image.to(text.dtype)).to(text.dtype)
        given = image_given[:, None].expand(-1, tokens.shape[1])
        return torch.cat([text, tokens], dim=1), torch.cat([text_mask, given], dim=1)

    def _condition(self, timestep: Tensor, pooled: Tensor, micro: Tensor) -> Tensor:
        """The singleton condition [B, D]: every embedding normed on its own, then summed (paper 2.1)."""
        parts = [self.timestep_embedding(timestep[:, None]), self.pooled_projection(pooled)]
        if self.config.micro_conditions:
            groups = torch.split(micro, MICRO_GROUPS, dim=1)
            parts += [embed(values) for embed, values in zip(self.micro_embeddings, groups, strict=True)]
        if self.config.condition_norm:
            parts = [norm(part) for part in parts]
        return sum(parts[1:], start=parts[0])

    def _add_positions(self, x: Tensor, height: int, width: int) -> Tensor:
        """x [B, T', S, D] with absolute positions, if the network has any."""
        if self.learned_positions is not None:
            return x + self.learned_positions(x.shape[1], height, width)
        if self.config.positions == "rope_sinusoid":
            return x + sinusoids(self.config, x.shape[1], height, width, x.device).to(x.dtype)
        return x

    def _angles(
        self, frames: int, height: int, width: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """RoPE's angles, spatial [1, S, head/2] and temporal [1, T', head/2]; None without RoPE."""
        config = self.config
        if config.positions == "learned":
            return None, None
        size = config.hidden_size // config.num_heads
        return (
            spatial_angles(config, height, width, size, device),
            temporal_angles(config, frames, size, device),
        )

    def _patchify(self, latents: Tensor) -> Tensor:
        """Cubify: [B, T, C, H, W] -> [B, T', S, values of a patch]."""
        time, side = self.config.temporal_patch_size, self.config.patch_size
        return rearrange(latents, "b (t pt) c (h ph) (w pw) -> b t (h w) (pt ph pw c)", pt=time, ph=side, pw=side)

    def _unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        time, side = self.config.temporal_patch_size, self.config.patch_size
        return rearrange(
            x, "b t (h w) (pt ph pw c) -> b (t pt) c (h ph) (w pw)", h=height, w=width, pt=time, ph=side, pw=side
        )

    def _initialize(self) -> None:
        """Xavier for every linear; zeros where a branch must start closed: AdaLN, cross-attention output, head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)
        if self.learned_positions is not None:
            self.learned_positions.initialize()
        closed = [self.final.modulation, self.final.head]
        closed += [] if self.modulation is None else [self.modulation]
        closed += [linear for block in self.blocks for linear in cast(Block, block).closed()]
        for linear in closed:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


def _turns(angles: tuple[Tensor | None, Tensor | None]) -> tuple[Turn | None, Turn | None]:
    """RoPE's cosines and sines, spatial and temporal."""
    spatial, temporal = angles
    return (None if spatial is None else turn(spatial)), (None if temporal is None else turn(temporal))
