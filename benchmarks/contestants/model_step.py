"""One step of a video diffusion transformer, ours or diffusers' Latte, at one shape: what the speed benchmarks time.

It owns how the two are built alike and fed; it knows nothing of clocks or memory.

What "alike" means: equal width, depth, heads, frames, spatial tokens, caption tokens and dtype. A layer of ours is one
block (spatial attention, temporal attention, cross-attention, one feed-forward); Latte's `num_layers` counts pairs of
a spatial block (self-attention, cross-attention, feed-forward) and a temporal one (self-attention, feed-forward). So
Latte has a second feed-forward a layer and ours has not: equal depth is not equal work, and `flops` and `parameters`
are reported with every ratio. In our favour: Latte projects the caption for every frame again. In Latte's favour: ours
norms queries and keys, turns them by RoPE, norms each sub-layer's output, and takes a caption mask.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import NetworkConfig
from model.network.stiv import STIV

LATENT_CHANNELS, TEXT_SIZE = 4, 1280
"""Of Stable Diffusion's codec, and of CLIP bigG: a caption's tokens and its pooled vector."""


@dataclass(frozen=True)
class Shape:
    """A network and the clips it sees, in tokens."""

    hidden: int
    depth: int
    heads: int
    frames: int
    """Token frames."""
    side: int
    """Spatial tokens are a square of this side."""
    text: int = 77
    batch: int = 1
    temporal_patch: int = 1
    """Latte has none: compare at 1."""

    @property
    def tokens(self) -> int:
        return self.batch * self.frames * self.side**2

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """Frames, channels, height and width of a clip's latents."""
        return self.frames * self.temporal_patch, LATENT_CHANNELS, 2 * self.side, 2 * self.side

    def config(self) -> NetworkConfig:
        return NetworkConfig(
            hidden_size=self.hidden,
            depth=self.depth,
            num_heads=self.heads,
            temporal_patch_size=self.temporal_patch,
            unmasked_depth=min(2, self.depth - 1),
        )


@dataclass
class Contestant:
    """A network with the inputs of one step."""

    network: nn.Module
    blocks: list[nn.Module]
    call: Callable[[], Tensor]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    def compile_blocks(self) -> None:
        """Each block on its own: one short compilation, reused for all of them."""
        for block in self.blocks:
            block.compile()  # pyright: ignore[reportUnknownMemberType]

    def forward(self) -> None:
        with torch.no_grad():
            self.call()

    def backward(self) -> None:
        """Forward and backward; leaves gradients."""
        cast(Any, self.call().float().square().mean()).backward()

    def forward_backward(self) -> None:
        self.backward()
        self.network.zero_grad()

    def flops(self) -> int:
        """Of one forward, counted as it runs; attention is written out, so that its products are seen."""
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.call()
        return counter.get_total_flops()


def ours(shape: Shape, *, device: str = "cpu", mask_ratio: float = 0.0) -> Contestant:
    """STIV as the paper's recipes have it: RoPE, QK-norm, sandwich norms, one AdaLN for all layers."""
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    network = STIV(shape.config(), latent_channels=LATENT_CHANNELS, text_size=TEXT_SIZE, pooled_size=TEXT_SIZE)
    with (
        torch.no_grad()
    ):  # branches that start closed would multiply zeros, which a GPU does with less power, so faster
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    network.to(device)
    latents, timestep, text = _inputs(shape, device)
    pooled, micro = torch.randn(shape.batch, TEXT_SIZE, device=device), torch.ones(shape.batch, 6, device=device)
    text_mask = torch.ones(shape.batch, shape.text, dtype=torch.bool, device=device)
    keep = None
    if mask_ratio:
        count = round(shape.side**2 * (1 - mask_ratio))
        order = torch.rand(shape.batch, shape.side**2, device=device).argsort(1)
        keep = order[:, :count].sort(1).values
    return Contestant(
        network,
        list(network.blocks),
        lambda: network(latents, timestep, text, text_mask, pooled, micro, keep=keep),
    )


def latte(shape: Shape, *, device: str = "cpu") -> Contestant:
    """diffusers' Latte with the settings of its published Latte-1, other than shape, caption width and variances."""
    from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel  # seconds to import

    if shape.temporal_patch != 1:
        raise ValueError(f"Latte has no temporal patches; temporal_patch is {shape.temporal_patch}, use 1")
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    network = cast(Any, LatteTransformer3DModel)(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.hidden // shape.heads,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=shape.depth,
        cross_attention_dim=shape.hidden,
        attention_bias=True,
        sample_size=2 * shape.side,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_SIZE,
        video_length=shape.frames,
    ).to(device)
    latents, timestep, text = _inputs(shape, device)
    clips, steps = latents.transpose(1, 2).contiguous(), (timestep * 1000).long()
    blocks = [*network.transformer_blocks, *network.temporal_transformer_blocks]
    return Contestant(network, blocks, lambda: network(clips, steps, text, return_dict=False)[0])


def _inputs(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents [B, T, C, H, W], times [B] and captions [B, L, text size]."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(shape.batch, *shape.latents, generator=generator)
    text = torch.randn(shape.batch, shape.text, TEXT_SIZE, generator=generator)
    return latents.to(device), torch.rand(shape.batch, generator=generator).to(device), text.to(device)
