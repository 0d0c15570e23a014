"""Grow: start a stage from earlier stages' EMA weights in a new shape (paper 2.4, App. B).

It owns which weight goes where: copied, inflated along time, or newly initialised. It knows nothing of files or
optimizers. RoPE needs no weights: its interpolation is `network.rope_*_scale` of the new recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.network.stiv import STIV

INFLATED_INPUT = "patch_embedding.weight"
INFLATED_OUTPUT = ("final.head.weight", "final.head.bias")
TEMPORAL = ".temporal."
IMAGE = "image_tokens."
MODULATION = ("modulation.weight", "modulation.bias")


@dataclass(slots=True, frozen=True)
class GrowReport:
    """Parameter names by what happened to them."""

    copied: tuple[str, ...]
    inflated: tuple[str, ...]
    new: tuple[str, ...]


def grow(
    network: STIV, parent: Mapping[str, Tensor], temporal_parent: Mapping[str, Tensor] | None = None
) -> GrowReport:
    """Fill `network` from a parent's weights by name; temporal attention from the temporal parent's, if there is one.

    An image stage's patch embedding is repeated over the `temporal_patch_size` frames of a token and divided by it
    (so a still clip embeds as the image did); its head is copied into every frame's slot (I3D). Temporal attention,
    its modulation and the projection of the image keep their own initialisation where the parent lacks them.

    Raises:
        ValueError: a weight that neither matches nor can be inflated, or a parent weight without a home.
    """
    if temporal_parent is not None:
        parent = _joined(parent, temporal_parent)
    may_start_anew = (IMAGE,) if temporal_parent is not None else (IMAGE, TEMPORAL)
    own = network.state_dict()
    strays = sorted(set(parent) - set(own))
    if strays:
        raise ValueError(
            f"the parent has weights that this stage lacks, first {strays[:3]}; give this stage the parent's"
            " network.depth and choices"
        )
    copied: list[str] = []
    inflated: list[str] = []
    new: list[str] = []
    with torch.no_grad():
        for name, target in own.items():
            source = parent.get(name)
            if source is None:
                if not any(part in name for part in may_start_anew):
                    raise ValueError(
                        f"the parent lacks '{name}', and only {' and '.join(may_start_anew)} may start anew; give this"
                        " stage the parent's network.depth and choices"
                    )
                new.append(name)
            elif source.shape == target.shape:
                target.copy_(source)
                copied.append(name)
            else:
                target.copy_(_inflated(name, source, target))
                inflated.append(name)
    return GrowReport(tuple(copied), tuple(inflated), tuple(new))


def _joined(parent: Mapping[str, Tensor], temporal_parent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but temporal attention of the one, temporal attention of the other (paper Fig. 4)."""
    temporal = {name: weight for name, weight in temporal_parent.items() if TEMPORAL in name}
    if not temporal:
        raise ValueError("the temporal parent has no temporal attention; name a stage that was trained on videos")
    return {name: weight for name, weight in parent.items() if TEMPORAL not in name} | temporal


def _inflated(name: str, source: Tensor, target: Tensor) -> Tensor:
    if name == INFLATED_INPUT and source.shape[0] == target.shape[0] and target.shape[1] % source.shape[1] == 0:
        times = target.shape[1] // source.shape[1]
        return source.repeat(1, times) / times
    if name in INFLATED_OUTPUT and source.shape[1:] == target.shape[1:] and target.shape[0] % source.shape[0] == 0:
        return source.repeat(target.shape[0] // source.shape[0], *[1] * (source.ndim - 1))
    if name.endswith(MODULATION) and source.shape[1:] == target.shape[1:] and 9 * len(source) == 6 * len(target):
        return torch.cat([source, target[len(source) :]])  # the last three vectors are temporal attention's
    raise ValueError(
        f"'{name}' is {tuple(source.shape)} in the parent and {tuple(target.shape)} here; a stage may change"
        " temporal_patch_size and add temporal attention and its modulation, nothing else: keep hidden_size, num_heads,"
        " patch_size, learned_grid, the codec and the text encoder as they are in the parent"
    )
