"""The first frame as tokens for cross-attention, the alternative to frame replacement (paper Table 3, CA and LP).

It owns the way from latents to tokens; it knows nothing of text or attention (`stiv` appends the tokens to the text).
B batch, S spatial tokens, D hidden size.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.config import NetworkConfig
from model.network import rope
from model.network.positions import spatial_angles

RESIDUAL_BLOCKS = 4


class ImageTokens(nn.Module):
    """Clean latents of the first frame [B, C, H, W] as tokens [B, S, D], one a patch.

    `linear` projects patches as they are (CA), `resnet` what a ResNet makes of them (CA + LP). A sinusoid says where a
    patch stands: cross-attention has no RoPE and would see a bag of patches. The paper says nothing on this.
    """

    def __init__(self, config: NetworkConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        width = channels if config.image_cross_attention == "linear" else config.hidden_size // 4
        self.resnet = nn.Sequential()  # empty: the latents as they are
        if config.image_cross_attention == "resnet":
            self.resnet.append(nn.Conv2d(channels, width, 3, padding=1))
            self.resnet.extend(ResidualBlock(width) for _ in range(RESIDUAL_BLOCKS))
        self.projection = nn.Linear(config.patch_size**2 * width, config.hidden_size)

    def forward(self, image: Tensor) -> Tensor:
        config, side = self.config, self.config.patch_size
        height, width = image.shape[2] // side, image.shape[3] // side
        angles = spatial_angles(config, height, width, config.hidden_size, image.device)
        patches = rearrange(self.resnet(image), "b c (h ph) (w pw) -> b (h w) (ph pw c)", ph=side, pw=side)
        return self.projection(patches) + rope.sinusoid(angles)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after a norm over the whole image and SiLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(1, width), nn.GroupNorm(1, width)])
        self.convolutions = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, H, W] -> the same."""
        h = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            h = convolution(F.silu(norm(h)))
        return x + h
