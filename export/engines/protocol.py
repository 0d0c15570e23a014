"""What an engine is: one call that gives a velocity, and the two ways one can be unfit.

It owns the promise every runtime keeps; it knows nothing of runtimes, files, guidance, solvers or requests.
"""

from collections.abc import Mapping
from typing import Protocol, Self

import torch
from torch import Tensor

from model.conditioning import Conditions


class EngineCorrupt(Exception):
    """A file of an engine is missing, or is not what was written."""


class EngineMismatch(Exception):
    """An engine that is whole, but not the one for this recipe, runtime, version or GPU."""


class Engine(Protocol):
    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Velocity [B, T, C, H, W] of latents [B, T, C, H, W] at flow times [B]; float32 in and out.

        It is one call of the runtime: more rows than the engine was proven for are an error, not several calls. Who
        gathers rows knows the limit (`ShapeProfile`), and plans with what one call costs.
        """
        ...


class RefittableEngine(Engine, Protocol):
    """An engine that can be made again around other weights of the same network, without tracing or building."""

    def with_weights(self, weights: Mapping[str, Tensor]) -> Self:
        """A second engine over `weights`, float32 by the network's names; this one stays as it is, to the bit.

        Raises:
            EngineMismatch: they are of another network, or this engine was built to keep its weights.
        """
        ...


def require_same_weights(held: Mapping[str, torch.Size], given: Mapping[str, Tensor]) -> None:
    """Refuse weights of another network before the first of them is used."""
    missing, unlike = (
        held.keys() - given.keys(),
        [name for name in held.keys() & given.keys() if held[name] != given[name].shape],
    )
    if missing:
        raise EngineMismatch(
            f"these weights are of another network: {len(missing)} of {len(held)} are missing, such as"
            f" '{min(missing)}'; export that checkpoint to an engine of its own"
        )
    if unlike:
        name = min(unlike)
        raise EngineMismatch(
            f"these weights are of another network: {len(unlike)} have another shape, such as '{name}',"
            f" {tuple(given[name].shape)} and not {tuple(held[name])}; export that checkpoint to an engine of its own"
        )
