"""Drawing videos from the trained flow: joint guidance, renormalisation, solver steps. Pure functions per step.

Every step takes B unlike rows, each with its own time, step size, guidance scale and clean frames, so a server can
batch videos that stand at different steps. It knows nothing of networks, jobs or decoding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from model.conditioning import Conditions, replace_frames
from model.flow_matching import interpolate, shift_timesteps
from model.recipe import SamplingConfig

Velocity = Callable[[Tensor, Tensor, Conditions], Tensor]
"""(latents [R, T, C, H, W], t [R], conditions of R rows) -> velocity; what an engine or a network offers."""

Solver = Literal["euler", "heun"]
FIRST_TIME = 1e-3
"""The SDE's diffusion (1 - t) / t needs t > 0; its first step uses this in its place."""


@dataclass(slots=True, frozen=True)
class Guidance:
    """What pulls each row: conditional against null conditions."""

    conditional: Conditions
    null: Conditions
    """Null text, usually the empty string; the image is dropped too (joint guidance)."""
    scale: Tensor
    """[B]; 1 is the conditional prediction alone."""
    renormalize: bool = True


@dataclass(slots=True, frozen=True)
class ImageCondition:
    """Frames each row must keep. Rows without any are text-to-video."""

    latents: Tensor
    """Clean latents [B, T, C, H, W]; anything where `frame_mask` is False."""
    frame_mask: Tensor
    """bool [B, T], True where the frame is clean."""
    noise: Tensor
    """[B, T, C, H, W]: start of the straight path that the clean frames follow in the null branch."""


def timestep_schedule(num_steps: int, shift: float = 1.0) -> Tensor:
    """Flow times [num_steps + 1] from 0 (noise) to 1 (data)."""
    return shift_timesteps(torch.linspace(0.0, 1.0, num_steps + 1), shift)


def joint_guidance(conditional: Tensor, null: Tensor, scale: Tensor) -> Tensor:
    """JIT-CFG (paper 2.3.2): null + s (conditional - null), text and image guided by one scale [B]."""
    return null + _per_row(scale) * (conditional - null)


def renormalize(guided: Tensor, conditional: Tensor, frame_mask: Tensor) -> Tensor:
    """CFG-Renorm (paper App. A): the guided velocity at the conditional one's norm, clean frames left out."""
    counted = (~frame_mask)[:, :, None, None, None]
    wanted = (conditional * counted).square().flatten(1).sum(1).sqrt()
    found = (guided * counted).square().flatten(1).sum(1).sqrt().clamp_min(1e-12)
    return guided * _per_row(wanted / found)


def guided_velocity(
    velocity: Velocity, latents: Tensor, t: Tensor, guidance: Guidance, image: ImageCondition
) -> Tensor:
    """One call of `velocity` with 2B rows: conditional rows first, null rows after."""
    conditional_rows = replace_frames(latents, image.latents, image.frame_mask)
    null_rows = replace_frames(latents, interpolate(image.latents, image.noise, t), image.frame_mask)
    both = velocity(
        torch.cat([conditional_rows, null_rows]),
        torch.cat([t, t]),
        Conditions.stack([guidance.conditional, guidance.null]),
    )
    conditional, null = both.chunk(2)
    guided = joint_guidance(conditional, null, guidance.scale)
    return renormalize(guided, conditional, image.frame_mask) if guidance.renormalize else guided


@dataclass(slots=True, frozen=True)
class Step:
    """One solver update of B rows, from `start` [B] to `end` [B]."""

    start: Tensor
    end: Tensor
    solver: Solver = "euler"
    diffusion_noise: Tensor | None = None
    """Standard normal [B, T, C, H, W] for the reverse-time SDE; None integrates the ODE."""


def denoise_step(velocity: Velocity, latents: Tensor, step: Step, guidance: Guidance, image: ImageCondition) -> Tensor:
    """Latents at `step.end`. Euler calls the network once, Heun twice."""
    size = _per_row(step.end - step.start)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        v = guided_velocity(velocity, x, t, guidance, image)
        return v if step.diffusion_noise is None else v + _per_row(_diffusion(t)) * _score(v, x, t)

    x = latents
    if step.diffusion_noise is not None:
        x = x + (2 * _per_row(_diffusion(step.start)) * size).sqrt() * step.diffusion_noise
    slope = drift(x, step.start)
    moved = x + size * slope
    if step.solver == "heun":
        last = step.end >= 1.0  # the score has no limit at t = 1, and the ODE's slope there is unseen in training
        second = drift(moved, step.end.clamp_max(1 - FIRST_TIME))
        moved = torch.where(_per_row(last), moved, x + size * (slope + second) / 2)
    return replace_frames(moved, interpolate(image.latents, image.noise, step.end), image.frame_mask)


def sample(
    velocity: Velocity,
    noise: Tensor,
    guidance: Guidance,
    image: ImageCondition,
    config: SamplingConfig,
    *,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents [B, T, C, H, W] at t = 1 from noise of that shape; clean frames come back as given."""
    latents = replace_frames(noise, image.noise, image.frame_mask)
    schedule = timestep_schedule(config.num_steps, shift)
    for start, end in pairwise(schedule):
        rows = noise.shape[0]
        diffusion = torch.randn(noise.shape, generator=generator) if config.stochastic and end < 1.0 else None
        step = Step(start.expand(rows), end.expand(rows), config.solver, diffusion)
        latents = denoise_step(velocity, latents, step, guidance, image)
    return latents


def no_image(latents: Tensor) -> ImageCondition:
    """Text-to-video: no frame of `latents` [B, T, C, H, W] is clean."""
    mask = torch.zeros(latents.shape[:2], dtype=torch.bool, device=latents.device)
    return ImageCondition(torch.zeros_like(latents), mask, torch.zeros_like(latents))


def _diffusion(t: Tensor) -> Tensor:
    """SiT's SBDM diffusion for the linear path, (1 - t) / t."""
    return (1 - t) / t.clamp_min(FIRST_TIME)


def _score(v: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Score from velocity (paper App. A): (t v - x) / (1 - t)."""
    rate = _per_row(t)
    return (rate * v - x) / (1 - rate)


def _per_row(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1, 1)
