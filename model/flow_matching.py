"""Flow matching (paper 2.1): path, target, timestep distribution, what is masked and the masked loss. Pure functions.

t = 0 is noise, t = 1 is data: x_t = t x_1 + (1 - t) eps, v = x_1 - eps. It knows nothing of networks or samplers.
"""

import torch
from torch import Tensor

from model.config import FlowConfig
from model.diffusion import diffusion_path


def draw_timesteps(batch: int, config: FlowConfig, generator: torch.Generator) -> Tensor:
    """Flow times [B] in (0, 1)."""
    if config.timestep_distribution == "uniform":
        t = torch.rand(batch, generator=generator)
    else:
        t = torch.sigmoid(torch.randn(batch, generator=generator) * config.logit_std + config.logit_mean)
    return shift_timesteps(t, config.shift)


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """SD3's resolution shift written for t = 1 - sigma: above 1 moves times towards noise; 1 is none."""
    return t / (t + shift * (1 - t))


def path(flow: FlowConfig, data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents at t [B] and what the network learns to predict from them, for data and noise [B, ...]."""
    if flow.objective == "diffusion":
        return diffusion_path(data, noise, t)
    return interpolate(data, noise, t), velocity_target(data, noise)


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t for data and noise [B, ...] at t [B]."""
    t = t.reshape(-1, *[1] * (data.ndim - 1))
    return t * data + (1 - t) * noise


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    return data - noise


def masked_loss(velocity: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over clips of `masked_losses`.

    A clip weighs the same however many of its frames were given, so the gradient of a global batch does not depend on
    how ranks and micro-batches cut it.
    """
    return masked_losses(velocity, target, weight).mean()


def masked_losses(velocity: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Each clip's mean squared error over the elements that count, [B].

    Args:
        velocity: prediction [B, T, C, H, W]; target: the same shape.
        weight: broadcastable to [B, T, C, H, W], 1 where an element counts: not under a replaced frame (paper 2.3.1)
            and not in a masked token (MaskDiT).
    """
    weight = weight.expand_as(target)
    error = ((velocity - target).square() * weight).flatten(1).sum(1)
    return error / weight.flatten(1).sum(1).clamp_min(1.0)


def loss_weight(
    frame_mask: Tensor,
    latents: Tensor,
    *,
    keep: Tensor | None,
    patch_size: int,
    keep_frames: Tensor | None = None,
    temporal_patch_size: int = 1,
) -> Tensor:
    """Weight [B, T, 1, H, W] of each latent element: 0 under clean frames and in dropped tokens.

    Args:
        frame_mask: bool [B, T], True where the frame was replaced by its clean latent.
        keep: indices [B, K] of the spatial tokens the network saw, or None for all.
        keep_frames: indices [B, K'] of the token frames it saw, or None for all.
    """
    batch, frames, _, height, width = latents.shape
    weight = (~frame_mask).to(latents.dtype)[:, :, None, None, None].expand(-1, -1, 1, height, width)
    if keep is not None:
        rows, columns = height // patch_size, width // patch_size
        kept = latents.new_zeros(batch, rows * columns).scatter(1, keep, 1.0).reshape(-1, 1, 1, rows, columns)
        weight = weight * kept.repeat_interleave(patch_size, dim=3).repeat_interleave(patch_size, dim=4)
    if keep_frames is not None:
        seen = latents.new_zeros(batch, frames // temporal_patch_size).scatter(1, keep_frames, 1.0)
        weight = weight * seen.repeat_interleave(temporal_patch_size, dim=1)[:, :, None, None, None]
    return weight


def draw_kept_tokens(batch: int, tokens: int, mask_ratio: float, generator: torch.Generator) -> Tensor | None:
    """Indices [B, K] of the spatial tokens that stay, drawn per row and shared by its frames; None = all stay."""
    kept = max(1, round(tokens * (1 - mask_ratio)))
    if kept == tokens:
        return None
    return torch.rand(batch, tokens, generator=generator).argsort(dim=1)[:, :kept].sort(dim=1).values


def draw_kept_frames(batch: int, frames: int, mask_ratio: float, generator: torch.Generator) -> Tensor | None:
    """Indices [B, K'] of the token frames that stay (paper Fig. 6a, temporal masking); None = all stay."""
    return draw_kept_tokens(batch, frames, mask_ratio, generator)
