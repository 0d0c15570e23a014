"""Step caching: where a row's prediction moves little from one denoise step to the next, it is foretold, not computed.

It owns what a row remembers of its last computed velocities, the estimate of the error, and the foretelling. It knows
nothing of guidance, solvers or networks: TeaCache (arXiv 2411.19108) decides by the network's modulated input, which an
engine does not show, so here, as in EasyCache (arXiv 2507.02860), what came out of it decides.

What is kept is the data a velocity points at, x + (1 - t) v, and not the velocity: it stays true when noise is added
between two steps, and moves less. It is foretold along the line through the last two that were computed (TaylorSeer's
first order, arXiv 2503.06923); keeping the velocity itself (FORA, arXiv 2407.01425) would be no more than longer steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [R, T, C, H, W], t [R], which rows of the batch these are, int [R]) -> velocity of these rows."""

SAME_TIME = 1e-6
"""Two computations closer in time than this say nothing about how fast the data moves."""


@dataclass(slots=True, frozen=True)
class StepCache:
    """What B rows remember; they need not stand at the same time, nor have been computed equally often."""

    threshold: Tensor
    """[B]: the share by which the data may have moved, by estimate, before it is computed again; 0 computes always."""
    data: Tensor
    """[B, T, C, H, W] that the last computed velocity points at; 0 in frames that are given."""
    slope: Tensor
    """[B, T, C, H, W]: how the data moved from the computation before to the last, per unit of flow time."""
    time: Tensor
    """[B], when the last was computed."""
    latents: Tensor
    """[B, T, C, H, W] it was computed at; 0 in frames that are given."""
    rate: Tensor
    """[B]: how far the data moved between the last two, for each unit that the latents had moved."""
    computed: Tensor
    """int [B]: how many velocities were computed."""
    foretold: Tensor
    """int [B]: how many were not."""

    @classmethod
    def empty(cls, latents: Tensor, threshold: Tensor) -> Self:
        """For `latents` [B, T, C, H, W] of which nothing is known yet."""
        none, count = torch.zeros_like(latents), torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
        zero = torch.zeros_like(threshold).to(latents)
        return cls(threshold.to(latents), none, none, zero, none, zero, count, count)

    @classmethod
    def stack(cls, rows: Sequence["StepCache"]) -> Self:
        return cls(**{name: torch.cat([getattr(row, name) for row in rows]) for name in cls.__slots__})

    def rows(self, index: Tensor | slice) -> "StepCache":
        return StepCache(**{name: getattr(self, name)[index] for name in self.__slots__})

    def error(self, x: Tensor, free: Tensor) -> Tensor:
        """[B]: how far the data will have moved, now that the latents are `x`, relative to its own length."""
        return self.rate * _norm(_masked(x, free) - self.latents) / _norm(self.data).clamp_min(1e-12)

    def foretell(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity at `x` [B, T, C, H, W] and `t` [B], towards where the data will be by its last slope."""
        data = self.data + _per_row(t - self.time) * self.slope
        return (data - x) / _per_row(1 - t)

    def after(self, x: Tensor, t: Tensor, velocity: Tensor, free: Tensor) -> "StepCache":
        """With `velocity` computed at `x` and `t`; `free` bool [B, T], False in given frames."""
        x, data = _masked(x, free), _masked(x + _per_row(1 - t) * velocity, free)
        passed, moved = t - self.time, data - self.data
        known = (self.computed > 0) & (passed.abs() > SAME_TIME)
        slope = torch.where(_per_row(known), moved / _per_row(torch.where(known, passed, 1.0)), self.slope)
        rate = _norm(moved) / _norm(x - self.latents).clamp_min(1e-12)
        return replace(self, data=data, slope=slope, time=t, latents=x, rate=rate, computed=self.computed + 1)

    def choose(self, computed: Tensor, other: "StepCache") -> "StepCache":
        """This cache in the rows where `computed` bool [B], `other` with one more foretold in the rest."""
        rest = replace(other, foretold=other.foretold + 1)
        pairs = {name: (getattr(self, name), getattr(rest, name)) for name in self.__slots__}
        return StepCache(**{name: torch.where(_like(computed, one), one, two) for name, (one, two) in pairs.items()})


def recall(
    compute: Compute, x: Tensor, t: Tensor, cache: StepCache, *, free: Tensor, must: Tensor
) -> tuple[Tensor, StepCache]:
    """Velocities of B rows, of which `compute` sees those that need it, and the cache after them.

    Args:
        free: bool [B, T], False in frames that are given. must: bool [B], True where it is computed in any case.
    """
    # Not `>=`: an estimate that is not a number is one that cannot be relied on.
    needed = must | (cache.computed < 2) | ~(cache.error(x, free) < cache.threshold)
    if bool(needed.all()):
        velocity = compute(x, t, torch.arange(len(x), device=x.device))
        return velocity, cache.after(x, t, velocity, free)
    velocity = cache.foretell(x, t)
    if bool(needed.any()):
        index = needed.nonzero()[:, 0]
        velocity = velocity.index_copy(0, index, compute(x[index], t[index], index))
    return velocity, cache.after(x, t, velocity, free).choose(needed, cache)


def _masked(x: Tensor, free: Tensor) -> Tensor:
    return x * free[:, :, None, None, None]


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1).sqrt()


def _per_row(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1, 1)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (x.ndim - 1))
