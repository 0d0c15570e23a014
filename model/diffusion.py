"""Table 2's baseline: v-prediction diffusion (DDPM) on Stable Diffusion's schedule, and how to sample it as a flow.

It owns the schedule and the change of variables between the two. z = a x_1 + s eps with a^2 + s^2 = 1, target
v = a eps - s x_1, and x_tau = z / (a + s) lies on the straight flow at tau = a / (a + s). So one sampler draws from
both; it knows nothing of that sampler nor of networks.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from model.conditioning import Conditions
from model.config import FlowConfig

STEPS = 1000
BETA_FIRST, BETA_LAST = 0.00085, 0.012
"""Stable Diffusion's "scaled linear" betas: their square roots are evenly spaced."""

Network = Callable[[Tensor, Tensor, Conditions], Tensor]
"""(latents [R, T, C, H, W], t [R], conditions of R rows) -> prediction."""


def diffusion_path(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """z_t and the v to learn, for data and noise [B, ...] at t [B]: 0 is the noisiest of the steps, 1 the least."""
    a, s = (x.reshape(-1, *[1] * (data.ndim - 1)) for x in _signal_and_noise(flow_time(t)))
    return a * data + s * noise, a * noise - s * data


def flow_velocity(flow: FlowConfig, network: Network) -> Network:
    """What the sampler follows, from a network trained for `flow.objective`."""
    return as_flow(network) if flow.objective == "diffusion" else network


def as_flow(network: Network) -> Network:
    """The flow velocity that a v-prediction network implies; Euler steps along it are DDIM steps.

    The schedule ends short of pure noise (terminal SNR above 0) and of clean data; beyond its ends the network is asked
    at the nearest step.
    """

    def velocity(latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        times = _flow_times(t.device)
        known = t.clamp(times[0].item(), times[-1].item())
        signal, noise = _signal_and_noise(t)
        z = latents * _per_row(signal + noise)
        v = network(z, network_time(t), conditions)
        a, s = _signal_and_noise(known)
        return _per_row(a - s) * z - _per_row(a + s) * v  # data - noise, where data = a z - s v and noise = s z + a v

    return velocity


def flow_time(t: Tensor) -> Tensor:
    """Flow time tau = a / (a + s) at the network's time t; between two steps tau is interpolated."""
    times = _flow_times(t.device)
    return _interpolate(t, torch.linspace(0, 1, STEPS, dtype=times.dtype, device=t.device), times)


def network_time(tau: Tensor) -> Tensor:
    """The inverse of `flow_time`, clamped to the schedule's ends."""
    times = _flow_times(tau.device)
    return _interpolate(tau, times, torch.linspace(0, 1, STEPS, dtype=times.dtype, device=tau.device))


@cache
def _flow_times(device: torch.device) -> Tensor:
    """tau [STEPS] in float64, rising: the last diffusion step (noisiest) first."""
    betas = torch.linspace(BETA_FIRST**0.5, BETA_LAST**0.5, STEPS, dtype=torch.float64).square()
    kept = (1 - betas).cumprod(0).flip(0)
    return (kept.sqrt() / (kept.sqrt() + (1 - kept).sqrt())).to(device)


def _signal_and_noise(tau: Tensor) -> tuple[Tensor, Tensor]:
    """a and s at flow time tau."""
    length = (tau.square() + (1 - tau).square()).sqrt()
    return tau / length, (1 - tau) / length


def _interpolate(at: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (places, values), both rising; constant outside."""
    x = at.to(places.dtype).clamp(places[0], places[-1]).contiguous()
    right = torch.searchsorted(places, x).clamp(1, len(places) - 1)
    share = (x - places[right - 1]) / (places[right] - places[right - 1])
    return torch.lerp(values[right - 1], values[right], share).to(at.dtype)


def _per_row(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1, 1)
