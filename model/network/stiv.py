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

from model.network import rope
from model.network.layers import Block, FinalLayer, ScalarEmbedder, TextProjection, norm
from model.recipe import NetworkConfig

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
        size = config.hidden_size
        patch_values = config.temporal_patch_size * config.patch_size**2 * latent_channels

        self.patch_embedding = nn.Linear(patch_values, size)
        self.text_projection = TextProjection(text_size, size)
        self.timestep_embedding = ScalarEmbedder(1, size, scale=1000.0)
        self.pooled_projection = nn.Linear(pooled_size, size)
        self.micro_embeddings = nn.ModuleList([ScalarEmbedder(count, size) for count in MICRO_GROUPS])
        self.modulation = nn.Linear(size, 6 * size)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.mask_token = nn.Parameter(torch.zeros(size))
        self.final = FinalLayer(size, patch_values)
        self._initialize()

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor,
        pooled: Tensor,
        micro: Tensor,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B, T, C, H, W] of noisy latents [B, T, C, H, W] at flow time `timestep` [B] in [0, 1].

        Args:
            text: [B, L, text_size]; `text_mask` bool [B, L], True where a token is real (never all False).
            pooled: [B, pooled_size]. micro: [B, 6], see `conditioning.micro_conditions`.
            keep: spatial tokens [B, K] that all but the last `unmasked_depth` blocks see (MaskDiT); None = all.
        """
        config = self.config
        frames = latents.shape[1] // config.temporal_patch_size
        height, width = latents.shape[3] // config.patch_size, latents.shape[4] // config.patch_size

        x = self.patch_embedding(self._patchify(latents))  # [B, T', S, D]
        if config.absolute_positions:
            x = x + self._positions(frames, height, width, x.device)
        text = self.text_projection(text)  # [B, L, D]
        condition = self._condition(timestep, pooled, micro)  # [B, D]
        modulation = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        head_size = config.hidden_size // config.num_heads
        spatial_angles = self._spatial_angles(height, width, head_size, x.device)  # [1, S, head/2]
        temporal_angles = self._temporal_angles(frames, head_size, x.device)  # [1, T', head/2]

        masked_depth = 0 if keep is None else config.depth - config.unmasked_depth
        if keep is not None:
            x_all, x = x, _gather_tokens(x, keep)
            kept_angles = spatial_angles[0][keep].repeat_interleave(frames, dim=0)  # [B*T', K, head/2]
            for block in self.blocks[:masked_depth]:
                x = block(x, modulation, text, text_mask, kept_angles, temporal_angles)
            x = _scatter_tokens(x, keep, self.mask_token.expand_as(x_all))
        for block in self.blocks[masked_depth:]:
            x = block(x, modulation, text, text_mask, spatial_angles, temporal_angles)
        return self._unpatchify(self.final(x, condition), height, width)

    def _condition(self, timestep: Tensor, pooled: Tensor, micro: Tensor) -> Tensor:
        """The singleton condition [B, D]: every embedding normed on its own, then summed (paper 2.1)."""
        parts = [self.timestep_embedding(timestep[:, None]), self.pooled_projection(pooled)]
        groups = torch.split(micro, MICRO_GROUPS, dim=1)
        parts += [embed(values) for embed, values in zip(self.micro_embeddings, groups, strict=True)]
        condition = norm(parts[0])
        for part in parts[1:]:
            condition = condition + norm(part)
        return condition

    def _patchify(self, latents: Tensor) -> Tensor:
        """Cubify: [B, T, C, H, W] -> [B, T', S, values of a patch]."""
        time, side = self.config.temporal_patch_size, self.config.patch_size
        return rearrange(latents, "b (t pt) c (h ph) (w pw) -> b t (h w) (pt ph pw c)", pt=time, ph=side, pw=side)

    def _unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        time, side = self.config.temporal_patch_size, self.config.patch_size
        return rearrange(
            x, "b t (h w) (pt ph pw c) -> b (t pt) c (h ph) (w pw)", h=height, w=width, pt=time, ph=side, pw=side
        )

    def _spatial_angles(self, height: int, width: int, size: int, device: torch.device) -> Tensor:
        """[1, S, size / 2] for `size` channels."""
        scale, theta = self.config.rope_spatial_scale, self.config.rope_theta
        rows = (torch.arange(height, device=device) * scale)[:, None].expand(height, width)
        columns = (torch.arange(width, device=device) * scale)[None, :].expand(height, width)
        return rope.angles_2d(rows, columns, size, theta).reshape(1, height * width, -1)

    def _temporal_angles(self, frames: int, size: int, device: torch.device) -> Tensor:
        """[1, T', size / 2] for `size` channels."""
        positions = torch.arange(frames, device=device) * self.config.rope_temporal_scale
        return rope.angles_1d(positions, size, self.config.rope_theta)[None]

    def _positions(self, frames: int, height: int, width: int, device: torch.device) -> Tensor:
        """Absolute positions [1, T', S, D]: where and when each token stands."""
        size = self.config.hidden_size
        spatial = rope.sinusoid(self._spatial_angles(height, width, size, device))
        temporal = rope.sinusoid(self._temporal_angles(frames, size, device))
        return spatial[:, None] + temporal[:, :, None]

    def _initialize(self) -> None:
        """Xavier for every linear; zeros where a branch must start closed: AdaLN, cross-attention output, head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)
        closed = [self.modulation, self.final.modulation, self.final.head]
        closed += [cast(Block, block).cross.output for block in self.blocks]
        for linear in closed:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


def _gather_tokens(x: Tensor, keep: Tensor) -> Tensor:
    """x [B, T, S, D], keep [B, K] -> [B, T, K, D]; the same tokens in every frame (a tube)."""
    index = keep[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)


def _scatter_tokens(kept: Tensor, keep: Tensor, fill: Tensor) -> Tensor:
    """Put kept tokens [B, T, K, D] back to their places among `fill` [B, T, S, D]."""
    index = keep[:, None, :, None].expand(-1, kept.shape[1], -1, kept.shape[3])
    return fill.scatter(2, index, kept)
