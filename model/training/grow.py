"""Grow: start a stage from an earlier stage's EMA weights in a new shape (paper 2.4, App. B).

It owns which weight goes where: copied, inflated along time, or newly initialised. It knows nothing of files or
optimizers. Positions need no weights: RoPE interpolation is `network.rope_*_scale` of the new recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.network.stiv import STIV

INFLATED_INPUT = "patch_embedding.weight"
INFLATED_OUTPUT = ("final.head.weight", "final.head.bias")


@dataclass(slots=True, frozen=True)
class GrowReport:
    """Parameter names by what happened to them."""

    copied: tuple[str, ...]
    inflated: tuple[str, ...]
    new: tuple[str, ...]


def grow(network: STIV, parent: Mapping[str, Tensor]) -> GrowReport:
    """Fill `network` from a parent's weights by name.

    An image stage's patch embedding is repeated over the `temporal_patch_size` frames of a token and divided by it
    (so a still clip embeds as the image did); its head is copied into every frame's slot (I3D). Temporal attention
    that the parent lacks keeps its own initialisation.

    Raises:
        ValueError: a weight that neither matches nor can be inflated, or a parent weight without a home.
    """
    own = network.state_dict()
    strays = sorted(set(parent) - set(own))
    if strays:
        raise ValueError(
            f"the parent has weights that this stage lacks, first {strays[:3]}; check network.depth and parts"
        )
    copied: list[str] = []
    inflated: list[str] = []
    new: list[str] = []
    with torch.no_grad():
        for name, target in own.items():
            source = parent.get(name)
            if source is None:
                if ".temporal." not in name:
                    raise ValueError(f"the parent lacks '{name}', and only temporal attention may start anew")
                new.append(name)
            elif source.shape == target.shape:
                target.copy_(source)
                copied.append(name)
            else:
                target.copy_(_inflate(name, source, target))
                inflated.append(name)
    return GrowReport(tuple(copied), tuple(inflated), tuple(new))


def _inflate(name: str, source: Tensor, target: Tensor) -> Tensor:
    if name == INFLATED_INPUT and source.shape[0] == target.shape[0] and target.shape[1] % source.shape[1] == 0:
        times = target.shape[1] // source.shape[1]
        return source.repeat(1, times) / times
    if name in INFLATED_OUTPUT and source.shape[1:] == target.shape[1:] and target.shape[0] % source.shape[0] == 0:
        return source.repeat(target.shape[0] // source.shape[0], *[1] * (source.ndim - 1))
    raise ValueError(
        f"'{name}' is {tuple(source.shape)} in the parent and {tuple(target.shape)} here; a stage may change"
        " temporal_patch_size and add temporal attention, nothing else: keep hidden_size, num_heads, patch_size,"
        " the codec and the text encoder as they are in the parent"
    )
